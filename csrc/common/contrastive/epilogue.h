// From a tile of dot products to softmax weights and their sums: the arithmetic of one GPU lane, for host and device.
//
//     p = row_factor[m] * scale * log2(e) * column_factor[n]
//     e = 2^(dot * p - shift)                           special diagonals: 2^(dot * p * special_ratio - shift)
//     e = 0                                             on excluded diagonals, for equal ids, outside of the matrix
//     w = e * column_factor[n]                          Policy::rows, with the sums of e over the rows; what is the
//                                                       row's alone comes after the product with the columns
//     w = e * (row_coefficient[m] + column_coefficient[n]) * row_factor[m] * column_factor[n]       Policy::known
//
// A tile is what a group of four warps computes. It passes through it in subtiles of 64 x 32 entries, all that have the
// same columns before the next ones. In a subtile a lane holds the 16 entries that the group's matrix instruction
// leaves in its registers: entry i of lane l in warp w lies at
//
//     row     16 w + l / 4 + 8 ((i / 2) % 2) + 64 block
//     column  8 (i / 4) + 2 (l % 4) + i % 2 + 32 subtile
//
// A block may be given a tile beyond the last row or column, as blocks come in clusters: it has no sums to write.
//
// Nothing here knows how entries arrive or weights leave, and nothing is shared between lanes but what `given` and
// `take` hand over, so that a host can walk through all lanes of any tile: tests do, with tiles of matrices that have
// more entries than fit into 32 bits. Rare entries are found by rolled loops, so that they cost little code.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SBERT_KERNELS_LANE __device__ __forceinline__
#define SBERT_KERNELS_UNROLL _Pragma("unroll")
#define SBERT_KERNELS_ROLLED _Pragma("unroll 1")
#else
#define SBERT_KERNELS_LANE inline
#define SBERT_KERNELS_UNROLL
#define SBERT_KERNELS_ROLLED
#endif

namespace sbert_kernels::contrastive {

// The entries whose column minus row is first, first + stride, ...: count diagonals.
struct Diagonals {
  int first, stride, count;
};

enum class Policy {
  rows,   // writes weights before their sums are known, and sums over each row
  sums,   // writes sums over each row, and over each column if they are asked for
  known,  // writes weights whose sums are known
};

struct Epilogue {
  int rows, columns;                // M, N
  float const* row_factor;          // (M,) 1 / norm
  float const* column_factor;       // (N,) 1 / norm, 8-byte base
  float logit_factor;               // scale * log2(e): above 0
  float inverse_logit_factor;       // 1 / logit_factor
  float shift;                      // base 2
  Diagonals excluded;               // the positives, and what is never in the softmax
  Diagonals special;                // hard negatives, or where most entries are hard, those that are not
  float special_ratio;              // of the logits on the special diagonals
  int64_t const* row_ids;           // (M,) template argument IDS only
  int64_t const* column_ids;        // (N,)
  int own_column;                   // row 0's own column, which is no duplicate of itself; that of row m is m more
  float const* row_coefficient;     // (M,) 1 / the row's sum, times the row's weight; Policy::known only
  float const* column_coefficient;  // (N,) or null for 0; 8-byte base
  float* row_sums;                  // (tiles of columns, M), not Policy::known
  float* column_sums;               // (tiles of rows, summed_columns) or null, Policy::sums only
  int summed_columns;               // the first so many columns have sums
};

SBERT_KERNELS_LANE float exp2_of(float z) {
#ifdef __CUDA_ARCH__
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z));
  return e;
#else
  return std::exp2(z);
#endif
}

// Where sum number `tile` of an entry lies in an array (tiles, length).
SBERT_KERNELS_LANE int64_t sum_index(int tile, int length, int entry) { return int64_t(tile) * length + entry; }

SBERT_KERNELS_LANE bool on_diagonals(Diagonals const& d, int64_t column_minus_row) {
  bool found = false;
  SBERT_KERNELS_ROLLED
  for (int k = 0; k < d.count; ++k) found |= column_minus_row == d.first + int64_t(k) * d.stride;
  return found;
}

