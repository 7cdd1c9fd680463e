"""The pairwise operation by its definition: torch's own normalisation, complex numbers as such, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...problems.pairwise import EPS, PairwiseGradients, PairwiseProblem


def pairwise(problem: PairwiseProblem) -> tuple[Tensor, ...]:
    """Returns the scores of each similarity, (C * n,)."""
    x, columns = problem.x.detach().double(), [y.detach().double() for y in problem.columns]
    return tuple(scores.to(problem.dtype) for scores in _scores(problem, x, columns))


def pairwise_gradients(
    problem: PairwiseProblem, gradients: Sequence[Tensor | None], needs: Sequence[bool]
) -> PairwiseGradients:
    """Gradients of x and of each column, where needed, from those of the scores."""
    leaves = [
        vectors.detach().double().requires_grad_(need)
        for vectors, need in zip((problem.x, *problem.columns), needs, strict=True)
    ]
    with torch.enable_grad():
        scores = _scores(problem, leaves[0], leaves[1:])
    given = [(s, g.to(s.dtype)) for s, g in zip(scores, gradients, strict=True) if g is not None]
    outputs, flowing = zip(*given, strict=True)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, flowing))
    x, *columns = (
        next(found).to(vectors.dtype) if need else None
        for vectors, need in zip((problem.x, *problem.columns), needs, strict=True)
    )
    return PairwiseGradients(x, tuple(columns))


def _scores(problem: PairwiseProblem, x: Tensor, columns: Sequence[Tensor]) -> list[Tensor]:
    similarity = {"cos": _cos, "dot": _dot, "angle": _angle}
    return [torch.cat([similarity[name](x, y) for y in columns]) for name in problem.similarities]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=1)


def _cos(x: Tensor, y: Tensor) -> Tensor:
    return _dot(F.normalize(x, dim=1, eps=EPS), F.normalize(y, dim=1, eps=EPS))


def _angle(x: Tensor, y: Tensor) -> Tensor:
    """Returns |sum of the real and imaginary parts of x / y|, for unit vectors, whose halves are these parts.

    For these, x / y = x conj(y), summed up over the components.
    """
    real, imaginary = zip(*(_complex(F.normalize(v, dim=1, eps=EPS)) for v in (x, y)), strict=True)
    quotient = (torch.complex(real[0], imaginary[0]) * torch.complex(real[1], -imaginary[1])).sum(dim=1)
    return (quotient.real + quotient.imag).abs()


def _complex(vectors: Tensor) -> tuple[Tensor, Tensor]:
    real, imaginary = F.pad(vectors, (0, vectors.shape[1] % 2)).chunk(2, dim=1)
    return real, imaginary
