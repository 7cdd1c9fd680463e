// The pairwise operation: similarities of rows x_i and y_i, and the gradients of both rows from those of the scores.
//
// Formulas and symbols as in backends/blockwise/pairwise.py: x = a + ib and y = c + id for the halves of the rows.
// Forward and backward read each row once from memory: what the gradients need of the forward pass are four sums over
// two rows that the backward pass has in its cache anyway. Sums are double, gradients are float (double for double
// rows).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/isa.h"
#include "../common/memory.h"
#include "../common/parallel.h"

namespace sbert_kernels {
namespace {

using at::Tensor;

constexpr double kEps = 1e-12;  // the least norm

struct Sums {
  double xx = 0, yy = 0, xy = 0;  // x . x, y . y, x . y
  double sine = 0;                // b . c - a . d
};

// A gradient of a row: direct * other + rotated * (i other) - radial * own.
struct Combination {
  double direct, rotated, radial;
};

// bf16 rows are computed with as float.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
SBK_INLINE Sums sums_body(const T* x, const T* y, int64_t dimension) {
  double xx = 0, yy = 0, xy = 0;
#pragma omp simd reduction(+ : xx, yy, xy)
  for (int64_t i = 0; i < dimension; ++i) {
    const double a = to_float(x[i]), c = to_float(y[i]);
    xx += a * a;
    yy += c * c;
    xy += a * c;
  }
  return {xx, yy, xy, 0};
}

template <class T>
SBK_INLINE Sums angle_sums_body(const T* x, const T* y, int64_t dimension) {
  const int64_t half = (dimension + 1) / 2, whole = dimension - half;  // whole: components with both parts
  double xx = 0, yy = 0, xy = 0, sine = 0;
#pragma omp simd reduction(+ : xx, yy, xy, sine)
  for (int64_t i = 0; i < whole; ++i) {
    const double a = to_float(x[i]), b = to_float(x[half + i]), c = to_float(y[i]), d = to_float(y[half + i]);
    xx += a * a + b * b;
    yy += c * c + d * d;
    xy += a * c + b * d;
    sine += b * c - a * d;
  }
  if (whole < half) {
    const double a = to_float(x[whole]), c = to_float(y[whole]);
    xx += a * a;
    yy += c * c;
    xy += a * c;
  }
  return {xx, yy, xy, sine};
}

// out = or += the combination; `out` does not overlap the rows.
template <bool Add, class T>
SBK_INLINE void combine_body(
    const T* other, const T* own, int64_t dimension, const Combination& by, Real<T>* SBK_RESTRICT out) {
  using R = Real<T>;
  const R direct = static_cast<R>(by.direct), rotated = static_cast<R>(by.rotated), radial = static_cast<R>(by.radial);
  if (by.rotated == 0 && by.radial == 0) {  // of dot products: free of the row's own infinities
#pragma omp simd
    for (int64_t i = 0; i < dimension; ++i) {
      const R value = direct * to_float(other[i]);
      out[i] = Add ? out[i] + value : value;
    }
    return;
  }
  if (by.rotated == 0) {
#pragma omp simd
    for (int64_t i = 0; i < dimension; ++i) {
      const R value = direct * to_float(other[i]) - radial * to_float(own[i]);
      out[i] = Add ? out[i] + value : value;
    }
    return;
  }
  const int64_t half = (dimension + 1) / 2, whole = dimension - half;
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) {
    const R c = to_float(other[i]), d = to_float(other[half + i]);
    const R real = (direct * c - rotated * d) - radial * to_float(own[i]);
    const R imaginary = (direct * d + rotated * c) - radial * to_float(own[half + i]);
    out[i] = Add ? out[i] + real : real;
    out[half + i] = Add ? out[half + i] + imaginary : imaginary;
  }
  if (whole < half) {
    const R value = direct * to_float(other[whole]) - radial * to_float(own[whole]);
    out[whole] = Add ? out[whole] + value : value;
  }
}

SBK_INLINE void narrow_body(const float* SBK_RESTRICT in, int64_t count, uint16_t* SBK_RESTRICT out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = round_to_bf16(in[i]);
}

template <class T>
struct RowKernels {
  Sums (*sums)(const T*, const T*, int64_t);
  Sums (*angle_sums)(const T*, const T*, int64_t);
  void (*combine)(const T*, const T*, int64_t, const Combination&, Real<T>*);
  void (*add_combination)(const T*, const T*, int64_t, const Combination&, Real<T>*);
};

#define SBK_ROW_KERNELS(NAME, TARGET, T)                                                                             \
  TARGET Sums sums_##T##_##NAME(const T* x, const T* y, int64_t d) { return sums_body(x, y, d); }                    \
  TARGET Sums angle_sums_##T##_##NAME(const T* x, const T* y, int64_t d) { return angle_sums_body(x, y, d); }        \
  TARGET void combine_##T##_##NAME(const T* y, const T* x, int64_t d, const Combination& by, Real<T>* out) {         \
    combine_body<false>(y, x, d, by, out);                                                                           \
  }                                                                                                                  \
  TARGET void add_combination_##T##_##NAME(const T* y, const T* x, int64_t d, const Combination& by, Real<T>* out) { \
    combine_body<true>(y, x, d, by, out);                                                                            \
  }                                                                                                                  \
  constexpr RowKernels<T> kRows_##T##_##NAME{                                                                        \
      sums_##T##_##NAME, angle_sums_##T##_##NAME, combine_##T##_##NAME, add_combination_##T##_##NAME};
