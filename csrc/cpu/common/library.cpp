// torch.ops.sbert_kernels: the library that the operations add their operators to, and questions about the processor.
#include <torch/library.h>

#include <string>

#include "isa.h"

namespace sbert_kernels {
namespace {

std::string cpu_instruction_set() { return instruction_set_name(); }
std::string cpu_bfloat16_instructions() { return bfloat16_instructions(); }

}  // namespace

TORCH_LIBRARY(sbert_kernels, library) {
  library.def("cpu_instruction_set() -> str", cpu_instruction_set);
  library.def("cpu_bfloat16_instructions() -> str", cpu_bfloat16_instructions);
}

}  // namespace sbert_kernels
