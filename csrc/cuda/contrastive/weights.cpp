// Chooses the kernel of a call.
#include "core.h"

namespace sbert_kernels::contrastive {

namespace {

using Launch = char const* (*)(Call const&);

// By element type, policy and whether there are ids. bf16 weights with a known sum have no ids: both directions at once
// would need two rules, and one direction alone is written before its sum is known. fp16 cannot hold weights before
// their sums are known.
constexpr Launch LAUNCHES[2][3][2] = {
    {{bf16_rows, bf16_rows_ids}, {bf16_sums, bf16_sums_ids}, {bf16_known, nullptr}},
    {{nullptr, nullptr}, {fp16_sums, fp16_sums_ids}, {fp16_known, fp16_known_ids}},
};

}  // namespace

char const* write_weights(Call call) {
  Launch const launch = LAUNCHES[call.fp16][static_cast<int>(call.policy)][call.ids];
  if (launch == nullptr) return "there is no kernel for this type, these outputs and ids";
  // This library has a CUDA runtime of its own beside torch's: its device is set apart from torch's.
  cudaError_t error = cudaSetDevice(call.device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&call.multiprocessors, cudaDevAttrMultiProcessorCount, call.device);
  return error == cudaSuccess ? launch(call) : described(error);
}

char const* described(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace sbert_kernels::contrastive