#define SBK_ENTRY_POINTS(NAME, TARGET, AVX512) \
  SBK_ROW_KERNELS(NAME, TARGET, float)         \
  SBK_ROW_KERNELS(NAME, TARGET, double)        \
  SBK_ROW_KERNELS(NAME, TARGET, uint16_t)      \
  TARGET void narrow_##NAME(const float* in, int64_t count, uint16_t* out) { narrow_body(in, count, out); }

SBK_FOR_EACH_ISA(SBK_ENTRY_POINTS)

template <class T>
const RowKernels<T>& row_kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return SBK_BY_ISA(kRows_float_);
  } else if constexpr (std::is_same_v<T, double>) {
    return SBK_BY_ISA(kRows_double_);
  } else {
    return SBK_BY_ISA(kRows_uint16_t_);
  }
}

// Rows of a matrix whose row stride is free, 0 for one row that stands for all.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;
  T* operator[](int64_t row) const { return data + row * stride; }
};

template <class T>
Rows<const T> rows_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0)};
}

struct Shape {
  int64_t rows, dimension;
};

// Calls function(begin, end) for ranges of all rows, in parallel.
template <class Function>
void for_rows(const Shape& shape, const Function& function) {
  const int64_t step = std::max<int64_t>(1, (int64_t{1} << 15) / shape.dimension);
  parallel((shape.rows + step - 1) / step, [&](const auto& next_task) {
    for (int64_t task; (task = next_task()) >= 0;) function(task * step, std::min(shape.rows, (task + 1) * step));
  });
}

// Has a row on its way into the cache while those before it are computed with: the halves of an embedding, read side by
// side, are streams too short for the hardware to see.
template <class T>
void prefetch(const Rows<const T>& rows, int64_t row, const Shape& shape) {
#if defined(__GNUC__)
  constexpr int64_t kLine = 64 / sizeof(T), kAhead = 2;
  if (row + kAhead >= shape.rows) return;
  for (int64_t i = 0; i < shape.dimension; i += kLine) __builtin_prefetch(rows[row + kAhead] + i);
#endif
}

// What scores and gradients of one pair share.
struct Pair {
  double inverse_x, inverse_y;  // 1 / norm
  bool norm_x, norm_y;          // whether a gradient flows through the norm: below eps the divisor is a constant
  double dot, cos, signed_angle;

  explicit Pair(const Sums& sums) : dot(sums.xy) {
    const double x = std::sqrt(sums.xx), y = std::sqrt(sums.yy);
    norm_x = !(x < kEps);
    norm_y = !(y < kEps);
    inverse_x = 1 / (norm_x ? x : kEps);
    inverse_y = 1 / (norm_y ? y : kEps);
    cos = sums.xy * inverse_x * inverse_y;
    signed_angle = cos + sums.sine * inverse_x * inverse_y;
  }
};

