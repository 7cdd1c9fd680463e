#include "rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace sbert_kernels {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Of an infinite maximum the largest number: exp(x - inf) would make no number of every x.
float shift_of(float maximum) {
  return maximum == kLowest ? 0.0f : std::min(maximum, std::numeric_limits<float>::max());
}

}  // namespace

BlockRows::BlockRows(const Problem& problem, int64_t ld)
    : ld(ld), problem_(problem), prefixes_(static_cast<int64_t>(problem.slices.size())) {
  for (const Term& term : problem.terms) {
    for (const Diagonal& diagonal : term.pairs) {
      pairs_.push_back({term.softmax, diagonal.positive, problem.logit_factor(term, diagonal.hard)});
    }
  }
  const int64_t statistics = problem.softmaxes * prefixes_ * ld;
  const int64_t pairs = static_cast<int64_t>(pairs_.size());
  for (auto* values : {&maxima, &shift, &softmax_coefficient, &positive_share}) values->resize(statistics);
  for (auto* values : {&sums, &duplicate_scores}) values->resize(statistics);
  duplicate_counts.resize(problem.softmaxes * ld);
  for (auto* values : {&pair_scores, &pair_gradient}) values->resize(pairs * prefixes_ * ld);
  pair_live.resize(pairs * ld);
  own_shift.resize(ld);
  losses.resize(ld);
}

void BlockRows::reset(int64_t first, int64_t last) {
  const auto fill = [&](auto& values, auto value) {
    for (size_t begin = 0; begin < values.size(); begin += ld) {
      std::fill(values.begin() + begin + first, values.begin() + begin + last, value);
    }
  };
  for (size_t begin = 0; begin < maxima.size(); begin += ld) {
    for (int64_t row = first; row < last; ++row) {
      maxima[begin + row] = own_shift[row] ? kLowest : -kLowest;
      shift[begin + row] = own_shift[row] ? 0.0f : *problem_.shift;
    }
  }
  for (auto* values : {&sums, &duplicate_counts, &duplicate_scores, &losses}) fill(*values, 0.0);
  // Rows that only pad a tile keep these, so that their gradients are zero.
  fill(softmax_coefficient, 0.0f);
  fill(positive_share, 0.0f);
  fill(pair_live, char{1});
}

void BlockRows::raise_shift(int64_t softmax, int64_t prefix, int64_t row, float maximum) {
  const int64_t at = statistic(softmax, prefix) + row;
  if (!(maximum > maxima[at])) return;
  maxima[at] = maximum;
  const float before = shift[at];
  shift[at] = shift_of(maximum);
  if (sums[at] != 0) sums[at] *= std::exp(static_cast<double>(before) - shift[at]);
}

double BlockRows::sum_without(size_t pair, int64_t softmax, int64_t prefix, int64_t row) const {
  const int64_t at = statistic(softmax, prefix) + row;
  double sum = sums[at];
  for (size_t k = 0; k < pairs_.size(); ++k) {
    if (k != pair && in_softmax(k, softmax, row)) sum += std::exp(logit(k, prefix, row) - shift[at]);
  }
  return sum;
}

bool BlockRows::give_own_shifts(int64_t first, int64_t last) {
  bool any = false;
  for (int64_t softmax = 0; softmax < problem_.softmaxes; ++softmax) {
    for (int64_t prefix = 0; prefix < prefixes_; ++prefix) {
      for (int64_t row = first; row < last; ++row) {
        if (!(sum_without(pairs_.size(), softmax, prefix, row) < problem_.least_sum)) continue;
        own_shift[row] = 1;
        any = true;
      }
    }
  }
  return any;
}

void BlockRows::finish(int64_t row, double share) {
  for (int64_t softmax = 0; softmax < problem_.softmaxes; ++softmax) {
    for (int64_t prefix = 0; prefix < prefixes_; ++prefix) {
      finish_softmax(row, softmax, prefix, share);
    }
  }
}

void BlockRows::finish_softmax(int64_t row, int64_t softmax, int64_t prefix, double share) {
  const int64_t at = statistic(softmax, prefix) + row;
  const auto in_softmax = [&](size_t k) { return this->in_softmax(k, softmax, row); };
  const auto logit = [&](size_t k) { return this->logit(k, prefix, row); };

  for (size_t k = 0; k < pairs_.size(); ++k) {
    if (in_softmax(k)) raise_shift(softmax, prefix, row, static_cast<float>(logit(k)));
  }
  const double shift_value = shift[at];
  const auto exponential = [&](size_t k) { return std::exp(logit(k) - shift_value); };
  // Sum without pair k: the others, not the total less the part of k, which is nearly all of it in a trained model.
  const auto rest_of = [&](size_t k) { return sum_without(k, softmax, prefix, row); };

  const double total = sum_without(pairs_.size(), softmax, prefix, row);
  double count = duplicate_counts[softmax * ld + row];
  double positive_logits = problem_.scale * duplicate_scores[at];
  size_t positive = pairs_.size();  // the first positive
  for (size_t k = 0; k < pairs_.size(); ++k) {
    if (!pairs_[k].positive || !in_softmax(k)) continue;
    if (positive == pairs_.size()) positive = k;
    count += 1;
    positive_logits += logit(k);
  }
  const double positive_logit = logit(positive);
  // log(total) - positive_logit, exact where the others are few or far below.
  const double excess = positive_logit - shift_value > -600 ? std::log1p(rest_of(positive) / exponential(positive))
                                                            : shift_value + std::log(total) - positive_logit;
  const double weight = problem_.dim_weights[prefix] / static_cast<double>(problem_.softmaxes);
  losses[row] += weight * (excess + (positive_logit - positive_logits / count));
  if (!problem_.want_gradient) return;

  const double coefficient = share * weight * problem_.scale;
  positive_share[at] = static_cast<float>(coefficient / count);
  for (size_t k = 0; k < pairs_.size(); ++k) {
    double& gradient = pair_gradient[pair(k, prefix) + row];
    if (!in_softmax(k)) {
      if (pairs_[k].softmax == softmax) gradient = 0;
    } else if (!pairs_[k].positive) {
      gradient = coefficient * (exponential(k) / total);
    } else if (std::isinf(total)) {
      // An infinite logit leaves a positive no share, which the exact form would compute as 0 * inf.
      gradient = coefficient * (exponential(k) / total - 1 / count);
    } else {
      gradient = coefficient * (((count - 1) * exponential(k) - rest_of(k)) / (count * total));
    }
  }
  // The backward pass takes exp(logit - shift) anew. With a shift near the logarithm of the sum, its coefficient is
  // near the row's share, in the middle of what float holds, wherever in exp(-53) .. exp(82) the sum lies.
  if (total > 0 && std::isfinite(total)) shift[at] = static_cast<float>(shift_value + std::log(total));
  softmax_coefficient[at] = static_cast<float>(coefficient / (total * std::exp(shift_value - shift[at])));
}

}  // namespace sbert_kernels
