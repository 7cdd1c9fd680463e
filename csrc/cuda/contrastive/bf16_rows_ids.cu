#include "kernel.cuh"

char const* sbert_kernels::contrastive::bf16_rows_ids(Call const& call) {
  return launch<cutlass::bfloat16_t, Policy::rows, true>(call);
}