// Whether a diagonal passes through a tile.
SBERT_KERNELS_LANE bool meets_diagonals(Diagonals const& d, int64_t row, int64_t column, int tile_m, int tile_n) {
  bool found = false;
  SBERT_KERNELS_ROLLED
  for (int k = 0; k < d.count; ++k) {
    int64_t const first = row + d.first + int64_t(k) * d.stride;  // the diagonal's column in the tile's first row
    found |= first < column + tile_n && first + tile_m > column;
  }
  return found;
}

// Folds an id into 32 bits. Equal ids stay equal; different ones that become equal are told apart by a second look.
SBERT_KERNELS_LANE unsigned folded(int64_t id) {
  return static_cast<unsigned>(id) ^ (static_cast<unsigned>(static_cast<uint64_t>(id) >> 32) * 0x9E3779B1u);
}

template <int TILE_M_, int TILE_N_, Policy POLICY_, bool IDS_>
struct Lane {
  static constexpr int TILE_M = TILE_M_, TILE_N = TILE_N_;
  static constexpr Policy POLICY = POLICY_;
  static constexpr bool IDS = IDS_;
  static constexpr int WARPS = 4, LANES = 32 * WARPS;
  static constexpr int BLOCKS = TILE_M / 64;    // of rows: subtiles below each other
  static constexpr int SUBTILES = TILE_N / 32;  // of columns: subtiles beside each other
  static constexpr int ENTRIES = 16;            // of a lane in a subtile: 2 rows, 8 columns

  Epilogue const& epilogue;
  int tile_row, tile_column;  // numbers of the tile
  int warp, lane;
  int first_row, first_column;  // where this lane's entry 0 lies in the matrix
  bool touched;                 // the tile meets a diagonal or an edge of the matrix
  float row_factor[BLOCKS][2];  // times logit_factor
  float row_sum[BLOCKS][2], row_coefficient[BLOCKS][2];
  unsigned row_id[BLOCKS][2], column_id[8];
  float column_factor[8], column_sum[8], column_coefficient[8];

  SBERT_KERNELS_LANE Lane(Epilogue const& epilogue, int tile_row, int tile_column, int thread)
      : epilogue(epilogue), tile_row(tile_row), tile_column(tile_column), warp(thread / 32), lane(thread % 32) {
    int const row = tile_row * TILE_M, column = tile_column * TILE_N;
    first_row = row + warp * 16 + lane / 4;
    first_column = column + lane % 4 * 2;
    touched = row + TILE_M > epilogue.rows || column + TILE_N > epilogue.columns ||
              meets_diagonals(epilogue.excluded, row, column, TILE_M, TILE_N) ||
              meets_diagonals(epilogue.special, row, column, TILE_M, TILE_N);
  }

  // Row and column of entry i in the matrix.
  SBERT_KERNELS_LANE int row(int block, int i) const { return first_row + block * 64 + 8 * (i / 2 % 2); }
  SBERT_KERNELS_LANE int column(int subtile, int i) const { return first_column + subtile * 32 + i / 4 * 8 + i % 2; }

