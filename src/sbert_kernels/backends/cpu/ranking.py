"""The ranking operation in C++: a radix sort of the labels and two running sums, in double."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem.ranking import Needs, RankingProblem, RankingResult
from ._operators import obstacle


def unsupported(problem: RankingProblem | None) -> str | None:
    """Why this backend cannot serve a problem (None: the most usual one) on the CPU, or None."""
    return obstacle(FAKES)


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


def _fake_ranking(
    scores: Tensor,
    labels: Tensor,
    scale_tensor: Tensor | None,
    weights: Tensor | None,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    need_scores, need_scale, need_weights = needs
    return (
        scores.new_empty(()),
        scores.new_empty(scores.shape if need_scores else (0,)),
        scores.new_empty(() if need_scale else (0,)),
        scores.new_empty(scores.shape if need_weights else (0,)),
    )


# After the functions that it names.
FAKES = {"ranking": _fake_ranking}
