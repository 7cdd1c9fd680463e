// Norms of the prefixes of vectors, and the gradient through them.
#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "problem.h"
#include "tile.h"

namespace sbert_kernels {

// Fills what a set of vectors knows of its norms, and room for what flows through them.
template <class T>
void measure(Vectors& vectors, const Problem& problem, const std::vector<Slice>& slices, bool cosine) {
  if (!vectors.data) return;
  const int64_t prefixes = static_cast<int64_t>(slices.size()), rows = vectors.rows;
  vectors.inverse_norm.assign(prefixes * rows, 1.0f);
  vectors.projection.assign(prefixes * rows, 0.0);
  vectors.radial.assign(prefixes * rows, 0.0);
  if (!cosine) return;
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(vectors.data) + row * vectors.dimension;
      double squares = 0;
      for (int64_t prefix = 0; prefix < prefixes; ++prefix) {
        const Slice& slice = slices[prefix];
        squares += tile_kernels().of<T>().dot(x + slice.begin, x + slice.begin, slice.width);
        const double norm = std::sqrt(squares);
        // Below eps the divisor is a constant, and nothing flows through it.
        const bool constant = norm < problem.eps;
        const double inverse = 1 / (constant ? problem.eps : norm);
        vectors.inverse_norm[prefix * rows + row] = static_cast<float>(inverse);
        vectors.projection[prefix * rows + row] = constant ? 0.0 : inverse * inverse;
      }
    }
  });
}

// The gradient through the norms.
template <class T>
void project(Vectors& vectors, const std::vector<Slice>& slices) {
  if (!vectors.gradient) return;
  const int64_t prefixes = static_cast<int64_t>(slices.size());
  at::parallel_for(0, vectors.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(vectors.data) + row * vectors.dimension;
      float* gradient = vectors.gradient + row * vectors.dimension;
      double factor = 0;
      for (int64_t prefix = prefixes - 1; prefix >= 0; --prefix) {
        const int64_t at = prefix * vectors.rows + row;
        const Slice& slice = slices[prefix];
        double radial = vectors.radial[at];
        // Out of the gradient itself, where it is that of one prefix: its rounding along x then cancels.
        if (prefixes == 1) radial = tile_kernels().of<T>().dot_float(x + slice.begin, gradient, slice.width);
        if (vectors.projection[at] != 0) factor += radial * vectors.projection[at];
        tile_kernels().of<T>().add_scaled(
            x + slice.begin, static_cast<float>(-factor), slice.width, gradient + slice.begin);
      }
    }
  });
}

}  // namespace sbert_kernels
