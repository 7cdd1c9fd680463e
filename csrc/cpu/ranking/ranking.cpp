// The ranking operation: log(1 + sum over l_i < l_j of w_i w_j exp(z_i - z_j)) for z = scale * score, and its
// gradients.
//
// exp(z_i - z_j) = e_i / e_j for e = exp(z): by label, the sum over pairs of pairs is two running sums,
//
//     S = sum of w / e over the higher labels,   pull_i = e_i S     # from the top
//     P = sum of w e over the lower labels,      push_i = P / e_i   # from the bottom
//     T = sum_i w_i pull_i,   loss = log(1 + T),   dz_i = w_i (pull_i - push_i) / (1 + T),   dw_i = (pull_i + push_i) /
//     (1 + T)
//
// one exponential a pair and no logarithm but the last. All terms are positive: nothing cancels but pull - push, and a
// tiny loss keeps all its digits. Where the exponents of e fit into a double that is what e is; else it has its own.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <utility>

#include "order.h"

namespace sbert_kernels {
namespace {

using at::Tensor;

// e^600 n^2 and its inverse are normal doubles.
constexpr double kPlainRange = 600;

// The arithmetic of e in doubles. Differences of z are all that counts: `center` keeps e in the middle of the range.
struct Plain {
  using Number = double;
  double center;
  Number exp(double z) const { return std::exp(z - center); }
  static Number scaled(double weight, Number a) { return weight * a; }
  static Number over(double weight, Number a) { return weight / a; }
  static Number product(Number a, Number b) { return a * b; }
  static Number quotient(Number a, Number b) { return a / b; }
  static Number sum(Number a, Number b) { return a + b; }
  static double ratio(Number a, Number b) { return a / b; }
  static double log_of_one_more(Number a) { return std::log1p(a); }
  static Number number(double value) { return value; }
};

// The same in numbers mantissa * 2^exponent, the exponent a whole double: of any size.
struct Wide {
  struct Number {
    double mantissa, exponent;
  };
  static double power(double exponent) {
    if (exponent < -1022) return 0;
    return exponent > 1023 ? std::numeric_limits<double>::infinity() : std::ldexp(1.0, static_cast<int>(exponent));
  }
  Number exp(double z) const {
    if (!std::isfinite(z)) return {std::exp(z), 0};
    constexpr double kHigh = 6.93147180369123816490e-01, kLow = 1.90821492927058770002e-10;  // ln 2
    const double exponent = std::nearbyint(z * 1.44269504088896340736);
    // Above, doubles are farther apart than all that a remainder could tell, and it would leave the range of exp.
    if (std::fabs(z) > 1e18) return {1, exponent};
    return {std::exp(std::fma(-exponent, kLow, std::fma(-exponent, kHigh, z))), exponent};
  }
  static Number scaled(double weight, Number a) { return product(of(weight), a); }
  static Number over(double weight, Number a) { return quotient(of(weight), a); }
  static Number product(Number a, Number b) { return {a.mantissa * b.mantissa, a.exponent + b.exponent}; }
  static Number quotient(Number a, Number b) { return {a.mantissa / b.mantissa, a.exponent - b.exponent}; }
  static Number sum(Number a, Number b) {
    if (!std::isfinite(a.mantissa) || !std::isfinite(b.mantissa)) return {a.mantissa + b.mantissa, 0};
    if (a.mantissa == 0) return b;
    if (b.mantissa == 0) return a;
    const double exponent = std::max(a.exponent, b.exponent);
    return {a.mantissa * power(a.exponent - exponent) + b.mantissa * power(b.exponent - exponent), exponent};
  }
  static double ratio(Number a, Number b) {
    const double mantissa = a.mantissa / b.mantissa;
    return mantissa == 0 ? 0 : mantissa * power(a.exponent - b.exponent);
  }
  static double log_of_one_more(Number a) {
    const double value = a.mantissa * power(a.exponent);
    return std::isfinite(value) ? std::log1p(value) : std::log(a.mantissa) + a.exponent * 0.69314718055994530942;
  }
  static Number number(double value) { return {value, 0}; }
  // A weight as a number. The product of two large or tiny ones need not be a double; the usual ones stay mantissas, so
  // that they are not lost beside an exponent of 2^53.
  static Number of(double weight) {
    if (weight > 1e-100 && weight < 1e100) return {weight, 0};
    int exponent = 0;
    const double mantissa = std::frexp(weight, &exponent);
    return {mantissa, static_cast<double>(exponent)};
  }
};

// Pairs in ascending order of their labels, ties in groups.
struct Pairs {
  Array<int64_t> group_ends;
  Array<uint32_t> order;
  Array<double> z;        // [n]
  Array<double> weights;  // [n], or empty
  double weight(int64_t at) const { return weights.empty() ? 1.0 : weights[at]; }
};

struct Results {
  double loss = 0;
  Array<double> z, weights;  // [n], in the order of the labels: gradients, where wanted
};

template <class Arithmetic>
Results ranked(const Arithmetic& arithmetic, const Pairs& pairs, bool want_z, bool want_weights) {
  using Number = typename Arithmetic::Number;
  const int64_t count = static_cast<int64_t>(pairs.z.size()), groups = static_cast<int64_t>(pairs.group_ends.size());
  const auto begin = [&](int64_t group) { return group == 0 ? 0 : pairs.group_ends[group - 1]; };
  Array<Number> e(count), pull(count);
  at::parallel_for(0, count, 4096, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) e[i] = arithmetic.exp(pairs.z[i]);
  });

