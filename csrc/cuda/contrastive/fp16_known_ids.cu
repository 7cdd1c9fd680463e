#include "kernel.cuh"

char const* sbert_kernels::contrastive::fp16_known_ids(Call const& call) {
  return launch<cutlass::half_t, Policy::known, true>(call);
}
