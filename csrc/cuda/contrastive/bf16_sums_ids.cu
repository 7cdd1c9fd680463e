#include "kernel.cuh"

char const* sbert_kernels::contrastive::bf16_sums_ids(Call const& call) {
  return launch<cutlass::bfloat16_t, Policy::sums, true>(call);
}
