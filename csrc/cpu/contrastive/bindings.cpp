// The operator of the contrastive operation, and the checks that keep a wrong call from the memory.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "../common/isa.h"
#include "../common/memory.h"
#include "problem.h"
#include "wire.h"

namespace sbert_kernels {
namespace {

using at::Tensor;

Vectors vectors(const std::optional<Tensor>& tensor, const char* name, at::ScalarType dtype) {
  Vectors result;
  if (!tensor) return result;
  TORCH_CHECK(
      tensor->device().is_cpu() && tensor->dim() == 2 && tensor->is_contiguous() && tensor->scalar_type() == dtype,
      name, " must be a contiguous CPU matrix of ", dtype, ", got ", tensor->toString(), tensor->sizes());
  result.data = tensor->const_data_ptr();
  result.rows = tensor->size(0);
  result.dimension = tensor->size(1);
  return result;
}

const int64_t* ids(const std::optional<Tensor>& tensor, int64_t rows, const char* name) {
  if (!tensor) return nullptr;
  TORCH_CHECK(
      tensor->device().is_cpu() && tensor->is_contiguous() && tensor->scalar_type() == at::kLong &&
          tensor->numel() == rows,
      name, " must be a contiguous int64 tensor [", rows, "], got ", tensor->toString(), tensor->sizes());
  return tensor->const_data_ptr<int64_t>();
}

void check(Problem& problem) {
  std::vector<bool> positive;
  TORCH_CHECK(problem.rows > 0 && !problem.terms.empty(), "rows and terms must not be empty");
  for (const Term& term : problem.terms) {
    const int64_t rows = problem.rows_of(term).rows, columns = problem.columns_of(term).rows;
    TORCH_CHECK(problem.first_row(term) + problem.rows <= rows, "a term has rows that are not there");
    TORCH_CHECK(0 < term.columns && term.columns <= columns, "a term has columns that are not there");
    TORCH_CHECK(0 <= term.softmax && term.softmax < 4, "softmax must be 0..3, got ", term.softmax);
    problem.softmaxes = std::max(problem.softmaxes, term.softmax + 1);
    const auto inside = [&](int64_t start, const char* what) {
      TORCH_CHECK(
          start >= 0 && start <= term.columns - problem.rows, what, " ", start, " of ", problem.rows,
          " rows leaves the ", term.columns, " columns");
    };
    positive.resize(problem.softmaxes);
    for (const Diagonal& diagonal : term.pairs) {
      inside(diagonal.start, "pair");
      if (diagonal.positive) positive[term.softmax] = true;
    }
    for (const int64_t start : term.excluded) inside(start, "excluded");
    if (problem.ids_of(term)) inside(term.own_column, "own_column");
    TORCH_CHECK(!term.guided || problem.guide_queries.data, "a term needs a guide, and there is none");
    if (term.guided) {
      const Vectors& guide = term.columns_are_queries ? problem.guide_queries : problem.guide_documents;
      TORCH_CHECK(term.columns <= guide.rows, "a term has columns that the guide has not");
    }
  }
  for (const bool found : positive) TORCH_CHECK(found, "every softmax needs a positive pair");
}

std::vector<Slice> slices(c10::IntArrayRef dims, int64_t dimension) {
  std::vector<Slice> result;
  int64_t begin = 0, padded = 0;
  for (const int64_t dim : dims) {
    TORCH_CHECK(begin < dim && dim <= dimension, "dims must ascend from 1 to ", dimension, ", got ", dims);
    const int64_t width = dim - begin, padded_width = (width + 1) / 2 * 2;
    result.push_back({begin, width, padded, padded_width});
    begin = dim;
    padded += padded_width;
  }
  TORCH_CHECK(!result.empty(), "dims must not be empty");
  return result;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs contrastive_op(
    const Tensor& queries, const Tensor& documents, const std::optional<Tensor>& all_queries,
    const std::optional<Tensor>& weights, const std::optional<Tensor>& query_ids,
    const std::optional<Tensor>& document_ids, const std::optional<Tensor>& guide_queries,
    const std::optional<Tensor>& guide_documents, double scale, c10::string_view term_layout,
    c10::ArrayRef<double> terms, c10::IntArrayRef dims, c10::ArrayRef<double> dim_weights, bool cosine,
    std::optional<double> shift, double least_sum, double eps, c10::ArrayRef<double> guide_margins, int64_t row_offset,
    int64_t precision, int64_t block_bytes, std::array<bool, 5> needs) {
  TORCH_CHECK(
      term_layout == kTermLayout, "these kernels were built for other terms (", kTermLayout, ") than those given (",
      term_layout, ")");
  TORCH_CHECK(0 <= precision && precision <= 2, "precision must be 0, 1 or 2, got ", precision);
  TORCH_CHECK(
      precision == 0 || *bfloat16_instructions(), "matmul precision ", precision,
      " needs AVX512-bf16 or AMX, which are not there");
  TORCH_CHECK(
      queries.scalar_type() == at::kFloat || (queries.scalar_type() == at::kBFloat16 && precision == 2),
      "queries must be float32, or bfloat16 for bfloat16 matmuls, got ", queries.scalar_type());
  Problem problem;
  problem.queries = vectors(queries, "queries", queries.scalar_type());
  problem.documents = vectors(documents, "documents", queries.scalar_type());
  problem.all_queries = vectors(all_queries, "all_queries", queries.scalar_type());
  problem.guide_queries = vectors(guide_queries, "guide_queries", at::kFloat);
  problem.guide_documents = vectors(guide_documents, "guide_documents", at::kFloat);
  const int64_t dimension = problem.queries.dimension;
  TORCH_CHECK(
      dimension == problem.documents.dimension && (!all_queries || dimension == problem.all_queries.dimension) &&
          problem.guide_queries.dimension == problem.guide_documents.dimension,
      "embeddings differ in dimension");
  TORCH_CHECK(!guide_queries == !guide_documents, "a guide needs queries and documents");
  problem.bf16 = queries.scalar_type() == at::kBFloat16;
  problem.precision = static_cast<MatmulPrecision>(precision);
  problem.rows = problem.queries.rows;
  TORCH_CHECK(row_offset >= 0 && row_offset <= problem.documents.rows - problem.rows, "row_offset does not fit");
  problem.row_offset = row_offset;
  if (guide_queries) {
    TORCH_CHECK(
        problem.guide_queries.rows == problem.rows && problem.guide_documents.rows == problem.documents.rows &&
            !all_queries,
        "the guide has other rows than the embeddings");
  }
  problem.slices = slices(dims, dimension);
  problem.dim_weights.assign(dim_weights.begin(), dim_weights.end());
  TORCH_CHECK(dim_weights.size() == dims.size(), "dim_weights must be as many as dims");
  problem.query_ids = ids(query_ids, all_queries ? problem.all_queries.rows : problem.rows, "query_ids");
  problem.document_ids = ids(document_ids, problem.documents.rows, "document_ids");
  problem.terms = TermReader(terms).read();
  check(problem);
  problem.cosine = cosine;
  problem.scale = scale;
  TORCH_CHECK(
      0 < problem.scale && std::isfinite(problem.scale), "scale must be positive and finite, got ", problem.scale);
  TORCH_CHECK(!shift || std::isfinite(*shift), "shift must be finite, got ", *shift);
  TORCH_CHECK(shift || least_sum == 0, "least_sum is for a given shift, of which there is none");
  problem.shift = shift;
  problem.least_sum = least_sum;
  problem.eps = eps;
  TORCH_CHECK(guide_margins.size() == 2, "guide_margins must be two numbers");
  problem.guide_margin = guide_margins[0];
  problem.guide_relative_margin = guide_margins[1];
  problem.block_bytes = block_bytes;
  if (weights) {
    TORCH_CHECK(
        weights->device().is_cpu() && weights->is_contiguous() && weights->scalar_type() == at::kDouble &&
            weights->numel() == problem.rows,
        "weights must be a contiguous float64 tensor [", problem.rows, "]");
    problem.weights = weights->const_data_ptr<double>();
  }

  const auto options = queries.options().dtype(at::kFloat);
  const auto gradient = [&](bool wanted, Vectors& of) {
    if (!wanted || !of.data) return at::empty({0}, options);
    Tensor result = at::empty({of.rows, of.dimension}, options);
    advise_huge_pages(result);
    result.zero_();
    of.gradient = result.mutable_data_ptr<float>();
    return result;
  };
  Tensor queries_gradient = gradient(needs[0], problem.queries);
  Tensor documents_gradient = gradient(needs[1], problem.documents);
  Tensor all_queries_gradient = gradient(needs[2], problem.all_queries);
  problem.want_gradient = needs[0] || needs[1] || needs[2] || needs[3];

  const Result result = contrastive(problem);

  Tensor loss = at::empty({}, options), scale_gradient = at::empty({needs[3] ? 1 : 0}, options);
  *loss.mutable_data_ptr<float>() = static_cast<float>(result.loss);
  if (needs[3]) *scale_gradient.mutable_data_ptr<float>() = static_cast<float>(result.scale_gradient);
  Tensor weights_gradient = at::empty({needs[4] ? problem.rows : 0}, options);
  if (needs[4]) {
    float* out = weights_gradient.mutable_data_ptr<float>();
    const double weight_sum = problem.weight_sum();
    for (int64_t i = 0; i < problem.rows; ++i) {
      out[i] = static_cast<float>((result.losses[i] - result.loss) / weight_sum);
    }
  }
  return {loss, queries_gradient, documents_gradient, all_queries_gradient, scale_gradient, weights_gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sbert_kernels, library) {
  library.def(
      "contrastive(Tensor queries, Tensor documents, Tensor? all_queries, Tensor? weights, "
      "Tensor? query_ids, Tensor? document_ids, Tensor? guide_queries, Tensor? guide_documents, float scale, "
      "str term_layout, float[] terms, int[] dims, float[] dim_weights, bool cosine, float? shift, "
      "float least_sum, float eps, float[2] guide_margins, int row_offset, int precision, int block_bytes, "
      "bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(sbert_kernels, CPU, library) { library.impl("contrastive", Operator<contrastive_op>::call); }

}  // namespace sbert_kernels
