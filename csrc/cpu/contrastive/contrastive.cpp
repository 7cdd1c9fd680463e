// The contrastive operation on the CPU: loss and gradients in one pass over tiles of similarities.
//
// For a block of rows, for each term with row vectors r_i and column vectors c_j (prefixes of one or several widths p):
//
//   score             s_ij = (r_i . c_j) / (|r_i| |c_j|)         tile by tile, kept for the block; exclusions at -inf
//                     l_i = sum_j exp(z_ij - shift_i), z = scale s (+ hardness s)   while the tile is in the cache
//   backward_rows     g_ij = exp(z_ij - shift_i) share_i scale / l_i   gradient of s_ij, in place of s_ij
//                     h_ij = g_ij / (|r_i| |c_j|), summed over the prefixes that hold a slice, from the widest down
//                     dr_i += sum_j h_ij c_j                        slice by slice: D-long products
//   backward_columns  dc_j += sum_i h_ij r_i
//
// and at the end, where the similarity is cosine, dx -= x sum_p (sum of g s over x's row or column) / |x|^2 for each
// vector: the gradient through its norm. Operands are read as they are: no normalised copies.
//
// The positive stays out of the tiles (see rows.cpp). Memory: the similarities of a block of rows, at most
// Problem::block_bytes. Every output element is written by one task, in a fixed order: no atomics, deterministic.
#include <algorithm>

#include "backward_columns.h"
#include "backward_rows.h"
#include "norms.h"
#include "problem.h"
#include "rows.h"
#include "score.h"
#include "workspace.h"

namespace sbert_kernels {
namespace {

template <class P>
Result run_blocks(Problem& problem) {
  Workspace<P> work(problem);
  BlockRows rows(problem, work.block_rows);
  Result result;
  result.losses.resize(problem.rows);
  const double weight_sum = problem.weight_sum();
  const auto share = [&](int64_t i) { return (problem.weights ? problem.weights[i] : 1.0) / weight_sum; };

  for (int64_t begin = 0; begin < problem.rows; begin += work.block_rows) {
    const int64_t count = std::min(work.block_rows, problem.rows - begin);
    const int64_t tiles = (count + work.tile_rows - 1) / work.tile_rows;
    parallel_products(tiles, [&](const auto& next_task) {
      Scoring<P> scoring(work, rows, begin, count);
      for (int64_t tile = next_task(); tile >= 0; tile = next_task()) {
        scoring.run(tile);
        const int64_t offset = tile * work.tile_rows;
        for (int64_t i = offset; i < std::min(offset + work.tile_rows, count); ++i) {
          rows.finish(i, share(begin + i));
          result.losses[begin + i] = rows.losses[i];
        }
      }
    });
    if (!problem.want_gradient) continue;
    parallel_products(tiles, [&](const auto& next_task) {
      BackwardRows<P> backward_rows(work, rows, begin, count);
      for (int64_t tile = next_task(); tile >= 0; tile = next_task()) backward_rows.run(tile);
    });
    backward_columns(work, begin, count);
  }
  for (int64_t i = 0; i < problem.rows; ++i) {
    result.loss += share(i) * result.losses[i];
    result.scale_gradient += work.scale_gradients[i];
  }
  return result;
}

template <class T>
Result run(Problem& problem) {
  const std::vector<Slice> whole{{0, problem.guide_queries.dimension, 0, problem.guide_queries.dimension}};
  for (Vectors* vectors : {&problem.queries, &problem.documents, &problem.all_queries}) {
    measure<T>(*vectors, problem, problem.slices, problem.cosine);
  }
  measure<float>(problem.guide_queries, problem, whole, true);
  measure<float>(problem.guide_documents, problem, whole, true);
  Result result;
  switch (problem.precision) {
    case MatmulPrecision::kFloat32:
      result = run_blocks<Float32Products>(problem);
      break;
    case MatmulPrecision::kBFloat16x3:
      result = run_blocks<Bfloat16Products<2>>(problem);
      break;
    case MatmulPrecision::kBFloat16:
      result = run_blocks<Bfloat16Products<1>>(problem);
      break;
  }
  if (problem.cosine) {
    for (Vectors* vectors : {&problem.queries, &problem.documents, &problem.all_queries}) {
      project<T>(*vectors, problem.slices);
    }
  }
  return result;
}

}  // namespace

Result contrastive(Problem& problem) { return problem.bf16 ? run<Bf16>(problem) : run<float>(problem); }

}  // namespace sbert_kernels
