// What belongs to the rows of a block: softmax statistics, pairs, and what follows from them.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"

namespace sbert_kernels {

// G softmaxes, P prefixes, K pairs (of all terms together), `ld` rows (the block's, padded).
class BlockRows {
 public:
  BlockRows(const Problem& problem, int64_t ld);

  const int64_t ld;

  // Statistics of the tiles, pairs apart.
  Array<char> own_shift;           // [ld], 1 if the shift is the row's largest logit, 0 if it is the problem's
  Array<float> maxima;             // [G, P, ld], of the logits; inf without an own shift, which then nothing raises
  Array<float> shift;              // [G, P, ld]; finish() leaves the one that softmax_coefficient is for
  Array<double> sums;              // [G, P, ld], of exp(logit - shift)
  Array<double> duplicate_counts;  // [G, ld], duplicate positives
  Array<double> duplicate_scores;  // [G, P, ld], sum of their similarities

  // Own pairs: computed row by row in double precision.
  Array<double> pair_scores;  // [K, P, ld], similarities
  Array<char> pair_live;      // [K, ld], 1 if the pair takes part in the softmax

  // What finish() makes of them.
  Array<float> softmax_coefficient;  // [G, P, ld], see WeightTile
  Array<float> positive_share;       // [G, P, ld], see WeightTile
  Array<double> pair_gradient;       // [K, P, ld], of the pairs' similarities
  Array<double> losses;              // [ld]

  int64_t statistic(int64_t softmax, int64_t prefix) const { return (softmax * prefixes_ + prefix) * ld; }
  int64_t pair(int64_t pair, int64_t prefix) const { return (pair * prefixes_ + prefix) * ld; }

  // Begins rows [first, last) of a block, each with the shift that own_shift says.
  void reset(int64_t first, int64_t last);
  // Lets a row know of a logit: moves its shift, if it is the largest so far, and its sum with it.
  void raise_shift(int64_t softmax, int64_t prefix, int64_t row, float maximum);
  // Lets those of rows [first, last) have their own shift whose sum, pairs included, is less than problem.least_sum in
  // any softmax or prefix. True if there are any.
  bool give_own_shifts(int64_t first, int64_t last);
  // Loss and gradient factors of one row, whose share in the loss is given.
  void finish(int64_t row, double share);

 private:
  bool in_softmax(size_t pair, int64_t softmax, int64_t row) const {
    return pairs_[pair].softmax == softmax && pair_live[pair * ld + row];
  }
  double logit(size_t pair, int64_t prefix, int64_t row) const {
    return pairs_[pair].factor * pair_scores[this->pair(pair, prefix) + row];
  }
  // Sum of exp(logit - shift), of all pairs but one (pairs_.size(): of all).
  double sum_without(size_t pair, int64_t softmax, int64_t prefix, int64_t row) const;
  void finish_softmax(int64_t row, int64_t softmax, int64_t prefix, double share);

  const Problem& problem_;
  const int64_t prefixes_;
  struct Pair {
    int64_t softmax;
    bool positive;
    double factor;  // logit / similarity
  };
  std::vector<Pair> pairs_;
};

}  // namespace sbert_kernels
