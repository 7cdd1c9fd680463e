// torch.ops.sbert_kernels_cuda.contrastive_weights: checks tensors, and hands their memory to `write_weights`.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "../common/torch.h"
#include "core.h"

namespace sbert_kernels::contrastive {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The largest row or column number, with whole tiles added, is an int.
constexpr int64_t MOST_VECTORS = (int64_t{1} << 31) - (1 << 15);

void check_on(Tensor const& tensor, Tensor const& rows, char const* name) {
  STD_TORCH_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == rows.get_device_index(), name,
      " must be on the device of rows.");
}

// Checks a matrix that is loaded or stored in tiles by the hardware.
void check_tiled(Tensor const& matrix, Tensor const& rows, char const* name) {
  check_on(matrix, rows, name);
  STD_TORCH_CHECK(matrix.dim() == 2, name, " must be a matrix, got ", matrix.dim(), " dimensions.");
  STD_TORCH_CHECK(matrix.scalar_type() == rows.scalar_type(), name, " must have the type of rows.");
  STD_TORCH_CHECK(
      matrix.stride(1) == 1 && matrix.stride(0) % 8 == 0 && matrix.stride(0) >= matrix.size(1), name,
      " must have rows of consecutive numbers, a multiple of 8 apart, got strides ", matrix.stride(0), " and ",
      matrix.stride(1), ".");
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0, name, " must begin at a multiple of 16 bytes.");
}

// Returns the memory of a contiguous tensor of this type and shape; null for none.
template <class T>
T* memory(
    MaybeTensor const& tensor, Tensor const& rows, ScalarType type, std::vector<int64_t> const& shape,
    char const* name) {
  if (!tensor) return nullptr;
  check_on(*tensor, rows, name);
  STD_TORCH_CHECK(tensor->scalar_type() == type, name, " has the wrong type: float32 is wanted, or int64 for ids.");
  STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous.");
  bool fits = tensor->dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = tensor->size(i) == shape[i];
  STD_TORCH_CHECK(fits, name, " must have ", shape.back(), " numbers", shape.size() > 1 ? " for each tile." : ".");
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor->const_data_ptr());
  } else {
    return static_cast<T*>(tensor->mutable_data_ptr());
  }
}

Diagonals diagonals(std::vector<int64_t> const& given, char const* name) {
  STD_TORCH_CHECK(given.size() == 3 && given[2] >= 0, name, " must be first, stride and count of diagonals.");
  for (int64_t number : given)
    STD_TORCH_CHECK(
        -MOST_VECTORS < number && number < MOST_VECTORS, name, " has a number that is too large: ", number, ".");
  return {static_cast<int>(given[0]), static_cast<int>(given[1]), static_cast<int>(given[2])};
}

