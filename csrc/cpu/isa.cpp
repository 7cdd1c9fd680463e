#include "isa.h"

#include <ATen/Version.h>

#include <string>

namespace sbert_kernels {

InstructionSet instruction_set() {
#ifdef SBK_X86
  static const InstructionSet chosen = [] {
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return InstructionSet::kAvx512;
    return capability == "AVX2" ? InstructionSet::kAvx2 : InstructionSet::kBaseline;
  }();
  return chosen;
#else
  return InstructionSet::kBaseline;
#endif
}

const char* instruction_set_name() {
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return "AVX512";
    case InstructionSet::kAvx2:
      return "AVX2";
    default:
      return "baseline";
  }
}

}  // namespace sbert_kernels
