// What the phases of one call share: operands, the similarities of a block of rows, and where things lie in them.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../common/parallel.h"
#include "problem.h"
#include "products.h"
#include "tile.h"

namespace sbert_kernels {

// Copies of the columns in the products' layout are kept for the whole call up to this size, and made anew for each
// tile of rows beyond it.
constexpr int64_t kPanelBytes = 16 << 20;

// parallel() for tasks that multiply: the thread's products are released after them, whatever ends them.
template <class Worker>
void parallel_products(int64_t tasks, const Worker& worker) {
  struct Release {
    ~Release() { at::native::cpublas::brgemm_release(); }
  };
  parallel(tasks, [&](const auto& next_task) {
    const Release release;
    worker(next_task);
  });
}

// A tile of rows of a block.
struct RowTile {
  int64_t index;
  int64_t offset;  // first row, in the block
  int64_t first;   // first row, in the problem
  int64_t count;
  int64_t padded;  // count up to a multiple of kLanes
};

template <class P>
struct Workspace {
  using Element = typename P::Element;
  using Columns = Operand<P>;

  explicit Workspace(Problem& problem)
      : problem(problem),
        prefixes(static_cast<int64_t>(problem.slices.size())),
        queries(problem.queries, problem.bf16, problem.slices),
        documents(problem.documents, problem.bf16, problem.slices),
        all_queries(problem.all_queries, problem.bf16, problem.slices),
        guide_slices{{0, problem.guide_queries.dimension, 0, problem.guide_queries.dimension}},
        guide_queries(problem.guide_queries, false, guide_slices),
        guide_documents(problem.guide_documents, false, guide_slices) {
    choose_blocks();
    scale_gradients.resize(problem.rows);
    if (!problem.want_gradient) return;
    scores = buffer<float>(score_offset(problem.terms.size()));
    column_sums = buffer<float>(tiles * score_offsets.back());
    fill_column_panels();
    row_panel_size = std::max(queries.panel_size(tile_rows), documents.panel_size(tile_rows));
    row_panels = buffer<Element>(2 * tiles * row_panel_size);
  }

  RowTile row_tile(int64_t index, int64_t begin, int64_t count) const {
    const int64_t offset = index * tile_rows, rows = std::min(tile_rows, count - offset);
    return {index, offset, begin + offset, rows, round_up(rows, kLanes)};
  }

  // 1 / norm of a tile's rows in prefix p, 0 in the padding.
  void row_inverse(const Vectors& vectors, int64_t prefix, int64_t first, const RowTile& tile, float* out) const {
    std::fill_n(out, tile.padded, 0.0f);
    std::copy_n(vectors.inverse_norm.data() + prefix * vectors.rows + first, tile.count, out);
  }

  void choose_blocks() {
    int64_t columns = 0;
    for (const Term& term : problem.terms) {
      score_offsets.push_back(columns);
      columns += term.columns * prefixes;
    }
    score_offsets.push_back(columns);
    const int64_t threads = at::get_num_threads(), row_bytes = columns * static_cast<int64_t>(sizeof(float));
    block_rows = std::clamp<int64_t>(problem.block_bytes / row_bytes, 1, problem.rows);
    tile_rows = kMaxTileRows;
    while (tile_rows > 2 * kLanes && block_rows < 2 * threads * tile_rows) tile_rows /= 2;
    if (block_rows < problem.rows) {
      const int64_t step = tile_rows * threads;
      block_rows = block_rows >= step ? block_rows / step * step : std::max(block_rows, kLanes);
    }
    tile_rows = std::min(tile_rows, round_up(block_rows, kLanes));
    block_rows = round_up(block_rows, tile_rows);
    tiles = block_rows / tile_rows;
  }

  // Position of a term's similarities, and of its column sums, in their buffers.
  int64_t score_offset(size_t term) const { return score_offsets[term] * block_rows; }
  float* scores_of(size_t term, int64_t prefix, int64_t column, const RowTile& tile) {
    return scores.get() + score_offset(term) +
           ((prefix * tiles + tile.index) * problem.terms[term].columns + column) * tile_rows;
  }
  float* column_sums_of(size_t term, int64_t prefix, int64_t tile) {
    return column_sums.get() + tiles * score_offsets[term] + (prefix * tiles + tile) * problem.terms[term].columns;
  }

  const Columns& rows_of(const Term& term) const { return term.rows_are_queries ? queries : documents; }
  const Columns& columns_of(const Term& term) const {
    if (!term.columns_are_queries) return documents;
    return problem.all_queries.data ? all_queries : queries;
  }

  float logit_factor(const Term& term, bool hard) const { return static_cast<float>(problem.logit_factor(term, hard)); }

  int64_t index_of(const Columns& columns) const { return &columns == &queries ? 0 : &columns == &documents ? 1 : 2; }