void contrastive_weights(
    Tensor const& rows, Tensor const& columns, Tensor const& row_factor, Tensor const& column_factor, double scale,
    double shift, std::vector<int64_t> const& excluded, std::vector<int64_t> const& special, double special_ratio,
    MaybeTensor const& row_ids, MaybeTensor const& column_ids, int64_t own_column, MaybeTensor const& row_coefficient,
    MaybeTensor const& column_coefficient, MaybeTensor weights, MaybeTensor row_sums, MaybeTensor column_sums) {
  constexpr double LOG2E = 1.4426950408889634;
  STD_TORCH_CHECK(rows.is_cuda(), "rows must be on a CUDA device.");
  bool const fp16 = rows.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(fp16 || rows.scalar_type() == ScalarType::BFloat16, "rows must be bfloat16 or float16.");
  check_tiled(rows, rows, "rows");
  check_tiled(columns, rows, "columns");
  int64_t const m = rows.size(0), n = columns.size(0), width = rows.size(1);
  STD_TORCH_CHECK(m < MOST_VECTORS && n < MOST_VECTORS, "there are too many vectors: ", m, " rows, ", n, " columns.");
  STD_TORCH_CHECK(
      width == columns.size(1) && width > 0 && width % 8 == 0 && width < MOST_VECTORS,
      "rows and columns must be of one width, a multiple of 8, got ", width, " and ", columns.size(1), ".");
  STD_TORCH_CHECK(
      scale > 0 && std::isfinite(scale) && std::isfinite(shift), "scale must be positive, and finite as shift.");
  STD_TORCH_CHECK(row_ids.has_value() == column_ids.has_value(), "row_ids and column_ids must be given together.");
  STD_TORCH_CHECK(
      -MOST_VECTORS < own_column && own_column < MOST_VECTORS, "own_column is too large: ", own_column, ".");
  if (weights) {
    check_tiled(*weights, rows, "weights");
    STD_TORCH_CHECK(weights->size(0) == m && weights->size(1) == n, "weights must be of shape (rows, columns).");
  }
  bool const known = row_coefficient.has_value();
  STD_TORCH_CHECK(
      known ? weights && !row_sums && !column_sums : row_sums && !column_coefficient && !(weights && column_sums),
      "expected one of these outputs: weights and row_sums; row_sums, perhaps with column_sums; or weights for given "
      "coefficients.");
  int64_t const row_tiles = (m + TILE_M - 1) / TILE_M, column_tiles = (n + TILE_N - 1) / TILE_N;
  int64_t const summed = column_sums && column_sums->dim() == 2 ? column_sums->size(1) : 0;
  STD_TORCH_CHECK(summed <= n, "column_sums must be of at most ", n, " columns, got ", summed, ".");
  if (m == 0 || n == 0) return;

  Epilogue epilogue{};
  epilogue.rows = static_cast<int>(m);
  epilogue.columns = static_cast<int>(n);
  epilogue.row_factor = memory<float const>(row_factor, rows, ScalarType::Float, {m}, "row_factor");
  epilogue.column_factor = memory<float const>(column_factor, rows, ScalarType::Float, {n}, "column_factor");
  epilogue.logit_factor = static_cast<float>(scale * LOG2E);
  epilogue.inverse_logit_factor = static_cast<float>(1 / (scale * LOG2E));
  epilogue.shift = static_cast<float>(shift * LOG2E);
  epilogue.excluded = diagonals(excluded, "excluded");
  epilogue.special = diagonals(special, "special");
  epilogue.special_ratio = static_cast<float>(special_ratio);
  epilogue.row_ids = memory<int64_t const>(row_ids, rows, ScalarType::Long, {m}, "row_ids");
  epilogue.column_ids = memory<int64_t const>(column_ids, rows, ScalarType::Long, {n}, "column_ids");
  epilogue.own_column = static_cast<int>(own_column);
  epilogue.row_coefficient = memory<float const>(row_coefficient, rows, ScalarType::Float, {m}, "row_coefficient");
  epilogue.column_coefficient =
      memory<float const>(column_coefficient, rows, ScalarType::Float, {n}, "column_coefficient");
  epilogue.row_sums = memory<float>(row_sums, rows, ScalarType::Float, {column_tiles, m}, "row_sums");
  epilogue.column_sums = memory<float>(column_sums, rows, ScalarType::Float, {row_tiles, summed}, "column_sums");
  epilogue.summed_columns = static_cast<int>(summed);
  for (float const* pairs : {epilogue.column_factor, epilogue.column_coefficient})
    STD_TORCH_CHECK(
        reinterpret_cast<uintptr_t>(pairs) % 8 == 0,
        "column_factor and column_coefficient must begin at a multiple of 8 bytes.");

  Call call{};
  call.fp16 = fp16;
  call.ids = row_ids.has_value();
  call.policy = known ? Policy::known : weights ? Policy::rows : Policy::sums;
  call.rows = rows.const_data_ptr();
  call.rows_stride = rows.stride(0);
  call.columns = columns.const_data_ptr();
  call.columns_stride = columns.stride(0);
  call.width = static_cast<int>(width);
  call.weights = weights ? weights->mutable_data_ptr() : nullptr;
  call.weights_stride = weights ? weights->stride(0) : 0;
  call.epilogue = epilogue;
  call.device = rows.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(call.device);
  call.stream = current_stream(call.device);
  char const* const error = write_weights(call);
  STD_TORCH_CHECK(error == nullptr, "contrastive_weights: ", error);
}

std::vector<int64_t> tile() { return {TILE_M, TILE_N}; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sbert_kernels_cuda, library) {
  library.def(
      "contrastive_weights(Tensor rows, Tensor columns, Tensor row_factor, Tensor column_factor, float scale, "
      "float shift, int[] excluded, int[] special, float special_ratio, Tensor? row_ids, Tensor? column_ids, "
      "int own_column, Tensor? row_coefficient, Tensor? column_coefficient, Tensor(a!)? weights, "
      "Tensor(b!)? row_sums, Tensor(c!)? column_sums) -> ()");
  library.def("tile() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(sbert_kernels_cuda, CUDA, library) {
  library.impl("contrastive_weights", TORCH_BOX(&contrastive_weights));
}

STABLE_TORCH_LIBRARY_IMPL(sbert_kernels_cuda, CompositeExplicitAutograd, library) {
  library.impl("tile", TORCH_BOX(&tile));
}

}  // namespace sbert_kernels::contrastive