  // Reads what belongs to this lane's rows.
  SBERT_KERNELS_LANE void begin() {
    SBERT_KERNELS_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      SBERT_KERNELS_UNROLL
      for (int half = 0; half < 2; ++half) {
        int const m = row(block, 2 * half);
        bool const inside = m < epilogue.rows;
        row_factor[block][half] = inside ? epilogue.row_factor[m] * epilogue.logit_factor : 0.f;
        row_sum[block][half] = 0.f;
        if constexpr (IDS) row_id[block][half] = folded(inside ? epilogue.row_ids[m] : 0);
        if constexpr (POLICY == Policy::known)  // the factors that weights are multiplied by hold logit_factor, too
          row_coefficient[block][half] = inside ? epilogue.row_coefficient[m] * epilogue.inverse_logit_factor : 0.f;
      }
    }
  }

  // Reads what belongs to this lane's columns of the next subtiles.
  SBERT_KERNELS_LANE void begin_subtile(int subtile) {
    load_columns(epilogue.column_factor, subtile, column_factor, 1.f);
    if constexpr (POLICY == Policy::known) {
      SBERT_KERNELS_UNROLL
      for (int j = 0; j < 8; ++j) column_coefficient[j] = 0.f;
      if (epilogue.column_coefficient)
        load_columns(epilogue.column_coefficient, subtile, column_coefficient, epilogue.inverse_logit_factor);
    }
    if constexpr (IDS) {
      SBERT_KERNELS_UNROLL
      for (int j = 0; j < 8; ++j) {
        int const n = column(subtile, j / 2 * 4 + j % 2);
        column_id[j] = folded(n < epilogue.columns ? epilogue.column_ids[n] : 0);
      }
    }
    if constexpr (POLICY == Policy::sums) {
      SBERT_KERNELS_UNROLL
      for (int j = 0; j < 8; ++j) column_sum[j] = 0.f;
    }
  }

  // Turns this lane's dot products of a subtile into weights; adds up their exponentials.
  template <class Dots, class Weights>
  SBERT_KERNELS_LANE void visit(Dots const& dot, int block, int subtile, Weights& weight) {
    float e[ENTRIES], p[ENTRIES];
    bool same_id = false;
    SBERT_KERNELS_UNROLL
    for (int i = 0; i < ENTRIES; ++i) {
      int const half = i / 2 % 2, j = i / 4 * 2 + i % 2;
      p[i] = row_factor[block][half] * column_factor[j];
      e[i] = exp2_of(std::fma(dot[i], p[i], -epilogue.shift));
      if constexpr (IDS) same_id |= row_id[block][half] == column_id[j];
    }
    if (touched) correct(dot, p, block, subtile, e);
    if constexpr (IDS) {
      if (same_id) exclude_duplicates(block, subtile, e);
    }
    SBERT_KERNELS_UNROLL
    for (int i = 0; i < ENTRIES; ++i) {
      int const half = i / 2 % 2, j = i / 4 * 2 + i % 2;
      if constexpr (POLICY == Policy::known) {
        // The coefficients first: they bring the exponential into the range of a probability.
        weight[i] = e[i] * (row_coefficient[block][half] + column_coefficient[j]) * p[i];
      } else {
        row_sum[block][half] += e[i];
        if constexpr (POLICY == Policy::sums) column_sum[j] += e[i];
        if constexpr (POLICY == Policy::rows) weight[i] = e[i] * column_factor[j];
      }
    }
  }

  // -- sums of several lanes: `given` is handed to lane ^ mask, which passes it to `take` ----------------------------

  // Four lanes hold a row: masks 1 and 2. Afterwards each of the four has the sum.
  SBERT_KERNELS_LANE float given_of_row(int block, int half) const { return row_sum[block][half]; }
  SBERT_KERNELS_LANE void take_of_row(int block, int half, float received) { row_sum[block][half] += received; }

  // Eight lanes hold a column: masks 16, 8 and 4 in this order. Each step halves the sums that a lane still holds,
  // numbers 0 .. mask / 4 - 1 of which are handed over and taken; the last one leaves a lane the sum of one column.
  SBERT_KERNELS_LANE float given_of_columns(int mask, int j) const {
    return lane & mask ? column_sum[j] : column_sum[j + mask / 4];
  }
  SBERT_KERNELS_LANE void take_of_columns(int mask, int j, float received) {
    column_sum[j] = (lane & mask ? column_sum[j + mask / 4] : column_sum[j]) + received;
  }
  // The column, of the tile, whose sum this lane has.
  SBERT_KERNELS_LANE int summed_column(int subtile) const {
    int const j = lane / 4 % 2 + lane / 8 % 2 * 2 + lane / 16 * 4;
    return subtile * 32 + j / 2 * 8 + lane % 4 * 2 + j % 2;
  }

  // Writes the row sums, one lane of four.
  SBERT_KERNELS_LANE void store_row_sums() const {
    if (lane % 4 != 0 || tile_column * TILE_N >= epilogue.columns) return;
    SBERT_KERNELS_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      SBERT_KERNELS_UNROLL
      for (int half = 0; half < 2; ++half) {
        int const m = row(block, 2 * half);
        if (m < epilogue.rows) epilogue.row_sums[sum_index(tile_column, epilogue.rows, m)] = row_sum[block][half];
      }
    }
  }

  // Writes column sums that each warp has left in `by_warp` (WARPS, TILE_N); lanes take columns in turn.
  SBERT_KERNELS_LANE void store_column_sums(float const (*by_warp)[TILE_N]) const {
    if (tile_row * TILE_M >= epilogue.rows) return;
    for (int n = warp * 32 + lane; n < TILE_N; n += LANES) {
      float sum = 0.f;
      SBERT_KERNELS_UNROLL
      for (int w = 0; w < WARPS; ++w) sum += by_warp[w][n];
      int const at = tile_column * TILE_N + n;
      if (at < epilogue.summed_columns) epilogue.column_sums[sum_index(tile_row, epilogue.summed_columns, at)] = sum;
    }
  }

 private:
  // Reads the numbers of this lane's eight columns times a factor; 0 beyond the last column.
  SBERT_KERNELS_LANE void load_columns(float const* from, int subtile, float (&to)[8], float factor) const {
    struct alignas(8) Pair {
      float x, y;
    };
    if (!touched) {
      SBERT_KERNELS_UNROLL
      for (int j = 0; j < 8; j += 2) {
        Pair const found = *reinterpret_cast<Pair const*>(from + column(subtile, 2 * j));
        to[j] = found.x * factor;
        to[j + 1] = found.y * factor;
      }
    } else {
      SBERT_KERNELS_UNROLL
      for (int j = 0; j < 8; ++j) {
        int const n = column(subtile, j / 2 * 4 + j % 2);
        to[j] = n < epilogue.columns ? from[n] * factor : 0.f;
      }
    }
  }

  // Computes the entries on special diagonals again; sets excluded ones, and those outside of the matrix, to 0.
  template <class Dots>
  SBERT_KERNELS_LANE void correct(
      Dots const& dot, float const (&p)[ENTRIES], int block, int subtile, float (&e)[ENTRIES]) const {
    unsigned excluded = 0, special = 0;
    SBERT_KERNELS_ROLLED
    for (int i = 0; i < ENTRIES; ++i) {
      int const m = row(block, i), n = column(subtile, i);
      int64_t const apart = int64_t(n) - m;
      bool const outside = m >= epilogue.rows || n >= epilogue.columns;
      excluded |= static_cast<unsigned>(outside || on_diagonals(epilogue.excluded, apart)) << i;
      special |= static_cast<unsigned>(on_diagonals(epilogue.special, apart)) << i;
    }
    SBERT_KERNELS_UNROLL
    for (int i = 0; i < ENTRIES; ++i) {
      if (special >> i & 1) e[i] = exp2_of(std::fma(dot[i], p[i] * epilogue.special_ratio, -epilogue.shift));
      if (excluded >> i & 1) e[i] = 0.f;
    }
  }

  // Sets entries to 0 whose column has the id of the row's own column.
  SBERT_KERNELS_LANE void exclude_duplicates(int block, int subtile, float (&e)[ENTRIES]) const {
    unsigned duplicate = 0;
    SBERT_KERNELS_ROLLED
    for (int i = 0; i < ENTRIES; ++i) {
      int const m = row(block, i), n = column(subtile, i);
      bool const inside = m < epilogue.rows && n < epilogue.columns;
      bool const other = int64_t(n) - m != epilogue.own_column;
      duplicate |= static_cast<unsigned>(inside && other && epilogue.row_ids[m] == epilogue.column_ids[n]) << i;
    }
    SBERT_KERNELS_UNROLL
    for (int i = 0; i < ENTRIES; ++i)
      if (duplicate >> i & 1) e[i] = 0.f;
  }
};

}  // namespace sbert_kernels::contrastive
