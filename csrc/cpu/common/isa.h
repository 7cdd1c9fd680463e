// Code for the instruction set of the machine, chosen at run time: a body is inlined into one function for each set.
//
//   SBK_FOR_EACH_ISA(MACRO) expands MACRO(name, target attribute, has AVX-512) for each set that the compiler knows;
//   SBK_BY_ISA(prefix) is that of prefix##baseline, prefix##avx2 and prefix##avx512 that belongs to the set in use.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define SBK_INLINE inline __attribute__((always_inline))
#define SBK_RESTRICT __restrict__
#else
#define SBK_INLINE inline
#define SBK_RESTRICT
#endif

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define SBK_X86
#define SBK_AVX2 __attribute__((target("avx2,fma")))
#define SBK_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#define SBK_FOR_EACH_ISA(MACRO) MACRO(baseline, , false) MACRO(avx2, SBK_AVX2, false) MACRO(avx512, SBK_AVX512, true)
#define SBK_BY_ISA(PREFIX) ::sbert_kernels::by_isa(PREFIX##baseline, PREFIX##avx2, PREFIX##avx512)
#else
#define SBK_FOR_EACH_ISA(MACRO) MACRO(baseline, , false)
#define SBK_BY_ISA(PREFIX) (PREFIX##baseline)
#endif

namespace sbert_kernels {

// What ATen has chosen, which the environment variable ATEN_CPU_CAPABILITY can lower.
enum class InstructionSet { kBaseline, kAvx2, kAvx512 };
InstructionSet instruction_set();
const char* instruction_set_name();

// The instructions that bfloat16 products run with: "AMX" or "AVX512-bf16"; "" where brgemm has no such products. That
// is what oneDNN says, which ONEDNN_MAX_CPU_ISA and torch.backends.mkldnn.flags() can lower, as ATEN_CPU_CAPABILITY
// can.
const char* bfloat16_instructions();

template <class T>
const T& by_isa(const T& baseline, const T& avx2, const T& avx512) {
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return avx512;
    case InstructionSet::kAvx2:
      return avx2;
    default:
      return baseline;
  }
}

template <class To, class From>
SBK_INLINE To bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

SBK_INLINE float to_float(float x) { return x; }
SBK_INLINE double to_float(double x) { return x; }
SBK_INLINE float to_float(uint16_t bf16) { return bits<float>(static_cast<uint32_t>(bf16) << 16); }

// To bf16, ties to even; a NaN stays one.
SBK_INLINE uint16_t round_to_bf16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}

}  // namespace sbert_kernels
