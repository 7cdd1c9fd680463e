"""The operations as operators of a graph, and of dry runs on tensors without data (:mod:`sbert_kernels.values`).

A compiler can't look into a backend's loops over reused buffers, and would freeze the settings that a backend is chosen
by. So the graph holds an operator, and everything behind it happens at run time, as in an eager call. Where there are
no values at all, the shapes that each operator knows of its results are the results: no backend is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Optional, TypeVar

import torch
from torch import Tensor

from ..backends import Backend, Problem
from ..problems import ranking as ranking_contract
from ..problems.contrastive import ContrastiveProblem, ContrastiveResult, ContrastiveSpec, Needs, check_scale
from ..problems.pairwise import PairwiseGradients, PairwiseProblem
from ..problems.ranking import RankingProblem, RankingResult
from ..problems.scale import Scale
from ._dispatch import backend_for
from ._smoothing import compute_with_smoothing

Input = TypeVar("Input", Tensor, Tensor | float | None)


def distinct(inputs: Sequence[Input]) -> list[Input]:
    """Returns the inputs, with a view in place of a tensor that came before: a graph takes no tensor twice."""
    result: list[Input] = []
    for value in inputs:
        again = isinstance(value, Tensor) and any(value is other for other in result)
        result.append(value.view_as(value) if isinstance(value, Tensor) and again else value)
    return result


@contextmanager
def _backend_in_graph(
    operation: str, requested: str | None, problem: Problem, needs: Sequence[bool]
) -> Iterator[Backend]:
    with backend_for(operation, requested, problem) as backend:
        if backend.by_definition and any(needs):
            raise RuntimeError(
                f"backend {backend.name!r} differentiates by autograd, which is off inside a compiled graph: call it "
                "outside of torch.compile, or choose another backend."
            )
        yield backend


def _filled(like: Tensor, results: Sequence[Tensor | None]) -> list[Tensor]:
    """Returns the results of an operator, which cannot return None: an empty tensor stands for it."""
    return [like.new_empty(0) if result is None else result for result in results]


def _wanted(results: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Returns the gradients that :func:`_filled` was given."""
    return [result if need else None for result, need in zip(results, needs, strict=True)]


def contrastive(problem: ContrastiveProblem, backend: str | None, needs: Needs) -> ContrastiveResult:
    """Returns the result of the contrastive operation, where no value can be read."""
    words, numbers = problem.spec.encoded()
    scale = problem.scale.tensor
    loss, *gradients = _contrastive_loss(
        queries=problem.queries,
        documents=list(problem.documents),
        all_queries=problem.all_queries,
        weights=problem.weights,
        query_ids=problem.query_ids,
        document_ids=problem.document_ids,
        guide_queries=problem.guide_queries,
        guide_documents=list(problem.guide_documents),
        scale=problem.scale.read() if scale is None else 1.0,
        scale_tensor=scale,
        row_offset=problem.row_offset,
        spec=words,
        spec_numbers=numbers,
        backend=backend,
        needs=list(needs),
    )
    return ContrastiveResult(loss, *_wanted(gradients, needs))


# The schema is read from the annotations, in which "X | None" is not known to every supported version of torch.
@torch.library.custom_op("sbert_kernels::contrastive_loss", mutates_args=())
def _contrastive_loss(
    queries: Tensor,
    documents: Sequence[Tensor],
    all_queries: Optional[Tensor],  # noqa: UP045
    weights: Optional[Tensor],  # noqa: UP045
    query_ids: Optional[Tensor],  # noqa: UP045
    document_ids: Optional[Tensor],  # noqa: UP045
    guide_queries: Optional[Tensor],  # noqa: UP045
    guide_documents: Sequence[Tensor],
    scale: float,
    scale_tensor: Optional[Tensor],  # noqa: UP045
    row_offset: int,
    spec: str,  # all options, see problems/_spec.py: a new one changes no signature
    spec_numbers: Sequence[float],
    backend: Optional[str],  # noqa: UP045
    needs: Sequence[bool],
) -> list[Tensor]:
    problem = ContrastiveProblem(
        queries=queries,
        documents=tuple(documents),
        all_queries=all_queries,
        weights=weights,
        query_ids=query_ids,
        document_ids=document_ids,
        guide_queries=guide_queries,
        guide_documents=tuple(guide_documents),
        scale=Scale(scale if scale_tensor is None else scale_tensor),
        row_offset=row_offset,
        spec=ContrastiveSpec.decoded(spec, list(spec_numbers)),
    )
    if problem.scale.value is not None:
        check_scale(problem.scale.value)
    with _backend_in_graph("contrastive", backend, problem, needs) as chosen:
        return _filled(queries, compute_with_smoothing(chosen, problem, Needs(*needs)))


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
    """Returns the result of the ranking operation, where no value can be read."""
    scale = problem.scale.tensor
    loss, *gradients = _ranking_loss(
        scores=problem.scores,
        labels=problem.labels,
        scale=problem.scale.read() if scale is None else 1.0,
        scale_tensor=scale,
        weights=problem.weights,
        backend=backend,
        needs=list(needs),
    )
    return RankingResult(loss, *_wanted(gradients, needs))


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
    problem = RankingProblem(scores, labels, Scale(scale if scale_tensor is None else scale_tensor), weights)
    ranking_contract.check_values(problem)
    with _backend_in_graph("ranking", backend, problem, needs) as chosen:
        return _filled(scores, chosen.operations.ranking.ranking(problem, ranking_contract.Needs(*needs)))


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
    """Returns the scores of the pairwise operation, where no value can be read."""
    return tuple(_pairwise(problem.x, list(problem.columns), ",".join(problem.similarities), backend))


@torch.library.custom_op("sbert_kernels::pairwise_similarity", mutates_args=())
def _pairwise(x: Tensor, columns: Sequence[Tensor], similarities: str, backend: Optional[str]) -> list[Tensor]:  # noqa: UP045
    problem = PairwiseProblem(x, tuple(columns), tuple(similarities.split(",")))
    with backend_for("pairwise", backend, problem) as chosen:
        return list(chosen.operations.pairwise.pairwise(problem))


@_pairwise.register_fake
def _pairwise_shapes(x, columns, similarities, backend):
    problem = PairwiseProblem(x, tuple(columns), tuple(similarities.split(",")))
    rows = x.shape[0] * len(columns)
    return [x.new_empty((rows,), dtype=problem.dtype) for _ in problem.similarities]


def pairwise_gradients(
    problem: PairwiseProblem, backend: str | None, gradients: Sequence[Tensor | None], needs: Sequence[bool]
) -> PairwiseGradients:
    """Returns the gradients of the pairwise operation, where no value can be read."""
    given = [(name, g) for name, g in zip(problem.similarities, gradients, strict=True) if g is not None]
    names, tensors = zip(*given, strict=True)
    found = _pairwise_gradients(problem.x, list(problem.columns), ",".join(names), list(tensors), backend, list(needs))
    x, *columns = _wanted(found, needs)
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
    with _backend_in_graph("pairwise", backend, problem, needs) as chosen:
        found = chosen.operations.pairwise.pairwise_gradients(problem, gradients, needs)
    return _filled(x, (found.x, *found.columns))


@_pairwise_gradients.register_fake
def _pairwise_gradient_shapes(x, columns, similarities, gradients, backend, needs):
    return [
        torch.empty_like(v, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for v, need in zip((x, *columns), needs, strict=True)
    ]
