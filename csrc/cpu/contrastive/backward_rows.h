// Second phase: gradients of the similarities of a tile of rows, in their place, and of the rows.
//
//   g_ij = exp(z_ij - shift_i) share_i scale / l_i                gradient of s_ij
//   h_ij = g_ij / (|r_i| |c_j|), summed over the prefixes that hold a slice, from the widest down
//   dr_i += sum_j h_ij c_j                                        slice by slice
#pragma once

#include <array>

#include "rows.h"
#include "workspace.h"

namespace sbert_kernels {

template <class P>
class BackwardRows {
  using Element = typename P::Element;
  using Columns = Operand<P>;

 public:
  BackwardRows(Workspace<P>& work, BlockRows& rows, int64_t begin, int64_t count)
      : work_(work), problem_(work.problem), rows_(rows), begin_(begin), count_(count) {
    weights_ = buffer<float>(kTileColumns * work.tile_rows);
    transposed_ = buffer<float>(kTileColumns * work.tile_rows);
    if constexpr (P::kPaired) {
      for (auto& part : left_) part = buffer<Element>(kTileColumns * work.tile_rows);
      panel_ = buffer<Element>(work.queries.panel_size(kTileColumns));
    }
    radial_.resize(work.prefixes * work.tile_rows);
  }

  // Gradients of a tile of rows; leaves those of the similarities in place of the similarities.
  void run(int64_t index) {
    const RowTile tile = work_.row_tile(index, begin_, count_);
    if constexpr (P::kPaired) {
      for (const Term& term : problem_.terms) {
        if (!problem_.columns_of(term).gradient) continue;
        work_.rows_of(term).fill_panel(
            problem_.first_row(term) + tile.first, tile.count, work_.row_panel(term, tile.index));
      }
    }
    size_t pair = 0;
    for (size_t term = 0; term < problem_.terms.size(); ++term) {
      std::fill(radial_.begin(), radial_.end(), 0.0);
      const int64_t columns = problem_.terms[term].columns;
      for (int64_t column = 0; column < columns; column += kTileColumns) {
        backward_tile(term, tile, column, std::min(kTileColumns, columns - column));
      }
      add_radial(problem_.terms[term], tile);
      for_each_pair(
          problem_, problem_.terms[term], pair, tile,
          [&](const RowPair& entry, const auto* r, const auto* c) { add_pair(problem_.terms[term], entry, r, c); });
      pair += problem_.terms[term].pairs.size();
    }
  }

 private:
  void backward_tile(size_t index, const RowTile& tile, int64_t column, int64_t count) {
    const Term& term = problem_.terms[index];
    const Vectors& rows = problem_.rows_of(term);
    const Vectors& columns = problem_.columns_of(term);
    const TileDuplicates duplicates(problem_, term, tile, column);
    bool fill = true;
    for (int64_t prefix = work_.prefixes - 1; prefix >= 0; --prefix) {
      float* scores = work_.scores_of(index, prefix, column, tile);
      const int64_t ld = work_.tile_rows;
      // float weights replace the similarities that they come from; in pairs of bf16 they pass through a buffer.
      float* weights = P::kPaired ? weights_.get() : scores;
      const int64_t weights_ld = P::kPaired ? tile.padded : ld;
      const float* wider = nullptr;
      if (prefix + 1 < work_.prefixes) {
        wider = P::kPaired ? weights_.get() : work_.scores_of(index, prefix + 1, column, tile);
      }
      work_.row_inverse(rows, prefix, problem_.first_row(term) + tile.first, tile, inverse_);
      std::fill_n(sums_, tile.padded, 0.0f);
      const int64_t at = rows_.statistic(term.softmax, prefix) + tile.offset;
      tile_kernels().backward(
          {scores, wider, weights, ld, weights_ld, weights_ld, count, tile.padded,
           work_.logit_factor(term, term.hard_everywhere), work_.logit_factor(term, false), duplicates.view,
           rows_.shift.data() + at, rows_.softmax_coefficient.data() + at, rows_.positive_share.data() + at, inverse_,
           columns.inverse_norm.data() + prefix * columns.rows + column, sums_,
           work_.column_sums_of(index, prefix, tile.index) + column});
      for (int64_t i = 0; i < tile.count; ++i) radial_[prefix * work_.tile_rows + i] += sums_[i];

      if constexpr (P::kPaired) {
        if (columns.gradient) {
          for (int64_t j = 0; j < count; ++j) {
            auto* high = reinterpret_cast<Element*>(scores + j * ld);
            // The row that completes the last pair: with an infinite column its weight is 0 x inf.
            if (tile.count < tile.padded) weights[j * weights_ld + tile.count] = 0;
            tile_kernels().split(
                weights + j * weights_ld, tile.padded, high, P::kParts == 2 ? high + tile.padded : nullptr);
          }
        }
      }
      if (rows.gradient) {
        add_to_rows(term, tile, column, count, prefix, weights, weights_ld, fill);
        fill = false;
      }
    }
  }