template <class T, class Score>
void score(const Shape& shape, Rows<const T> x, Rows<const T> y, bool angles, Score* cos, Score* dot, Score* angle) {
  const auto& kernels = row_kernels<T>();
  const auto sums = angles ? kernels.angle_sums : kernels.sums;
  for_rows(shape, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      prefetch(x, i, shape);
      prefetch(y, i, shape);
      const Pair pair(sums(x[i], y[i], shape.dimension));
      if (cos) cos[i] = static_cast<Score>(pair.cos);
      if (dot) dot[i] = static_cast<Score>(pair.dot);
      if (angle) angle[i] = static_cast<Score>(std::fabs(pair.signed_angle));
    }
  });
}

// A row of a gradient while it is computed: in its place, or beside it where that is bf16.
template <class T>
struct OutputRow {
  Array<float> buffer;
  explicit OutputRow(int64_t dimension) {
    if constexpr (std::is_same_v<T, uint16_t>) buffer.resize(dimension);
  }
  Real<T>* at(T* place) {
    if constexpr (std::is_same_v<T, uint16_t>) {
      return buffer.data();
    } else {
      return place;
    }
  }
  void write(T* place, int64_t dimension) const {
    if constexpr (std::is_same_v<T, uint16_t>) SBK_BY_ISA(narrow_)(buffer.data(), dimension, place);
  }
};

// Gradients of the scores of a column; null where there are none.
template <class Score>
struct ScoreGradients {
  const Score *cos, *dot, *angle;
};

template <class T, class Score>
void gradients(
    const Shape& shape, Rows<const T> x, const std::vector<Rows<const T>>& columns, const ScoreGradients<Score>& scores,
    Rows<T> x_gradient, const std::vector<Rows<T>>& column_gradients) {
  const auto& kernels = row_kernels<T>();
  const auto sums = scores.angle ? kernels.angle_sums : kernels.sums;
  const bool normed = scores.cos || scores.angle;
  for_rows(shape, [&](int64_t begin, int64_t end) {
    OutputRow<T> x_row(shape.dimension), y_row(shape.dimension);
    for (int64_t i = begin; i < end; ++i) {
      prefetch(x, i, shape);
      for (size_t column = 0; column < columns.size(); ++column) {
        prefetch(columns[column], i, shape);
        const T* y = columns[column][i];
        const Pair pair(sums(x[i], y, shape.dimension));
        const int64_t at = static_cast<int64_t>(column) * shape.rows + i;
        const double by_cos = scores.cos ? scores.cos[at] : 0, by_dot = scores.dot ? scores.dot[at] : 0;
        const double t = pair.signed_angle, sign = (t > 0) - (t < 0);
        const double by_t = scores.angle ? (std::isnan(t) ? t : sign) * scores.angle[at] : 0;
        const double inverse = normed ? pair.inverse_x * pair.inverse_y : 0;
        const double rotated = by_t * inverse, direct = by_dot + by_cos * inverse + rotated;
        const double radial = (scores.cos ? by_cos * pair.cos : 0) + (scores.angle ? by_t * t : 0);
        if (x_gradient.data) {
          const double own = normed && pair.norm_x ? radial * pair.inverse_x * pair.inverse_x : 0;
          Real<T>* out = x_row.at(x_gradient[i]);
          (column == 0 ? kernels.combine : kernels.add_combination)(
              y, x[i], shape.dimension, {direct, rotated, own}, out);
        }
        if (column_gradients[column].data) {
          const double own = normed && pair.norm_y ? radial * pair.inverse_y * pair.inverse_y : 0;
          T* place = column_gradients[column][i];
          kernels.combine(x[i], y, shape.dimension, {direct, -rotated, own}, y_row.at(place));
          y_row.write(place, shape.dimension);
        }
      }
      if (x_gradient.data) x_row.write(x_gradient[i], shape.dimension);
    }
  });
}

Shape checked(const Tensor& x, at::TensorList columns) {
  for (size_t column = 0; column <= columns.size(); ++column) {
    const Tensor& rows = column == 0 ? x : columns[column - 1];
    TORCH_CHECK(
        rows.device().is_cpu() && rows.dim() == 2 && rows.sizes() == x.sizes() &&
            rows.scalar_type() == x.scalar_type() && (rows.stride(1) == 1 || rows.size(1) == 1 || rows.size(0) == 0),
        "embeddings must be CPU matrices ", x.sizes(), " of ", x.scalar_type(), " with contiguous rows, got ",
        rows.toString(), rows.sizes(), " with strides ", rows.strides());
  }
  TORCH_CHECK(!columns.empty() && x.size(1) > 0, "embeddings must have columns and dimensions");
  return {x.size(0), x.size(1)};
}

