"""The contrastive operation as one operator of a torch.compile graph.

A compiler can't look into a backend's loops over reused buffers, and would freeze the settings that a backend is chosen
by. So the graph holds this operator, and everything behind it happens at run time, as in an eager call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Optional

import torch
from torch import Tensor

from .. import backends
from ..backends.problem import ContrastiveProblem, ContrastiveResult, Needs, check_scale


def run(problem: ContrastiveProblem, backend: str | None, needs: Needs) -> ContrastiveResult:
    """What :func:`evaluate` gives, while torch.compile traces the call."""
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


def distinct(inputs: Sequence[Tensor | float | None]) -> list[Tensor | float | None]:
    """The inputs, a tensor that plays two roles as a view of itself in the second: a graph takes no tensor twice."""
    result: list[Tensor | float | None] = []
    for value in inputs:
        again = isinstance(value, Tensor) and any(value is other for other in result)
        result.append(value.view_as(value) if again else value)
    return result


def evaluate(problem: ContrastiveProblem, backend: str | None, needs: Needs) -> ContrastiveResult:
    """Loss and gradients by the backend of this name, or by the first that serves the problem."""
    return _computed_by(backends.choose("contrastive", backend, problem).backend, problem, needs)


def _computed_by(backend: backends.Backend, problem: ContrastiveProblem, needs: Needs) -> ContrastiveResult:
    function = backend.function("contrastive")
    # Under autocast the embeddings arrive in low precision; what the products here use is the backend's choice.
    with torch.autocast(problem.device.type, enabled=False), torch.no_grad():
        return function(problem, needs)


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
    chosen = backends.choose("contrastive", backend, problem).backend
    if chosen.uses_autograd and any(needs):
        raise RuntimeError(
            f"backend {chosen.name!r} differentiates by autograd, which is off inside a compiled graph: call it "
            "outside of torch.compile, or choose another backend."
        )
    result = _computed_by(chosen, problem, Needs(*needs))
    return [problem.queries.new_empty(0) if x is None else x for x in result]


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