  const Number zero = Arithmetic::number(0);
  Number total = zero, sum = zero;
  for (int64_t group = groups - 1; group >= 0; --group) {
    const int64_t first = begin(group), last = pairs.group_ends[group];
    for (int64_t i = first; i < last; ++i) {
      // The top has nobody above: no product then, which would be none of an infinite score.
      pull[i] = group == groups - 1 ? zero : Arithmetic::product(e[i], sum);
      if (pairs.weight(i) != 0) total = Arithmetic::sum(total, Arithmetic::scaled(pairs.weight(i), pull[i]));
    }
    for (int64_t i = first; i < last; ++i) {
      if (pairs.weight(i) != 0) sum = Arithmetic::sum(sum, Arithmetic::over(pairs.weight(i), e[i]));
    }
  }
  Results results;
  results.loss = Arithmetic::log_of_one_more(total);
  if (want_z) results.z.resize(count);
  if (want_weights) results.weights.resize(count);
  if (!want_z && !want_weights) return results;

  const Number whole = Arithmetic::sum(Arithmetic::number(1), total);
  sum = zero;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = begin(group), last = pairs.group_ends[group];
    for (int64_t i = first; i < last; ++i) {
      const double pulled = Arithmetic::ratio(pull[i], whole);
      const double pushed = group == 0 ? 0 : Arithmetic::ratio(Arithmetic::quotient(sum, e[i]), whole);
      // Without weight there is no gradient, however large what it would be of.
      if (want_z) results.z[i] = pairs.weight(i) == 0 ? 0 : pairs.weight(i) * (pulled - pushed);
      if (want_weights) results.weights[i] = pulled + pushed;
    }
    for (int64_t i = first; i < last; ++i) {
      if (pairs.weight(i) != 0) sum = Arithmetic::sum(sum, Arithmetic::scaled(pairs.weight(i), e[i]));
    }
  }
  return results;
}

Results ranked(const Pairs& pairs, bool want_z, bool want_weights) {
  double least = std::numeric_limits<double>::infinity(), most = -least, weight_range = 0;
  bool defined = true;
  for (const double z : pairs.z) {
    least = std::min(least, z);
    most = std::max(most, z);
    defined &= z == z;
  }
  if (!defined) {
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    const size_t count = pairs.z.size();
    return {kNan, Array<double>(want_z ? count : 0, kNan), Array<double>(want_weights ? count : 0, kNan)};
  }
  for (const double weight : pairs.weights) {
    if (weight > 0) weight_range = std::max(weight_range, std::fabs(std::log(weight)));
  }
  if (pairs.z.empty()) least = most = 0;
  // Not for infinite ones, whose range is infinite or not a number.
  if (most - least + 2 * weight_range <= kPlainRange) {
    return ranked(Plain{least + (most - least) / 2}, pairs, want_z, want_weights);
  }
  return ranked(Wide{}, pairs, want_z, want_weights);
}

