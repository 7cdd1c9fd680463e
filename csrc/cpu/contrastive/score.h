// First phase: similarities of a tile of rows with all columns, and their softmax statistics.
//
//   s_ij = (r_i . c_j) / (|r_i| |c_j|), exclusions at -inf
//   l_i = sum_j exp(z_ij - shift_i), z = scale s (+ hardness s)
//
// Where the logits are bounded, one shift serves all rows and is known beforehand. A tile with rows whose sums vanish
// so far from the bound is scored again, with their largest logits as their shifts, which are found along the way.
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "rows.h"
#include "workspace.h"

namespace sbert_kernels {

constexpr float kExcluded = -std::numeric_limits<float>::infinity();

template <class P>
class Scoring {
  using Element = typename P::Element;
  using Columns = Operand<P>;

 public:
  Scoring(Workspace<P>& work, BlockRows& rows, int64_t begin, int64_t count)
      : work_(work), problem_(work.problem), rows_(rows), begin_(begin), count_(count) {
    const int64_t width = work.tile_rows;
    for (auto& pack : packs_) pack = buffer<Element>(work.queries.packed_size(width));
    for (auto& dots : {&dots_, &guide_dots_, &scores_}) *dots = buffer<float>(kTileColumns * width);
    if (problem_.guide_queries.data) {
      for (auto& pack : guide_packs_) pack = buffer<float>(work.guide_queries.packed_size(width));
    }
  }

  // Similarities and softmax statistics of a tile of rows.
  void run(int64_t index) {
    const RowTile tile = work_.row_tile(index, begin_, count_);
    pack(tile);
    find_maxima_ = !problem_.shift;
    std::fill_n(rows_.own_shift.data() + tile.offset, tile.padded, static_cast<char>(find_maxima_));
    score(tile);
    if (problem_.least_sum > 0 && rows_.give_own_shifts(tile.offset, tile.offset + tile.count)) {
      find_maxima_ = true;
      score(tile);
    }
  }

 private:
  void score(const RowTile& tile) {
    rows_.reset(tile.offset, tile.offset + tile.padded);
    size_t pair = 0;
    for (size_t term = 0; term < problem_.terms.size(); ++term) {
      const int64_t columns = problem_.terms[term].columns;
      for_each_pair(
          problem_, problem_.terms[term], pair, tile,
          [&](const RowPair& entry, const auto* r, const auto* c) { score_pair(problem_.terms[term], entry, r, c); });
      for (int64_t column = 0; column < columns; column += kTileColumns) {
        score_tile(term, pair, tile, column, std::min(kTileColumns, columns - column));
      }
      pair += problem_.terms[term].pairs.size();
    }
  }

  void pack(const RowTile& tile) {
    const bool guided = problem_.guide_queries.data;
    bool used[2] = {guided, false};
    for (const Term& term : problem_.terms) used[term.rows_are_queries ? 0 : 1] = true;
    if (used[0]) work_.queries.pack_transposed(tile.first, tile.count, tile.padded, packs_[0].get());
    const int64_t document = problem_.row_offset + tile.first;
    if (used[1]) work_.documents.pack_transposed(document, tile.count, tile.padded, packs_[1].get());
    if (!guided) return;
    work_.guide_queries.pack_transposed(tile.first, tile.count, tile.padded, guide_packs_[0].get());
    if (used[1]) work_.guide_documents.pack_transposed(document, tile.count, tile.padded, guide_packs_[1].get());
    // The guide's similarity of the pairs, out of the product that scores all others: a copy of the positive
    // ties with it, whatever the product rounds to.
    guide_tile(problem_.guide_queries, work_.guide_documents, document, tile.count, tile, 0);
    for (int64_t i = 0; i < tile.count; ++i) {
      const float positive =
          guide_dots_[i * tile.padded + i] * guide_inverse_[i] * problem_.guide_documents.inverse_norm[document + i];
      const double slack = problem_.guide_margin + problem_.guide_relative_margin * std::fabs(positive);
      // A few units in the last place are a tie, as they are where stock computes both by the same sum.
      threshold_[i] = static_cast<float>(positive - slack + 8 * std::numeric_limits<float>::epsilon());
    }
    std::fill(threshold_ + tile.count, threshold_ + tile.padded, std::numeric_limits<float>::infinity());
  }

  void guide_tile(
      const Vectors& rows, const Operand<Float32Products>& columns, int64_t column, int64_t count, const RowTile& tile,
      int64_t role) {
    const Slice& slice = work_.guide_slices[0];
    work_.row_inverse(rows, 0, role ? problem_.row_offset + tile.first : tile.first, tile, guide_inverse_);
    // [columns, G] @ [G, rows] -> [columns, rows]
    multiply<Float32Products>(
        count, tile.padded, slice.width, columns.left(column, slice), columns.ld(),
        columns.packed(guide_packs_[role].get(), tile.padded, slice), tile.padded, guide_dots_.get(), tile.padded,
        false);
  }