// Calls with (element, score type) of a dtype.
template <class Function>
void dispatch(at::ScalarType dtype, const Function& function) {
  switch (dtype) {
    case at::kFloat:
      return function(float{}, float{});
    case at::kDouble:
      return function(double{}, double{});
    case at::kBFloat16:
      return function(uint16_t{}, float{});
    default:
      TORCH_CHECK(false, "embeddings must be float64, float32 or bfloat16, got ", dtype);
  }
}

// The scores of cos, dot and angle, [columns * n] each where wanted.
std::tuple<Tensor, Tensor, Tensor> pairwise_op(const Tensor& x, at::TensorList columns, std::array<bool, 3> wanted) {
  const Shape shape = checked(x, columns);
  const auto options = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  std::array<Tensor, 3> scores;
  for (size_t i = 0; i < 3; ++i) {
    scores[i] = at::empty({wanted[i] ? shape.rows * static_cast<int64_t>(columns.size()) : 0}, options);
  }
  dispatch(x.scalar_type(), [&](auto element, auto result) {
    using T = decltype(element);
    using Score = decltype(result);
    for (size_t column = 0; column < columns.size(); ++column) {
      const auto out = [&](size_t i) -> Score* {
        return wanted[i] ? scores[i].mutable_data_ptr<Score>() + column * shape.rows : nullptr;
      };
      score<T, Score>(shape, rows_of<T>(x), rows_of<T>(columns[column]), wanted[2], out(0), out(1), out(2));
    }
  });
  return {scores[0], scores[1], scores[2]};
}

// Gradients of x and of each column, empty where not needed, from those of the scores.
std::vector<Tensor> pairwise_backward_op(
    const Tensor& x, at::TensorList columns, const std::optional<Tensor>& cos, const std::optional<Tensor>& dot,
    const std::optional<Tensor>& angle, c10::List<bool> needs) {
  const Shape shape = checked(x, columns);
  TORCH_CHECK(needs.size() == columns.size() + 1, "needs must have a value for x and each column");
  const at::ScalarType score_type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const auto& gradient : {cos, dot, angle}) {
    TORCH_CHECK(
        !gradient ||
            (gradient->device().is_cpu() && gradient->is_contiguous() && gradient->scalar_type() == score_type &&
             gradient->numel() == shape.rows * static_cast<int64_t>(columns.size())),
        "gradients of scores must be contiguous ", score_type, " of one a pair");
  }
  std::vector<Tensor> results;
  for (size_t i = 0; i < needs.size(); ++i) {
    const bool need = needs.get(i);
    results.push_back(at::empty({need ? shape.rows : 0, shape.dimension}, x.options()));
    advise_huge_pages(results.back());
  }
  dispatch(x.scalar_type(), [&](auto element, auto result) {
    using T = decltype(element);
    using Score = decltype(result);
    const auto place = [&](size_t i) -> Rows<T> {
      if (!needs.get(i)) return {};
      return {static_cast<T*>(results[i].mutable_data_ptr()), shape.dimension};
    };
    const auto of = [](const std::optional<Tensor>& gradient) -> const Score* {
      return gradient ? gradient->const_data_ptr<Score>() : nullptr;
    };
    std::vector<Rows<const T>> rows;
    std::vector<Rows<T>> places;
    for (size_t column = 0; column < columns.size(); ++column) {
      rows.push_back(rows_of<T>(columns[column]));
      places.push_back(place(column + 1));
    }
    gradients<T, Score>(shape, rows_of<T>(x), rows, {of(cos), of(dot), of(angle)}, place(0), places);
  });
  return results;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sbert_kernels, library) {
  library.def("pairwise(Tensor x, Tensor[] columns, bool[3] wanted) -> (Tensor, Tensor, Tensor)");
  library.def(
      "pairwise_backward(Tensor x, Tensor[] columns, Tensor? cos, Tensor? dot, Tensor? angle, bool[] needs) -> "
      "Tensor[]");
}

TORCH_LIBRARY_IMPL(sbert_kernels, CPU, library) {
  library.impl("pairwise", Operator<pairwise_op>::call);
  library.impl("pairwise_backward", Operator<pairwise_backward_op>::call);
}

}  // namespace sbert_kernels
