"""The ranking operation by its definition, a difference for each two pairs, in fp64 with autograd's gradients."""

from __future__ import annotations

import torch

from ...problems.ranking import Needs, RankingProblem, RankingResult


def ranking(problem: RankingProblem, needs: Needs) -> RankingResult:
    """Returns loss and gradients of the ranking operation; holds several n x n matrices."""
    device = problem.device
    leaves = {
        "scores": problem.scores,
        "scale": torch.as_tensor(problem.scale.given, dtype=torch.float64, device=device),
        "weights": torch.ones(len(problem.scores), device=device) if problem.weights is None else problem.weights,
    }
    leaves = {
        name: leaf.detach().to(torch.float64).requires_grad_(wanted)
        for (name, leaf), wanted in zip(leaves.items(), needs, strict=True)
    }
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    scores, scale, weights = leaves.values()
    with torch.set_grad_enabled(bool(wanted)):
        ranked = problem.labels[:, None] < problem.labels[None, :]  # (n, n): the column should score higher
        lower, higher = ranked.nonzero(as_tuple=True)
        differences = scale * (scores[lower] - scores[higher])
        terms = torch.cat([differences, differences.new_zeros(1)])  # the zero is the 1 of log(1 + ...)
        factors = torch.cat([weights[lower] * weights[higher], differences.new_ones(1)])
        largest = terms.detach().amax()
        shift = torch.where(largest.isfinite(), largest, 0.0)  # keeps exp() in range
        loss = shift + torch.log((factors * torch.exp(terms - shift)).sum())
        loss = torch.where(scores.isnan().any(), torch.nan, loss)
    gradients = torch.autograd.grad(loss, [leaves[name] for name in wanted]) if wanted else ()
    results = {name: gradient.to(problem.dtype) for name, gradient in zip(wanted, gradients, strict=True)}
    return RankingResult(loss.detach().to(problem.dtype), **results)
