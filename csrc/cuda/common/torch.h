// What the operators' bindings need of torch's CUDA half.
#pragma once
#include <cstdint>

namespace sbert_kernels {

// Returns torch's current stream on a device, a cudaStream_t. Raises where torch has no CUDA.
void* current_stream(int32_t device);

}  // namespace sbert_kernels
