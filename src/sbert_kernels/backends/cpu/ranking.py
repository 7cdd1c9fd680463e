"""The ranking operation in C++: a radix sort of the labels and two running sums, in double."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import extension
from ...problems.ranking import Needs, RankingProblem, RankingResult


def unsupported(problem: RankingProblem | None) -> str | None:
    """Why this backend cannot serve a problem (None: the most usual one) on the CPU, or None."""
    return extension.load()


def ranking(problem: RankingProblem, needs: Needs) -> RankingResult:
    """Loss and gradients of the ranking operation."""
    scale, weights = problem.scale, problem.weights
    scale_is_tensor = isinstance(scale, Tensor)
    loss, *gradients = torch.ops.sbert_kernels.ranking(
        problem.scores.detach().to(problem.dtype).contiguous(),
        problem.labels.contiguous(),
        scale.detach() if scale_is_tensor else None,
        None if weights is None else weights.detach().to(torch.float64).contiguous(),
        1.0 if scale_is_tensor else float(scale),
        needs,
    )
    return RankingResult(loss, *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)))
