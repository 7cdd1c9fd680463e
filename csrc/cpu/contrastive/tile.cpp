#include "tile.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "../common/isa.h"

namespace sbert_kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// e^x within 1.5 units in the last place; 0 below -87.3 (no subnormal numbers), inf above 88, NaN for NaN. Argument
// reduction after Cody and Waite, polynomial of Cephes' expf; branch-free, so that it vectorises.
SBK_INLINE float exp_approximation(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const float y = p * bits<float>((bits<uint32_t>(shifted) << 23) + 0x3F800000u);  // p 2^n
  return x < -87.3f ? 0.0f : (x > 88.0f ? kInfinity : y);
}

SBK_INLINE bool is_duplicate(const Duplicates& d, int64_t column, int64_t i) {
  return (d.row_ids[i] == d.column_ids[column]) & (i != d.own_row + column);
}

SBK_INLINE void score_body(const ScoreTile& t) {
  const float* SBK_RESTRICT row_inverse = t.row_inverse;
  for (int64_t j = 0; j < t.columns; ++j) {
    const float* SBK_RESTRICT dots = t.dots + j * t.rows;
    float* SBK_RESTRICT scores = t.scores + j * t.ld;
    const float inverse = t.column_inverse[j];
#pragma omp simd
    for (int64_t i = 0; i < t.rows; ++i) scores[i] = dots[i] * row_inverse[i] * inverse;
    if (t.guide) {
      const float* SBK_RESTRICT guide = t.guide + j * t.rows;
      const float* SBK_RESTRICT threshold = t.guide_threshold;
      const float* SBK_RESTRICT guide_inverse = t.guide_row_inverse;
      const float column = t.guide_column_inverse[j];
      const bool spared = t.duplicates.row_ids && t.duplicates.positive;
      for (int64_t i = 0; i < t.rows; ++i) {
        bool excluded = guide[i] * guide_inverse[i] * column > threshold[i];
        if (spared) excluded = excluded & !is_duplicate(t.duplicates, j, i);
        scores[i] = excluded ? -kInfinity : scores[i];
      }
    }
    if (t.duplicates.row_ids) {
      if (t.duplicates.positive) {
        float* SBK_RESTRICT counts = t.duplicate_counts;
        float* SBK_RESTRICT sums = t.duplicate_scores;
        for (int64_t i = 0; i < t.rows; ++i) {
          const bool duplicate = is_duplicate(t.duplicates, j, i);
          counts[i] += duplicate ? 1.0f : 0.0f;
          sums[i] += duplicate ? scores[i] : 0.0f;
        }
      } else {
        for (int64_t i = 0; i < t.rows; ++i) {
          scores[i] = is_duplicate(t.duplicates, j, i) ? -kInfinity : scores[i];
        }
      }
    }
  }
}

SBK_INLINE bool told_apart(const Duplicates& d, float factor, float duplicate_factor) {
  return d.row_ids && d.positive && factor != duplicate_factor;
}

