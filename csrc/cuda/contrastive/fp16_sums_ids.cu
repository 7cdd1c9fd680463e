#include "kernel.cuh"

char const* sbert_kernels::contrastive::fp16_sums_ids(Call const& call) {
  return launch<cutlass::half_t, Policy::sums, true>(call);
}
