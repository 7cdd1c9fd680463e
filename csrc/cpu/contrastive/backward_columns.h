// Third phase: gradients of the columns, from the gradients of a block's similarities.
//
//   dc_j += sum_i h_ij r_i                                        slice by slice
#pragma once

#include <algorithm>

#include "workspace.h"

namespace sbert_kernels {

template <class P>
void backward_columns_of_term(
    Workspace<P>& work, size_t index, Vectors& columns, int64_t column, int64_t begin, int64_t count) {
  const Term& term = work.problem.terms[index];
  const Operand<P>& operand = work.rows_of(term);
  const int64_t in_tile = std::min(kTileColumns, term.columns - column);
  const int64_t tiles = (count + work.tile_rows - 1) / work.tile_rows;
  if (in_tile <= 0) return;
  for (int64_t prefix = 0; prefix < work.prefixes; ++prefix) {
    const Slice& slice = work.problem.slices[prefix];
    for (int64_t t = 0; t < tiles; ++t) {
      const RowTile tile = work.row_tile(t, begin, count);
      double* radial = columns.radial.data() + prefix * columns.rows + column;
      const float* sums = work.column_sums_of(index, prefix, t) + column;
      for (int64_t j = 0; j < in_tile; ++j) radial[j] += sums[j];
      if (!columns.gradient) continue;
      typename Operand<P>::Pointers left;
      const auto* weights = reinterpret_cast<const typename P::Element*>(work.scores_of(index, prefix, column, tile));
      for (int part = 0; part < P::kParts; ++part) left[part] = weights + part * tile.padded;
      const int64_t row = work.problem.first_row(term) + tile.first;
      // [columns, rows] @ [rows, slice] -> [columns, slice]
      multiply<P>(
          in_tile, slice.width, P::kPaired ? round_up(tile.count, 2) : tile.count, left,
          work.tile_rows * static_cast<int64_t>(sizeof(float) / sizeof(typename P::Element)),
          operand.panel(row, tile.count, work.row_panel(term, t), slice), operand.panel_ld(),
          columns.gradient + column * columns.dimension + slice.begin, columns.dimension, true);
    }
  }
}

// Gradients of the columns.
template <class P>
void backward_columns(Workspace<P>& work, int64_t begin, int64_t count) {
  for (Vectors* columns : {&work.problem.queries, &work.problem.documents, &work.problem.all_queries}) {
    if (!columns->data) continue;
    const int64_t tiles = (columns->rows + kTileColumns - 1) / kTileColumns;
    parallel_products(tiles, [&](const auto& next_task) {
      for (int64_t tile = next_task(); tile >= 0; tile = next_task()) {
        for (size_t term = 0; term < work.problem.terms.size(); ++term) {
          if (&work.problem.columns_of(work.problem.terms[term]) != columns) continue;
          backward_columns_of_term(work, term, *columns, tile * kTileColumns, begin, count);
        }
      }
    });
  }
}

}  // namespace sbert_kernels
