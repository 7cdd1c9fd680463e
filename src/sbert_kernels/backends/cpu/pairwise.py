"""The pairwise operation in C++: each row is read once from memory, in its own type, wherever its rows lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...problems.pairwise import SIMILARITIES, PairwiseGradients, PairwiseProblem


def pairwise(problem: PairwiseProblem) -> tuple[Tensor, ...]:
    """Returns the scores of each similarity, (C * n,)."""
    x, *columns = _operands(problem)
    wanted = [name in problem.similarities for name in SIMILARITIES]
    scores = dict(zip(SIMILARITIES, torch.ops.sbert_kernels.pairwise(x, columns, wanted), strict=True))
    return tuple(scores[name] for name in problem.similarities)


def pairwise_gradients(
    problem: PairwiseProblem, gradients: Sequence[Tensor | None], needs: Sequence[bool]
) -> PairwiseGradients:
    """Gradients of x and of each column, where needed, from those of the scores."""
    x, *columns = _operands(problem)
    given = {
        name: None if gradient is None else gradient.contiguous()
        for name, gradient in zip(problem.similarities, gradients, strict=True)
    }
    found = torch.ops.sbert_kernels.pairwise_backward(x, columns, *map(given.get, SIMILARITIES), list(needs))
    flow = [
        gradient.to(vectors.dtype) if need else None
        for gradient, vectors, need in zip(found, (problem.x, *problem.columns), needs, strict=True)
    ]
    return PairwiseGradients(flow[0], tuple(flow[1:]))


def _operands(problem: PairwiseProblem) -> list[Tensor]:
    """Returns all vectors in one of the types that there are kernels for, with contiguous rows."""
    vectors = (problem.x, *problem.columns)
    dtypes = {v.dtype for v in vectors}
    dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else problem.dtype
    return [_with_contiguous_rows(v.detach().to(dtype)) for v in vectors]


def _with_contiguous_rows(vectors: Tensor) -> Tensor:
    return vectors if vectors.stride(1) == 1 or vectors.shape[1] == 1 else vectors.contiguous()