  void score_tile(size_t index, size_t first_pair, const RowTile& tile, int64_t column, int64_t count) {
    const Term& term = problem_.terms[index];
    const Vectors& rows = problem_.rows_of(term);
    const Vectors& columns = problem_.columns_of(term);
    const Columns& operand = work_.columns_of(term);
    const int64_t role = term.rows_are_queries ? 0 : 1;
    const TileDuplicates duplicates(problem_, term, tile, column);
    const Vectors& guide_columns = term.columns_are_queries ? problem_.guide_queries : problem_.guide_documents;
    if (term.guided) {
      guide_tile(
          role ? problem_.guide_documents : problem_.guide_queries,
          term.columns_are_queries ? work_.guide_queries : work_.guide_documents, column, count, tile, role);
    }
    for (int64_t prefix = 0; prefix < work_.prefixes; ++prefix) {
      const Slice& slice = problem_.slices[prefix];
      // [columns, slice] @ [slice, rows] -> [columns, rows], added to that of the narrower prefixes
      multiply<P>(
          count, tile.padded, P::kPaired ? slice.padded_width : slice.width, operand.left(column, slice), operand.ld(),
          operand.packed(packs_[role].get(), tile.padded, slice), tile.padded, dots_.get(), tile.padded, prefix > 0);

      const bool kept = problem_.want_gradient;
      float* scores = kept ? work_.scores_of(index, prefix, column, tile) : scores_.get();
      const int64_t ld = kept ? work_.tile_rows : tile.padded;
      work_.row_inverse(rows, prefix, problem_.first_row(term) + tile.first, tile, inverse_);
      std::fill_n(duplicate_counts_, tile.padded, 0.0f);
      std::fill_n(duplicate_scores_, tile.padded, 0.0f);
      tile_kernels().score(
          {dots_.get(), scores, ld, count, tile.padded, inverse_,
           columns.inverse_norm.data() + prefix * columns.rows + column, duplicates.view, duplicate_counts_,
           duplicate_scores_, term.guided ? guide_dots_.get() : nullptr, guide_inverse_,
           term.guided ? guide_columns.inverse_norm.data() + column : nullptr, threshold_});
      exclude_diagonals(term, first_pair, tile, column, count, scores, ld, duplicates.view);
      if (duplicates.view.row_ids && duplicates.view.positive) {
        for (int64_t i = 0; i < tile.count; ++i) {
          if (prefix == 0) rows_.duplicate_counts[term.softmax * rows_.ld + tile.offset + i] += duplicate_counts_[i];
          rows_.duplicate_scores[rows_.statistic(term.softmax, prefix) + tile.offset + i] += duplicate_scores_[i];
        }
      }
      add_statistics(
          term, prefix, tile,
          {scores, ld, count, tile.padded, work_.logit_factor(term, term.hard_everywhere),
           work_.logit_factor(term, false), duplicates.view, maxima_, nullptr, sums_});
    }
  }

  void exclude_diagonals(
      const Term& term, size_t pair, const RowTile& tile, int64_t column, int64_t count, float* scores, int64_t ld,
      const Duplicates& duplicates) {
    // Entries (i, start + first + i) of the tile's rows that lie in its columns: i from begin to end.
    const auto range = [&](int64_t start) {
      const int64_t to_column = start + tile.first - column;  // of row 0, in the tile
      return std::pair(std::max<int64_t>(0, -to_column), std::min(tile.count, count - to_column));
    };
    for (const Diagonal& diagonal : term.pairs) {
      const auto [begin, end] = range(diagonal.start);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = diagonal.start + tile.first + i - column;
        float& score = scores[j * ld + i];
        const bool duplicate =
            duplicates.row_ids && i != duplicates.own_row + j && duplicates.row_ids[i] == duplicates.column_ids[j];
        char& live = rows_.pair_live[pair * rows_.ld + tile.offset + i];
        // A hard negative that something else excludes is no pair, and one that is a positive stays in the tile.
        if (!diagonal.positive && (duplicate || score == kExcluded)) {
          live = 0;
        } else {
          score = kExcluded;
        }
      }
      ++pair;
    }
    for (const int64_t start : term.excluded) {
      const auto [begin, end] = range(start);
      for (int64_t i = begin; i < end; ++i) scores[(start + tile.first + i - column) * ld + i] = kExcluded;
    }
  }

  void add_statistics(const Term& term, int64_t prefix, const RowTile& tile, StatisticsTile statistics) {
    const int64_t at = rows_.statistic(term.softmax, prefix) + tile.offset;
    if (find_maxima_) {
      std::fill_n(maxima_, tile.padded, kExcluded);
      tile_kernels().maximum(statistics);
      for (int64_t i = 0; i < tile.count; ++i) rows_.raise_shift(term.softmax, prefix, tile.offset + i, maxima_[i]);
    }
    std::fill_n(sums_, tile.padded, 0.0f);
    statistics.shift = rows_.shift.data() + at;
    tile_kernels().sum(statistics);
    for (int64_t i = 0; i < tile.count; ++i) rows_.sums[at + i] += sums_[i];
  }

  // Similarity of a pair, from its own dot product.
  template <class T>
  void score_pair(const Term& term, const RowPair& entry, const T* r, const T* c) {
    const Vectors& rows = problem_.rows_of(term);
    const Vectors& columns = problem_.columns_of(term);
    double dot = 0;
    for (int64_t prefix = 0; prefix < work_.prefixes; ++prefix) {
      const Slice& slice = problem_.slices[prefix];
      dot += tile_kernels().of<T>().dot(r + slice.begin, c + slice.begin, slice.width);
      rows_.pair_scores[rows_.pair(entry.pair, prefix) + entry.at] =
          dot * rows.inverse_norm[prefix * rows.rows + entry.row] *
          columns.inverse_norm[prefix * columns.rows + entry.column];
    }
  }

  Workspace<P>& work_;
  Problem& problem_;
  BlockRows& rows_;
  const int64_t begin_, count_;
  bool find_maxima_ = false;
  Buffer<Element> packs_[2];  // of queries, documents: [dimensions, rows]
  Buffer<float> guide_packs_[2];
  Buffer<float> dots_, guide_dots_, scores_;  // [columns, rows]
  float inverse_[kMaxTileRows], guide_inverse_[kMaxTileRows], threshold_[kMaxTileRows], maxima_[kMaxTileRows],
      sums_[kMaxTileRows], duplicate_counts_[kMaxTileRows], duplicate_scores_[kMaxTileRows];
};

}  // namespace sbert_kernels
