"""The operations as operators of a graph, and of dry runs on tensors without data (:mod:`sbert_kernels.values`).

A compiler can't look into a backend's loops over reused buffers, and would freeze the settings that a backend is chosen
by. So the graph holds an operator, and everything behind it happens at run time, as in an eager call. Where there are
no values at all, the shapes that each operator knows of its results are the results: no backend is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Optional

import torch
from torch import Tensor

from .. import backends
from ..problems import ranking as ranking_contract
from ..problems.contrastive import ContrastiveProblem, ContrastiveResult, Needs, check_scale
from ..problems.pairwise import PairwiseGradients, PairwiseProblem
from ..problems.ranking import RankingProblem, RankingResult
from ._dispatch import computed_by, evaluate


def distinct(inputs: Sequence[Tensor | float | None]) -> list[Tensor | float | None]:
    """The inputs, a tensor that plays two roles as a view of itself in the second: a graph takes no tensor twice."""
    result: list[Tensor | float | None] = []
    for value in inputs:
        again = isinstance(value, Tensor) and any(value is other for other in result)
        result.append(value.view_as(value) if again else value)
    return result


def contrastive(problem: ContrastiveProblem, backend: str | None, needs: Needs) -> ContrastiveResult:
    """The contrastive operation, where no value can be read."""
    values = {field.name: getattr(problem, field.name) for field in fields(problem)}
    scale = values.pop("scale")
    scale_is_tensor = isinstance(scale, Tensor)
    values["directions"] = ",".join(values["directions"])
    for name in ("documents", "guide_documents", "dims", "dim_weights"):
        values[name] = list(values[name])
    for name in ("hardness_strength", "margin"):
        values[name] = float(values[name])
    loss, *gradients = _contrastive_loss(
        **values,
        scale=1.0 if scale_is_tensor else float(scale),
        scale_tensor=scale if scale_is_tensor else None,
        backend=backend,
        needs=list(needs),
    )
    return ContrastiveResult(
        loss, *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    )


# The schema is read from the annotations, in which "X | None" is not known to every supported version of torch.
@torch.library.custom_op("sbert_kernels::contrastive_loss", mutates_args=())
def _contrastive_loss(
    queries: Tensor,
    documents: Sequence[Tensor],
    all_queries: Optional[Tensor],  # noqa: UP045
    scale: float,
    scale_tensor: Optional[Tensor],  # noqa: UP045
    similarity: str,
    directions: str,
    partition_mode: str,
    hardness_mode: Optional[str],  # noqa: UP045
    hardness_strength: float,
    weights: Optional[Tensor],  # noqa: UP045
    query_ids: Optional[Tensor],  # noqa: UP045
    document_ids: Optional[Tensor],  # noqa: UP045
    duplicates: str,
    guide_queries: Optional[Tensor],  # noqa: UP045
    guide_documents: Sequence[Tensor],
    margin_strategy: str,
    margin: float,
    row_offset: int,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    backend: Optional[str],  # noqa: UP045
    needs: Sequence[bool],
) -> list[Tensor]:
    if scale_tensor is not None and scale_tensor.device.type == "cpu":
        check_scale(scale_tensor.item())
    problem = ContrastiveProblem(
        queries=queries,
        documents=tuple(documents),
        all_queries=all_queries,
        scale=scale if scale_tensor is None else scale_tensor,
        similarity=similarity,
        directions=tuple(directions.split(",")),
        partition_mode=partition_mode,
        hardness_mode=hardness_mode,
        hardness_strength=hardness_strength,
        weights=weights,
        query_ids=query_ids,
        document_ids=document_ids,
        duplicates=duplicates,
        guide_queries=guide_queries,
        guide_documents=tuple(guide_documents),
        margin_strategy=margin_strategy,
        margin=margin,
        row_offset=row_offset,
        dims=tuple(dims),
        dim_weights=tuple(dim_weights),
    )
    result = _with_gradients("contrastive", backend, problem, Needs(*needs))
    return [problem.queries.new_empty(0) if x is None else x for x in result]


def _with_gradients(
    operation: str,
    backend: str | None,
    problem: Any,
    needs: Sequence[bool],
    *arguments: Any,
    function: str | None = None,
) -> Any:
    chosen = backends.choose(operation, backend, problem).backend
    if chosen.uses_autograd and any(needs):
        raise RuntimeError(
            f"backend {chosen.name!r} differentiates by autograd, which is off inside a compiled graph: call it "
            "outside of torch.compile, or choose another backend."
        )
    return computed_by(chosen, operation, problem, (*arguments, needs), function)


@_contrastive_loss.register_fake
def _shapes(queries, documents, all_queries, *options):
    *_, needs = options
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32

    def result(wanted: bool, *shape: int) -> Tensor:
        return queries.new_empty(shape, dtype=dtype) if wanted else queries.new_empty(0)

    needs = Needs(*needs)
    # Not len(): it would turn a symbolic number of rows into that of the first batch.
    rows, dimension = queries.shape
    return [
        result(True),
        result(needs.queries, rows, dimension),
        result(needs.documents, sum(column.shape[0] for column in documents), dimension),
        result(needs.all_queries, 0 if all_queries is None else all_queries.shape[0], dimension),
        result(needs.scale),
        result(needs.weights, rows),
    ]


def ranking(problem: RankingProblem, backend: str | None, needs: ranking_contract.Needs) -> RankingResult:
    """The ranking operation, where no value can be read."""
    scale_is_tensor = isinstance(problem.scale, Tensor)
    loss, *gradients = _ranking_loss(
        problem.scores,
        problem.labels,
        1.0 if scale_is_tensor else float(problem.scale),
        problem.scale if scale_is_tensor else None,
        problem.weights,
        backend,
        list(needs),
    )
    return RankingResult(loss, *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)))


@torch.library.custom_op("sbert_kernels::ranking_loss", mutates_args=())
def _ranking_loss(
    scores: Tensor,
    labels: Tensor,
    scale: float,
    scale_tensor: Optional[Tensor],  # noqa: UP045
    weights: Optional[Tensor],  # noqa: UP045
    backend: Optional[str],  # noqa: UP045
    needs: Sequence[bool],
) -> list[Tensor]:
    problem = RankingProblem(scores, labels, scale if scale_tensor is None else scale_tensor, weights)
    ranking_contract.check_values(problem)
    result = _with_gradients("ranking", backend, problem, ranking_contract.Needs(*needs))
    return [scores.new_empty(0) if x is None else x for x in result]


@_ranking_loss.register_fake
def _ranking_shapes(scores, labels, scale, scale_tensor, weights, backend, needs):
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    need_scores, need_scale, need_weights = needs
    return [
        scores.new_empty((), dtype=dtype),
        scores.new_empty(scores.shape, dtype=dtype) if need_scores else scores.new_empty(0),
        scores.new_empty((), dtype=dtype) if need_scale else scores.new_empty(0),
        scores.new_empty(scores.shape, dtype=dtype) if need_weights else scores.new_empty(0),
    ]


def pairwise(problem: PairwiseProblem, backend: str | None) -> tuple[Tensor, ...]:
    """The scores of the pairwise operation, where no value can be read."""
    return tuple(_pairwise(problem.x, list(problem.columns), ",".join(problem.similarities), backend))


@torch.library.custom_op("sbert_kernels::pairwise_similarity", mutates_args=())
def _pairwise(x: Tensor, columns: Sequence[Tensor], similarities: str, backend: Optional[str]) -> list[Tensor]:  # noqa: UP045
    return list(evaluate("pairwise", backend, PairwiseProblem(x, tuple(columns), tuple(similarities.split(",")))))


@_pairwise.register_fake
def _pairwise_shapes(x, columns, similarities, backend):
    problem = PairwiseProblem(x, tuple(columns), tuple(similarities.split(",")))
    rows = x.shape[0] * len(columns)
    return [x.new_empty((rows,), dtype=problem.dtype) for _ in problem.similarities]


def pairwise_gradients(
    problem: PairwiseProblem, backend: str | None, gradients: Sequence[Tensor | None], needs: Sequence[bool]
) -> PairwiseGradients:
    """The gradients of the pairwise operation, where no value can be read."""
    given = [(name, g) for name, g in zip(problem.similarities, gradients, strict=True) if g is not None]
    names, tensors = zip(*given, strict=True)
    found = _pairwise_gradients(problem.x, list(problem.columns), ",".join(names), list(tensors), backend, list(needs))
    x, *columns = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return PairwiseGradients(x, tuple(columns))


@torch.library.custom_op("sbert_kernels::pairwise_similarity_backward", mutates_args=())
def _pairwise_gradients(
    x: Tensor,
    columns: Sequence[Tensor],
    similarities: str,
    gradients: Sequence[Tensor],
    backend: Optional[str],  # noqa: UP045
    needs: Sequence[bool],
) -> list[Tensor]:
    problem = PairwiseProblem(x, tuple(columns), tuple(similarities.split(",")))
    flow = _with_gradients("pairwise", backend, problem, needs, gradients, function="pairwise_gradients")
    return [x.new_empty(0) if gradient is None else gradient for gradient in (flow.x, *flow.columns)]


@_pairwise_gradients.register_fake
def _pairwise_gradient_shapes(x, columns, similarities, gradients, backend, needs):
    return [
        torch.empty_like(v, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for v, need in zip((x, *columns), needs, strict=True)
    ]