template <class Label>
void order_by(const Tensor& labels, Pairs& pairs) {
  const auto items = ordered(labels.const_data_ptr<Label>(), labels.numel());
  pairs.order.resize(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    pairs.order[i] = items[i].index;
    if (i > 0 && items[i].key != items[i - 1].key) pairs.group_ends.push_back(static_cast<int64_t>(i));
  }
  if (!items.empty()) pairs.group_ends.push_back(static_cast<int64_t>(items.size()));
}

// Values in the order of the labels.
Array<double> in_order(const Tensor& values, const Pairs& pairs, double factor) {
  Array<double> result(pairs.order.size());
  const auto fill = [&](const auto* data) {
    for (size_t i = 0; i < result.size(); ++i) result[i] = factor * static_cast<double>(data[pairs.order[i]]);
  };
  values.scalar_type() == at::kDouble ? fill(values.const_data_ptr<double>()) : fill(values.const_data_ptr<float>());
  return result;
}

Tensor back_in_place(const Array<double>& values, const Pairs& pairs, double factor, at::TensorOptions options) {
  Tensor result = at::empty({static_cast<int64_t>(values.size())}, options);
  const auto fill = [&](auto* data) {
    for (size_t i = 0; i < values.size(); ++i) {
      data[pairs.order[i]] = static_cast<std::remove_pointer_t<decltype(data)>>(factor * values[i]);
    }
  };
  result.scalar_type() == at::kDouble ? fill(result.mutable_data_ptr<double>())
                                      : fill(result.mutable_data_ptr<float>());
  return result;
}

// Loss, and the gradients of scores, scale and weights where needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> ranking_op(
    const Tensor& scores, const Tensor& labels, const std::optional<Tensor>& weights, double scale,
    std::array<bool, 3> needs) {
  const int64_t count = scores.numel();
  const auto vector = [&](const Tensor& tensor) {
    return tensor.device().is_cpu() && tensor.dim() == 1 && tensor.numel() == count && tensor.is_contiguous();
  };
  TORCH_CHECK(
      vector(scores) && (scores.scalar_type() == at::kFloat || scores.scalar_type() == at::kDouble),
      "scores must be a contiguous vector of float32 or float64, got ", scores.toString(), scores.sizes());
  TORCH_CHECK(vector(labels), "labels must be a contiguous vector of ", count, ", got ", labels.sizes());
  TORCH_CHECK(
      !weights || (vector(*weights) && weights->scalar_type() == at::kDouble),
      "weights must be a contiguous float64 vector of ", count);
  TORCH_CHECK(count <= std::numeric_limits<uint32_t>::max(), "too many pairs: ", count);

  Pairs pairs;
  switch (labels.scalar_type()) {
    case at::kFloat:
      order_by<float>(labels, pairs);
      break;
    case at::kDouble:
      order_by<double>(labels, pairs);
      break;
    case at::kLong:
      order_by<int64_t>(labels, pairs);
      break;
    default:
      TORCH_CHECK(false, "labels must be float32, float64 or int64, got ", labels.scalar_type());
  }
  pairs.z = in_order(scores, pairs, scale);
  if (weights) pairs.weights = in_order(*weights, pairs, 1.0);
  const Results results = ranked(pairs, needs[0] || needs[1], needs[2]);

  const auto options = scores.options();
  const auto scalar = [&](double value) { return at::empty({}, options).fill_(value); };
  Tensor scale_gradient = at::empty({0}, options);
  if (needs[1]) {
    const Array<double> in_label_order = in_order(scores, pairs, 1.0);
    double sum = 0;
    for (size_t i = 0; i < in_label_order.size(); ++i) sum += in_label_order[i] * results.z[i];
    scale_gradient = scalar(sum);
  }
  const Array<double> none;
  return {
      scalar(results.loss), back_in_place(needs[0] ? results.z : none, pairs, scale, options), scale_gradient,
      back_in_place(results.weights, pairs, 1.0, options)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sbert_kernels, library) {
  library.def(
      "ranking(Tensor scores, Tensor labels, Tensor? weights, float scale, bool[3] needs) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(sbert_kernels, CPU, library) { library.impl("ranking", Operator<ranking_op>::call); }

}  // namespace sbert_kernels
