#include "kernel.cuh"

char const* sbert_kernels::contrastive::bf16_rows(Call const& call) {
  return launch<cutlass::bfloat16_t, Policy::rows, false>(call);
}
