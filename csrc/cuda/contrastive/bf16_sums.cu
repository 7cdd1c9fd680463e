#include "kernel.cuh"

char const* sbert_kernels::contrastive::bf16_sums(Call const& call) {
  return launch<cutlass::bfloat16_t, Policy::sums, false>(call);
}
