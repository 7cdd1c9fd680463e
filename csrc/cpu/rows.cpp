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
      pairs_.push_back({term.group, diagonal.positive, problem.scale + (diagonal.weighted ? problem.hardness : 0.0)});
    }
  }
  const int64_t statistics = problem.groups * prefixes_ * ld;
  const int64_t pairs = static_cast<int64_t>(pairs_.size());
  for (auto* values : {&maxima, &shift, &softmax_coefficient, &positive_share}) values->resize(statistics);
  for (auto* values : {&sums, &duplicate_scores}) values->resize(statistics);
  duplicate_counts.resize(problem.groups * ld);
  for (auto* values : {&pair_scores, &pair_gradient}) values->resize(pairs * prefixes_ * ld);
  pair_live.resize(pairs * ld);
  losses.resize(ld);
}

void BlockRows::reset(int64_t first, int64_t last) {
  const auto fill = [&](auto& values, auto value) {
    for (size_t begin = 0; begin < values.size(); begin += ld) {
      std::fill(values.begin() + begin + first, values.begin() + begin + last, value);
    }
  };
  fill(maxima, kLowest);
  fill(shift, 0.0f);
  for (auto* values : {&sums, &duplicate_counts, &duplicate_scores, &losses}) fill(*values, 0.0);
  // Rows that only pad a tile keep these, so that their gradients are zero.
  fill(softmax_coefficient, 0.0f);
  fill(positive_share, 0.0f);
  fill(pair_live, char{1});
}

void BlockRows::raise_shift(int64_t group, int64_t prefix, int64_t row, float maximum) {
  const int64_t at = statistic(group, prefix) + row;
  if (!(maximum > maxima[at])) return;
  maxima[at] = maximum;
  const float before = shift[at];
  shift[at] = shift_of(maximum);
  if (sums[at] != 0) sums[at] *= std::exp(static_cast<double>(before) - shift[at]);
}

void BlockRows::finish(int64_t row, double share) {
  for (int64_t group = 0; group < problem_.groups; ++group) {
    for (int64_t prefix = 0; prefix < prefixes_; ++prefix) {
      finish_softmax(row, group, prefix, share);
    }
  }
}

void BlockRows::finish_softmax(int64_t row, int64_t group, int64_t prefix, double share) {
  const int64_t at = statistic(group, prefix) + row;
  const auto in_softmax = [&](size_t k) { return pairs_[k].group == group && pair_live[k * ld + row]; };
  const auto logit = [&](size_t k) { return pairs_[k].factor * pair_scores[pair(k, prefix) + row]; };

  if (!problem_.bounded) {
    for (size_t k = 0; k < pairs_.size(); ++k) {
      if (in_softmax(k)) raise_shift(group, prefix, row, static_cast<float>(logit(k)));
    }
  }
  const double shift_value = shift[at], others = sums[at];
  const auto exponential = [&](size_t k) { return std::exp(logit(k) - shift_value); };
  // Sum without pair k: the others, not the total less the own part, which is nearly all of it in a trained model.
  const auto rest_of = [&](size_t k) {
    double rest = others;
    for (size_t other = 0; other < pairs_.size(); ++other) {
      if (other != k && in_softmax(other)) rest += exponential(other);
    }
    return rest;
  };

  double total = others, count = duplicate_counts[group * ld + row];
  double positive_logits = problem_.scale * duplicate_scores[at];
  size_t own = pairs_.size();  // the first positive
  for (size_t k = 0; k < pairs_.size(); ++k) {
    if (!in_softmax(k)) continue;
    total += exponential(k);
    if (pairs_[k].positive) {
      if (own == pairs_.size()) own = k;
      count += 1;
      positive_logits += logit(k);
    }
  }
  const double own_logit = logit(own);
  // log(total) - own_logit, exact where the others are few or far below.
  const double excess = own_logit - shift_value > -600 ? std::log1p(rest_of(own) / exponential(own))
                                                       : shift_value + std::log(total) - own_logit;
  const double weight = problem_.dim_weights[prefix] / static_cast<double>(problem_.groups);
  losses[row] += weight * (excess + (own_logit - positive_logits / count));
  if (!problem_.want_gradient) return;

  const double strength = share * weight * problem_.scale;
  softmax_coefficient[at] = static_cast<float>(strength / total);
  positive_share[at] = static_cast<float>(strength / count);
  for (size_t k = 0; k < pairs_.size(); ++k) {
    double& gradient = pair_gradient[pair(k, prefix) + row];
    if (!in_softmax(k)) {
      if (pairs_[k].group == group) gradient = 0;
    } else if (!pairs_[k].positive) {
      gradient = strength * (exponential(k) / total);
    } else if (std::isinf(total)) {
      // An infinite logit leaves the own pair no share, which the exact form would compute as 0 * inf.
      gradient = strength * (exponential(k) / total - 1 / count);
    } else {
      gradient = strength * (((count - 1) * exponential(k) - rest_of(k)) / (count * total));
    }
  }
}

}  // namespace sbert_kernels
