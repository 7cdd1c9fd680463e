"""Similarities of the two texts of each pair, several of them from one read of the embeddings.

    cos    x . y / |x||y|
    dot    x . y
    angle  |sum of the real and imaginary parts of x / y|, for unit vectors whose halves are real and imaginary parts

The angle is AnglE's (Li and Li 2023, arXiv 2309.12871), as sentence-transformers' `pairwise_angle_sim` has it: its
"halves" of an odd dimension D are (D + 1) / 2 and (D - 1) / 2 wide. Norms below 1e-12 count as 1e-12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..problems import pairwise as contract
from ..problems.pairwise import PairwiseProblem
from ..values import readable
from . import _checks as checks
from . import _traced
from ._autograd import double_backward_guard, learnable, once
from ._dispatch import backend_for


class _Pairwise(torch.autograd.Function):
    """The scores; their gradients are computed in the backward pass, from the embeddings alone."""

    @staticmethod
    def forward(
        ctx: Any,
        similarities: tuple[str, ...],
        backend: str | None,
        *vectors: Tensor,  # x (n, D), then the columns of y, (n, D) each
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*vectors)
        ctx.similarities, ctx.backend = similarities, backend
        ctx.set_materialize_grads(False)
        return _scores(PairwiseProblem(vectors[0], vectors[1:], similarities), backend)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, *columns = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if all(gradient is None for gradient in gradients):
            return None, None, *(None for _ in needs)
        problem = PairwiseProblem(x, tuple(columns), ctx.similarities)
        if not readable(x, *columns, *gradients):
            flow = _traced.pairwise_gradients(problem, ctx.backend, gradients, needs)
        else:
            with backend_for("pairwise", ctx.backend, problem) as chosen:
                flow = chosen.operations.pairwise.pairwise_gradients(problem, gradients, needs)
        guard = x
        if torch.is_grad_enabled():
            guard = double_backward_guard([v for v in (x, *columns, *gradients) if v is not None])
        return None, None, *once("pairwise_similarity", [flow.x, *flow.columns], guard)


def _scores(problem: PairwiseProblem, backend: str | None) -> tuple[Tensor, ...]:
    if not readable(problem.x, *problem.columns):
        return _traced.pairwise(problem, backend)
    with backend_for("pairwise", backend, problem) as chosen:
        return chosen.operations.pairwise.pairwise(problem)


def pairwise_similarity(
    x: Tensor,
    y: Tensor | Sequence[Tensor],
    similarities: str | Sequence[str] = ("cos", "angle"),
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Returns similarities of each row of ``x`` to its partner in ``y``, all from one read of the embeddings.

    Differentiable once in ``x`` and ``y``; a second derivative raises. Nothing of the embeddings' size is kept for the
    backward pass but the embeddings. Deterministic.

    Args:
        x: Embeddings, [n, D].
        y: Their partners, [n, D]; or a sequence of C such columns (positives and negatives of each anchor, say).
        similarities: Which of "cos", "dot" and "angle"; no name twice.
        backend: Name of the backend to use; None lets :func:`sbert_kernels.use_backend` or the library choose.

    Returns:
        The scores of each similarity, [C * n]: those of the first column, then those of the second, ...; float32, or
        float64 for float64 embeddings.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or a name cannot be served; the message says which.
    """
    problem = _validated(x, y, similarities)
    vectors: Sequence[Tensor] = (problem.x, *problem.columns)
    if learnable("pairwise_similarity", vectors):
        if not readable(*vectors):
            vectors = _traced.distinct(vectors)
        return _Pairwise.apply(problem.similarities, backend, *vectors)
    return _scores(problem, backend)


def _validated(x: Any, y: Any, similarities: Any) -> PairwiseProblem:
    checks.vectors("x", x, filled=False)
    columns = checks.columns("y", y, "expected the partners of x, one tensor or several", filled=False)
    for index, column in enumerate(columns):
        name = f"y[{index}]"
        checks.alike(name, column, "x", x)
        # Not len(): it would make a symbolic number of rows a constant.
        if column.shape[0] != x.shape[0]:
            raise ValueError(f"{name} has {column.shape[0]} rows, expected {x.shape[0]}, one for each of x.")
    if not isinstance(similarities, Sequence):
        raise TypeError(f"similarities must be a name or a sequence of names, got {type(similarities).__name__}.")
    names = (similarities,) if isinstance(similarities, str) else tuple(similarities)
    for name in names:
        checks.one_of("similarities", name, contract.SIMILARITIES)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"similarities must be different names, at least one, got {list(names)}.")
    return PairwiseProblem(x, columns, names)
