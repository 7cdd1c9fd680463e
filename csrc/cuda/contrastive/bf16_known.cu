#include "kernel.cuh"

char const* sbert_kernels::contrastive::bf16_known(Call const& call) {
  return launch<cutlass::bfloat16_t, Policy::known, false>(call);
}