SBK_INLINE void maximum_body(const StatisticsTile& t) {
  float* SBK_RESTRICT maxima = t.maxima;
  const bool apart = told_apart(t.duplicates, t.factor, t.duplicate_factor);
  for (int64_t j = 0; j < t.columns; ++j) {
    const float* SBK_RESTRICT scores = t.scores + j * t.ld;
    if (apart) {
      for (int64_t i = 0; i < t.rows; ++i) {
        const float z = scores[i] * (is_duplicate(t.duplicates, j, i) ? t.duplicate_factor : t.factor);
        maxima[i] = z > maxima[i] ? z : maxima[i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < t.rows; ++i) {
        const float z = scores[i] * t.factor;
        maxima[i] = z > maxima[i] ? z : maxima[i];
      }
    }
  }
}

SBK_INLINE void sum_body(const StatisticsTile& t) {
  float* SBK_RESTRICT sums = t.sums;
  const float* SBK_RESTRICT shift = t.shift;
  const bool apart = told_apart(t.duplicates, t.factor, t.duplicate_factor);
  for (int64_t j = 0; j < t.columns; ++j) {
    const float* SBK_RESTRICT scores = t.scores + j * t.ld;
    if (apart) {
      for (int64_t i = 0; i < t.rows; ++i) {
        const float factor = is_duplicate(t.duplicates, j, i) ? t.duplicate_factor : t.factor;
        sums[i] += exp_approximation(scores[i] * factor - shift[i]);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < t.rows; ++i) sums[i] += exp_approximation(scores[i] * t.factor - shift[i]);
    }
  }
}

// An excluded similarity is -inf and has a gradient of 0, whose product must be 0.
SBK_INLINE float finite(float score) { return score < -FLT_MAX ? -FLT_MAX : score; }

template <bool Positives, bool Wider>
SBK_INLINE void backward_columns_of_tile(const WeightTile& t) {
  const float* SBK_RESTRICT shift = t.shift;
  const float* SBK_RESTRICT coefficient = t.softmax_coefficient;
  const float* SBK_RESTRICT share = t.positive_share;
  const float* SBK_RESTRICT row_inverse = t.row_inverse;
  float* SBK_RESTRICT row_sums = t.row_sums;
  for (int64_t j = 0; j < t.columns; ++j) {
    const float* scores = t.scores + j * t.ld;
    const float* wider = Wider ? t.wider + j * t.wider_ld : nullptr;
    float* weights = t.weights + j * t.weights_ld;  // may be either of them
    const float inverse = t.column_inverse[j];
    float column_sum = 0;
#pragma omp simd reduction(+ : column_sum)
    for (int64_t i = 0; i < t.rows; ++i) {
      float factor = t.factor, less = 0;
      if constexpr (Positives) {
        const bool duplicate = is_duplicate(t.duplicates, j, i);
        factor = duplicate ? t.duplicate_factor : factor;
        less = duplicate ? share[i] : 0.0f;
      }
      const float score = scores[i];
      const float gradient = exp_approximation(score * factor - shift[i]) * coefficient[i] - less;
      const float product = gradient * finite(score);
      row_sums[i] += product;
      column_sum += product;
      float weight = gradient * row_inverse[i] * inverse;
      if constexpr (Wider) weight += wider[i];
      weights[i] = weight;
    }
    t.column_sums[j] = column_sum;
  }
}

SBK_INLINE void backward_body(const WeightTile& t) {
  if (t.duplicates.row_ids && t.duplicates.positive) {
    t.wider ? backward_columns_of_tile<true, true>(t) : backward_columns_of_tile<true, false>(t);
  } else {
    t.wider ? backward_columns_of_tile<false, true>(t) : backward_columns_of_tile<false, false>(t);
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector) && (defined(__x86_64__) || defined(__i386__))
#define SBK_SHUFFLES
#endif
#endif

#ifdef SBK_SHUFFLES
// A 16 x 16 block in registers: four rounds that exchange the off-diagonal quarters of ever smaller squares.
SBK_INLINE void transpose_block(const float* in, int64_t ld, float* out, int64_t out_ld) {
  typedef float Lanes __attribute__((vector_size(64)));
  Lanes r[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) std::memcpy(&r[i], in + i * ld, sizeof(Lanes));
#define SBK_LANES(...) __VA_ARGS__
#define SBK_EXCHANGE(STEP, FIRST, SECOND)                     \
  _Pragma("GCC unroll 16") for (int64_t i = 0; i < 16; ++i) { \
    if (i & STEP) continue;                                   \
    const Lanes a = r[i], b = r[i + STEP];                    \
    r[i] = __builtin_shufflevector(a, b, FIRST);              \
    r[i + STEP] = __builtin_shufflevector(a, b, SECOND);      \
  }
  SBK_EXCHANGE(
      8, SBK_LANES(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
      SBK_LANES(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  SBK_EXCHANGE(
      4, SBK_LANES(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
      SBK_LANES(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  SBK_EXCHANGE(
      2, SBK_LANES(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
      SBK_LANES(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  SBK_EXCHANGE(
      1, SBK_LANES(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
      SBK_LANES(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#undef SBK_EXCHANGE
#undef SBK_LANES
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) std::memcpy(out + i * out_ld, &r[i], sizeof(Lanes));
}
#endif

// Shuffles of 16 lanes are single instructions with AVX-512 only.
template <bool Shuffles>
SBK_INLINE void transpose_body(const float* in, int64_t ld, int64_t columns, int64_t rows, float* out, int64_t out_ld) {
  constexpr int64_t kBlock = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += kBlock) {
    const int64_t i1 = std::min(i0 + kBlock, rows);
    for (int64_t j0 = 0; j0 < columns; j0 += kBlock) {
      const int64_t j1 = std::min(j0 + kBlock, columns);
#ifdef SBK_SHUFFLES
      if constexpr (Shuffles) {
        if (i1 - i0 == kBlock && j1 - j0 == kBlock) {
          transpose_block(in + j0 * ld + i0, ld, out + i0 * out_ld + j0, out_ld);
          continue;
        }
      }
#endif
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t j = j0; j < j1; ++j) out[i * out_ld + j] = in[j * ld + i];
      }
    }
  }
}

SBK_INLINE void split_body(
    const float* SBK_RESTRICT in, int64_t count, uint16_t* SBK_RESTRICT high, uint16_t* SBK_RESTRICT low) {
  if (!low) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) high[i] = round_to_bf16(in[i]);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t h = round_to_bf16(in[i]);
    high[i] = h;
    // Infinite less infinite is no number; the high part says it all.
    const float rest = in[i] - bits<float>(static_cast<uint32_t>(h) << 16);
    low[i] = round_to_bf16(std::fabs(in[i]) <= FLT_MAX ? rest : 0.0f);
  }
}

template <class T, class U>
SBK_INLINE double dot_body(const T* a, const U* b, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(to_float(a[i])) * static_cast<double>(to_float(b[i]));
  return sum;
}

template <class T>
SBK_INLINE void add_scaled_body(const T* x, float factor, int64_t count, float* SBK_RESTRICT out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] += factor * to_float(x[i]);
}

#define SBK_ENTRY_POINTS(NAME, TARGET, SHUFFLES)                                                            \
  TARGET void score_##NAME(const ScoreTile& t) { score_body(t); }                                           \
  TARGET void maximum_##NAME(const StatisticsTile& t) { maximum_body(t); }                                  \
  TARGET void sum_##NAME(const StatisticsTile& t) { sum_body(t); }                                          \
  TARGET void backward_##NAME(const WeightTile& t) { backward_body(t); }                                    \
  TARGET void transpose_##NAME(                                                                             \
      const float* in, int64_t ld, int64_t columns, int64_t rows, float* out, int64_t out_ld) {             \
    transpose_body<SHUFFLES>(in, ld, columns, rows, out, out_ld);                                           \
  }                                                                                                         \
  TARGET void split_##NAME(const float* in, int64_t count, c10::BFloat16* high, c10::BFloat16* low) {       \
    split_body(in, count, reinterpret_cast<uint16_t*>(high), reinterpret_cast<uint16_t*>(low));             \
  }                                                                                                         \
  TARGET double dot_##NAME(const float* a, const float* b, int64_t count) { return dot_body(a, b, count); } \
  TARGET double dot_bf16_##NAME(const c10::BFloat16* a, const c10::BFloat16* b, int64_t count) {            \
    return dot_body(reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint16_t*>(b), count);     \
  }                                                                                                         \
  TARGET double dot_bf16_float_##NAME(const c10::BFloat16* a, const float* b, int64_t count) {              \
    return dot_body(reinterpret_cast<const uint16_t*>(a), b, count);                                        \
  }                                                                                                         \
  TARGET void add_scaled_##NAME(const float* x, float factor, int64_t count, float* out) {                  \
    add_scaled_body(x, factor, count, out);                                                                 \
  }                                                                                                         \
  TARGET void add_scaled_bf16_##NAME(const c10::BFloat16* x, float factor, int64_t count, float* out) {     \
    add_scaled_body(reinterpret_cast<const uint16_t*>(x), factor, count, out);                              \
  }                                                                                                         \
  constexpr TileKernels kKernels_##NAME{                                                                    \
      score_##NAME,                                                                                         \
      maximum_##NAME,                                                                                       \
      sum_##NAME,                                                                                           \
      backward_##NAME,                                                                                      \
      transpose_##NAME,                                                                                     \
      split_##NAME,                                                                                         \
      {dot_##NAME, dot_##NAME, add_scaled_##NAME},                                                          \
      {dot_bf16_##NAME, dot_bf16_float_##NAME, add_scaled_bf16_##NAME}};

SBK_FOR_EACH_ISA(SBK_ENTRY_POINTS)

}  // namespace

const TileKernels& tile_kernels() { return SBK_BY_ISA(kKernels_); }

}  // namespace sbert_kernels