  // Columns in the layout of the product over columns, where that is another than their own.
  void fill_column_panels() {
    if constexpr (Columns::kNeedsPanel) {
      for (const Columns* columns : {&queries, &documents, &all_queries}) {
        bool wanted = false;
        for (const Term& term : problem.terms) {
          wanted |= &columns_of(term) == columns && problem.rows_of(term).gradient;
        }
        const int64_t tiles = (columns->rows() + kTileColumns - 1) / kTileColumns;
        const int64_t size = columns->panel_size(kTileColumns);
        if (!wanted || tiles * size * static_cast<int64_t>(sizeof(Element)) > kPanelBytes) continue;
        auto& panels = column_panels[index_of(*columns)];
        panels = buffer<Element>(tiles * size);
        at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
          for (int64_t tile = first; tile < last; ++tile) {
            const int64_t row = tile * kTileColumns;
            columns->fill_panel(row, std::min(kTileColumns, columns->rows() - row), panels.get() + tile * size);
          }
        });
      }
    }
  }

  // A term may end before its columns do (its last tile then holds fewer of them), but its tiles are theirs.
  typename Columns::Pointers column_panel(
      const Columns& columns, int64_t column, int64_t count, const Slice& slice, Element* scratch, bool fill) {
    if constexpr (Columns::kNeedsPanel) {
      const auto& kept = column_panels[index_of(columns)];
      if (kept) {
        const int64_t whole = std::min(kTileColumns, columns.rows() - column);
        const Element* panel = kept.get() + column / kTileColumns * columns.panel_size(kTileColumns);
        return columns.panel(column, whole, panel, slice);
      }
      if (fill) columns.fill_panel(column, count, scratch);
    }
    return columns.panel(column, count, scratch, slice);
  }

  Element* row_panel(const Term& term, int64_t tile) const {
    return row_panels.get() + ((term.rows_are_queries ? 0 : 1) * tiles + tile) * row_panel_size;
  }

  Problem& problem;
  const int64_t prefixes;
  Columns queries, documents, all_queries;
  std::vector<Slice> guide_slices;
  Operand<Float32Products> guide_queries, guide_documents;

  int64_t block_rows = 0, tile_rows = 0, tiles = 0;  // tiles: of rows, in a block
  std::vector<int64_t> score_offsets;
  Buffer<float> scores;              // for each term [P, tiles, columns, tile rows]: similarities, then their gradients
  Buffer<float> column_sums;         // for each term [P, tiles, columns]
  Buffer<Element> column_panels[3];  // of queries, documents, all queries: [tiles], null where they are not kept
  Buffer<Element> row_panels;        // [queries or documents, tiles]
  int64_t row_panel_size = 0;
  Array<double> scale_gradients;  // [N]
};

// Which entries of a tile of a term are duplicates.
class TileDuplicates {
 public:
  TileDuplicates(const Problem& problem, const Term& term, const RowTile& tile, int64_t column) {
    if (const int64_t* ids = problem.ids_of(term)) {
      for (int64_t i = 0; i < tile.padded; ++i) {
        row_ids_[i] = ids[term.own_column + tile.first + std::min(i, tile.count - 1)];
      }
      view.row_ids = row_ids_;
      view.column_ids = ids + column;
      view.own_row = column - term.own_column - tile.first;
      view.positive = term.duplicates == DuplicateRule::kPositive;
    }
  }
  TileDuplicates(const TileDuplicates&) = delete;  // the view points into it

  Duplicates view;

 private:
  int64_t row_ids_[kMaxTileRows];
};

// Pair `pair` of all terms': of row `at` of the block, between rows of the term's two operands.
struct RowPair {
  size_t pair;
  int64_t at, row, column;
};

// Calls function(pair, row vector, column vector) for each pair of a term in a tile.
template <class Function>
void for_each_pair(
    Problem& problem, const Term& term, size_t first_pair, const RowTile& tile, const Function& function) {
  const Vectors& rows = problem.rows_of(term);
  const Vectors& columns = problem.columns_of(term);
  RowPair entry{first_pair, 0, 0, 0};
  for (const Diagonal& diagonal : term.pairs) {
    for (int64_t i = 0; i < tile.count; ++i) {
      entry.at = tile.offset + i;
      entry.row = problem.first_row(term) + tile.first + i;
      entry.column = diagonal.start + tile.first + i;
      const int64_t r = entry.row * rows.dimension, c = entry.column * columns.dimension;
      if (problem.bf16) {
        function(entry, static_cast<const Bf16*>(rows.data) + r, static_cast<const Bf16*>(columns.data) + c);
      } else {
        function(entry, static_cast<const float*>(rows.data) + r, static_cast<const float*>(columns.data) + c);
      }
    }
    ++entry.pair;
  }
}

}  // namespace sbert_kernels
