// torch.ops.sbert_kernels_cuda: the library that the operations add their operators to, and questions about the driver.
//
// Bound to torch by its stable ABI (torch >= 2.10), so that one file serves all later versions. What only a torch with
// CUDA has is declared weak: the library loads beside any torch, and raises where it is asked to run.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "torch.h"

// In libtorch_cuda.so, which the libtorch.so of a torch with CUDA needs. torch's header hides it without USE_CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace sbert_kernels {

void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA.");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

namespace {

// The CUDA version that the driver serves (0 without a driver), and that of the runtime in this library; as 13000.
std::vector<int64_t> driver_version() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = 0;
  return {driver, runtime};
}

}  // namespace

STABLE_TORCH_LIBRARY(sbert_kernels_cuda, library) { library.def("driver_version() -> int[]"); }

STABLE_TORCH_LIBRARY_IMPL(sbert_kernels_cuda, CompositeExplicitAutograd, library) {
  library.impl("driver_version", TORCH_BOX(&driver_version));
}

}  // namespace sbert_kernels
