// The CUDA kernels of the contrastive operation as plain functions: pointers, sizes and a stream; nothing of torch.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../common/contrastive/epilogue.h"

namespace sbert_kernels::contrastive {

constexpr int TILE_M = 128, TILE_N = 128;

// One call of `write_weights`. Vectors are bf16 or fp16, rows of consecutive numbers; every base is a multiple of 16
// bytes and every stride of 8 numbers, as the hardware's tile loads and stores ask for.
struct Call {
  bool fp16;  // else bf16
  bool ids;
  Policy policy;
  void const* rows;  // (M, width)
  int64_t rows_stride;
  void const* columns;  // (N, width)
  int64_t columns_stride;
  int width;      // a multiple of 8
  void* weights;  // (M, N), of the vectors' type; null for Policy::sums
  int64_t weights_stride;
  Epilogue epilogue;
  int device;
  int multiprocessors;  // set by `write_weights`
  void* stream;         // a cudaStream_t
};

// Starts the kernel of a call; returns null, or what went wrong.
char const* write_weights(Call call);

// Returns null for success, else what an error is; so that the next call does not find it, the runtime forgets it.
char const* described(cudaError_t error);

// Each starts one kernel, and is a file of its own, so that several are compiled at once.
char const* bf16_rows(Call const&);
char const* bf16_rows_ids(Call const&);
char const* bf16_sums(Call const&);
char const* bf16_sums_ids(Call const&);
char const* bf16_known(Call const&);
char const* fp16_sums(Call const&);
char const* fp16_sums_ids(Call const&);
char const* fp16_known(Call const&);
char const* fp16_known_ids(Call const&);

}  // namespace sbert_kernels::contrastive
