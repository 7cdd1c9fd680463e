// The element-wise work on one tile of similarities, vectorised for the instruction set of the machine at run time.
//
// Tiles are transposed, [columns, rows]: the softmax runs down a tile, so that everything that belongs to a row of the
// loss (norm, shift, sum) is a vector along the contiguous axis, and no sum has to go across the lanes.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

namespace sbert_kernels {

// Columns of a tile. Rows are at most kMaxTileRows, and padded to a multiple of kLanes.
constexpr int64_t kTileColumns = 128;
constexpr int64_t kMaxTileRows = 128;
constexpr int64_t kLanes = 16;

// Which entries of a tile are duplicates of a row's own column: equal ids, but not the own column itself.
struct Duplicates {
  const int64_t* row_ids = nullptr;     // [rows]; null where duplicates are kept
  const int64_t* column_ids = nullptr;  // [columns]
  int64_t own_row = 0;                  // row of the tile whose own column is the tile's column 0; may lie outside
  bool positive = false;
};

// Dot products to similarities, exclusions at -inf.
struct ScoreTile {
  const float* dots;  // [columns, rows]
  float* scores;      // [columns, ld]
  int64_t ld;
  int64_t columns, rows;
  const float* row_inverse;     // [rows]
  const float* column_inverse;  // [columns]
  Duplicates duplicates;
  float* duplicate_counts;  // [rows] +=
  float* duplicate_scores;  // [rows] +=
  const float* guide;       // [columns, rows] guide dot products, or null
  const float* guide_row_inverse;
  const float* guide_column_inverse;
  const float* guide_threshold;  // [rows]
};

// Softmax statistics of a tile of similarities.
struct StatisticsTile {
  const float* scores;  // [columns, ld]
  int64_t ld;
  int64_t columns, rows;
  float factor;            // logit / similarity
  float duplicate_factor;  // the same of a duplicate positive
  Duplicates duplicates;
  float* maxima;       // [rows], max with the logits
  const float* shift;  // [rows]
  float* sums;         // [rows] += exp(logit - shift)
};

// Similarities to gradients of the dot products.
struct WeightTile {
  const float* scores;  // [columns, ld]
  const float* wider;   // [columns, wider_ld], weights of the next wider prefix to be added, or null
  float* weights;       // [columns, weights_ld]; may be `scores` or `wider`
  int64_t ld, wider_ld, weights_ld;
  int64_t columns, rows;
  float factor, duplicate_factor;
  Duplicates duplicates;
  const float* shift;                // [rows]
  const float* softmax_coefficient;  // [rows], exp(logit - shift) times this is the gradient of a similarity
  const float* positive_share;       // [rows], subtracted from that of a duplicate positive
  const float* row_inverse;          // [rows]
  const float* column_inverse;       // [columns]
  float* row_sums;                   // [rows] += gradient x similarity
  float* column_sums;                // [columns] = the same
};

// Passes over single vectors, of float or bf16 elements.
template <class T>
struct VectorKernels {
  double (*dot)(const T* a, const T* b, int64_t count);
  double (*dot_float)(const T* a, const float* b, int64_t count);
  void (*add_scaled)(const T* x, float factor, int64_t count, float* out);  // out += factor x
};

struct TileKernels {
  void (*score)(const ScoreTile&);
  void (*maximum)(const StatisticsTile&);
  void (*sum)(const StatisticsTile&);
  void (*backward)(const WeightTile&);
  // [columns, ld] -> [rows, out_ld]
  void (*transpose)(const float* in, int64_t ld, int64_t columns, int64_t rows, float* out, int64_t out_ld);
  // x -> its bf16 rounding and, where asked for, the bf16 rounding of the rest.
  void (*split)(const float* in, int64_t count, c10::BFloat16* high, c10::BFloat16* low);
  VectorKernels<float> floats;
  VectorKernels<c10::BFloat16> bf16s;

  template <class T>
  const VectorKernels<T>& of() const {
    if constexpr (std::is_same_v<T, float>) {
      return floats;
    } else {
      return bf16s;
    }
  }
};

// For the instruction set in use.
const TileKernels& tile_kernels();

}  // namespace sbert_kernels
