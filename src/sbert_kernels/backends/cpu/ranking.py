"""The ranking operation in C++: a radix sort of the labels and two running sums, in double."""

from __future__ import annotations

import torch

from ...problems.ranking import Needs, RankingProblem, RankingResult


def ranking(problem: RankingProblem, needs: Needs) -> RankingResult:
    """Returns loss and gradients of the ranking operation."""
    weights = problem.weights
    loss, *gradients = torch.ops.sbert_kernels.ranking(
        scores=problem.scores.detach().to(problem.dtype).contiguous(),
        labels=problem.labels.contiguous(),
        weights=None if weights is None else weights.detach().to(torch.float64).contiguous(),
        scale=problem.scale.read(),
        needs=needs,
    )
    return RankingResult(loss, *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)))