  void add_to_rows(
      const Term& term, const RowTile& tile, int64_t column, int64_t count, int64_t prefix, const float* weights,
      int64_t weights_ld, bool fill) {
    const Vectors& rows = problem_.rows_of(term);
    const Columns& operand = work_.columns_of(term);
    const Slice& slice = problem_.slices[prefix];
    tile_kernels().transpose(weights, weights_ld, count, tile.count, transposed_.get(), kTileColumns);
    typename Columns::Pointers left;
    int64_t depth = count;
    if constexpr (P::kPaired) {
      depth = round_up(count, 2);
      for (int64_t i = 0; i < tile.count; ++i) {
        float* row = transposed_.get() + i * kTileColumns;
        if (depth > count) row[count] = 0;
        tile_kernels().split(
            row, depth, left_[0].get() + i * kTileColumns,
            P::kParts == 2 ? left_[P::kParts - 1].get() + i * kTileColumns : nullptr);
      }
      for (int part = 0; part < P::kParts; ++part) left[part] = left_[part].get();
    } else {
      left[0] = transposed_.get();
    }
    const auto right = work_.column_panel(operand, column, count, slice, panel_.get(), fill);
    // [rows, columns] @ [columns, slice] -> [rows, slice]
    multiply<P>(
        tile.count, slice.width, depth, left, kTileColumns, right, operand.panel_ld(),
        rows.gradient + (problem_.first_row(term) + tile.first) * rows.dimension + slice.begin, rows.dimension, true);
  }

  // What flows through the norms of the rows, and to the scale.
  void add_radial(const Term& term, const RowTile& tile) {
    Vectors& rows = problem_.rows_of(term);
    for (int64_t prefix = 0; prefix < work_.prefixes; ++prefix) {
      double* radial = rows.radial.data() + prefix * rows.rows + problem_.first_row(term) + tile.first;
      for (int64_t i = 0; i < tile.count; ++i) {
        const double sum = radial_[prefix * work_.tile_rows + i];
        radial[i] += sum;
        work_.scale_gradients[tile.first + i] += sum / problem_.scale;
      }
    }
  }

  // Gradients of a pair, which is the only one of its diagonal that touches its column.
  template <class T>
  void add_pair(const Term& term, const RowPair& entry, const T* r, const T* c) {
    Vectors& rows = problem_.rows_of(term);
    Vectors& columns = problem_.columns_of(term);
    double gradient_of_dot = 0;  // of the dot product, summed over the prefixes that hold a slice
    for (int64_t prefix = work_.prefixes - 1; prefix >= 0; --prefix) {
      const int64_t in_rows = prefix * rows.rows + entry.row, in_columns = prefix * columns.rows + entry.column;
      const double gradient = rows_.pair_gradient[rows_.pair(entry.pair, prefix) + entry.at];
      const double radial = gradient == 0 ? 0 : gradient * rows_.pair_scores[rows_.pair(entry.pair, prefix) + entry.at];
      rows.radial[in_rows] += radial;
      columns.radial[in_columns] += radial;
      work_.scale_gradients[begin_ + entry.at] += radial / problem_.scale;
      gradient_of_dot += gradient * rows.inverse_norm[in_rows] * columns.inverse_norm[in_columns];
      const float factor = static_cast<float>(gradient_of_dot);
      const Slice& slice = problem_.slices[prefix];
      const auto add_partner = [&](float* gradients, int64_t of, const T* partner) {
        tile_kernels().of<T>().add_scaled(
            partner + slice.begin, factor, slice.width, gradients + of * rows.dimension + slice.begin);
      };
      if (rows.gradient) add_partner(rows.gradient, entry.row, c);
      if (columns.gradient) add_partner(columns.gradient, entry.column, r);
    }
  }

  Workspace<P>& work_;
  Problem& problem_;
  BlockRows& rows_;
  const int64_t begin_, count_;
  Buffer<float> weights_;                        // [columns, rows]
  Buffer<float> transposed_;                     // [rows, columns]
  std::array<Buffer<Element>, P::kParts> left_;  // the same in parts
  Buffer<Element> panel_;
  Array<double> radial_;  // [P, rows]
  float inverse_[kMaxTileRows], sums_[kMaxTileRows];
};

}  // namespace sbert_kernels
