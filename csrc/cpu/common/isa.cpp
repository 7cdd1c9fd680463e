#include "isa.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>

#include <exception>
#include <string>
#include <vector>

namespace sbert_kernels {
namespace {

// Whether brgemm multiplies pairs of bfloat16 numbers. There is no function to ask, and the flags of the processor do
// not tell: the environment may forbid oneDNN what the processor has.
bool multiplies_bfloat16() {
  constexpr int64_t kSize = 32;
  const std::vector<c10::BFloat16> operand(kSize * kSize, c10::BFloat16(0.0f));
  std::vector<float> product(kSize * kSize);
  try {
    at::native::cpublas::brgemm(
        kSize, kSize, kSize, kSize, kSize, kSize, false, operand.data(), operand.data(), product.data(), true);
  } catch (const std::exception&) {
    return false;
  }
  at::native::cpublas::brgemm_release();
  return true;
}

}  // namespace

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

const char* bfloat16_instructions() {
  // The first may change between two calls, so that only what it allows is asked once and kept.
  if (!at::globalContext().userEnabledMkldnn() || at::get_cpu_capability() != "AVX512") return "";
  static const bool multiplies = multiplies_bfloat16();
  if (!multiplies) return "";
  // torch packs operands of bfloat16 where oneDNN multiplies them by AMX, and nowhere else.
  return at::native::cpublas::could_pack(at::kBFloat16) ? "AMX" : "AVX512-bf16";
}

}  // namespace sbert_kernels
