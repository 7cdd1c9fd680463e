// What the CPU kernels of the contrastive operation are handed. Symbols as in problems/contrastive.py: N rows,
// M documents, D the embedding dimension, P Matryoshka prefixes (one, of width D, without Matryoshka).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../common/memory.h"

namespace sbert_kernels {

// Similarities of a row and a column come from slices of the embedding: slice k holds the dimensions between prefix
// k - 1 and prefix k, so that prefix k is the sum of slices 0..k.
struct Slice {
  int64_t begin;  // first dimension
  int64_t width;
  int64_t padded_begin;  // the same in a copy whose slices are padded to an even width, as pairs of bf16 need it
  int64_t padded_width;
};

// A set of vectors, [rows, D] row-major, in any role: rows of some terms, columns of others.
struct Vectors {
  const void* data = nullptr;  // float or at::BFloat16, as Problem::bf16 says
  int64_t rows = 0;
  int64_t dimension = 0;      // D, also the leading dimension
  float* gradient = nullptr;  // [rows, D], zeroed; null where nobody wants it
  Array<float> inverse_norm;  // [P, rows], ones for dot products
  Array<double> projection;   // [P, rows], inverse_norm squared; 0 where the norm is a constant (below eps)
  Array<double> radial;       // [P, rows], sum of gradient of a similarity x similarity: the part along the vector
};

// Entries (i, start + i) of a term's matrix.
struct Diagonal {
  int64_t start;
  bool positive;  // true for the positive; false for a hard negative whose hardness differs from that of the others
  bool hard;      // its logit gets the hardness penalty
};

// What becomes of columns with the id of the row's own column.
enum class DuplicateRule { kKeep = 0, kMask = 1, kPositive = 2 };

// One direction of the loss, with the whole rule of its entries; see Term in problems/contrastive.py.
struct Term {
  bool rows_are_queries;
  bool columns_are_queries;
  int64_t columns;
  int64_t softmax;     // terms of one number share a softmax
  int64_t own_column;  // column whose duplicates are row 0's duplicates
  DuplicateRule duplicates;
  bool guided;                    // the guide excludes columns
  double hardness;                // strength of the penalty on hard entries
  bool hard_everywhere;           // all entries are hard but pairs that say otherwise; else none are
  std::vector<Diagonal> pairs;    // computed row by row, not in the tiles
  std::vector<int64_t> excluded;  // starts of diagonals that are never in the softmax
};

enum class MatmulPrecision { kFloat32 = 0, kBFloat16x3 = 1, kBFloat16 = 2 };

struct Problem {
  Vectors queries, documents, all_queries;  // all_queries: data is null where it is the queries
  Vectors guide_queries, guide_documents;   // float; data is null without a guide
  bool bf16 = false;
  MatmulPrecision precision = MatmulPrecision::kFloat32;
  int64_t rows = 0;        // N
  int64_t row_offset = 0;  // document of row 0's positive
  std::vector<Term> terms;
  int64_t softmaxes = 1;
  std::vector<Slice> slices;              // [P]
  std::vector<double> dim_weights;        // [P]
  const int64_t* query_ids = nullptr;     // of the query columns
  const int64_t* document_ids = nullptr;  // [M]
  bool cosine = true;
  // Subtracted from all logits before exp(), where their bound is known; else each row's own largest logit is.
  std::optional<float> shift = 0.0f;
  double least_sum = 0;  // of exp(logit - shift): rows with less get their own largest logit as shift after all
  double scale = 1;
  double eps = 0;
  double guide_margin = 0;           // below the guide similarity s of the positive: this
  double guide_relative_margin = 0;  // plus this times |s|
  const double* weights = nullptr;   // [N], or null for equal weights
  bool want_gradient = false;
  int64_t block_bytes = 0;  // most bytes of similarities held at a time

  Vectors& rows_of(const Term& term) { return term.rows_are_queries ? queries : documents; }
  Vectors& columns_of(const Term& term) {
    if (!term.columns_are_queries) return documents;
    return all_queries.data ? all_queries : queries;
  }
  int64_t first_row(const Term& term) const { return term.rows_are_queries ? 0 : row_offset; }
  // Ids of a term's columns, or null if it does not look at them.
  const int64_t* ids_of(const Term& term) const {
    if (term.duplicates == DuplicateRule::kKeep) return nullptr;
    return term.columns_are_queries ? query_ids : document_ids;
  }
  // Logit / similarity of an entry.
  double logit_factor(const Term& term, bool hard) const { return scale + (hard ? term.hardness : 0.0); }
  // What the weighted sum over the rows is divided by; 1 where no row counts, so that the loss is 0 then.
  double weight_sum() const {
    if (!weights) return static_cast<double>(rows);
    double sum = 0;
    bool counts = false;
    for (int64_t i = 0; i < rows; ++i) {
      sum += weights[i];
      counts = counts || weights[i] != 0;
    }
    return counts ? sum : 1;
  }
};

struct Result {
  double loss = 0;
  double scale_gradient = 0;
  Array<double> losses;  // [N]
};

// Fills the gradients of the problem's vectors.
Result contrastive(Problem& problem);

}  // namespace sbert_kernels
