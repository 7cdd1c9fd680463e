"""Ranking losses over scored pairs of texts: CoSENT, and AnglE's angle loss, in O(n log n) time and O(n) memory.

For pairs with scores s, labels l and weights w (1 unless given), all in one batch:

    loss = log(1 + sum over pairs (i, j) with l_i < l_j of w_i w_j exp(scale (s_i - s_j)))

(CoSENT: Huang et al. 2024, doi 10.1109/TASLP.2024.3402087; with AnglE's score: Li and Li 2023, arXiv 2309.12871.) Equal
labels are not compared; without two different labels the loss is 0. The loss is a scalar, so its gradients are computed
with it up to one factor, and the backward pass multiplies by that factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..problems.ranking import Needs, RankingProblem, RankingResult, check_values, comparable
from ..problems.scale import Scale
from ..values import readable
from . import _checks as checks
from . import _traced
from ._autograd import destinations_of, double_backward_guard, learnable, scaled
from ._dispatch import backend_for
from ._gather import gather_rows
from .pairwise import pairwise_similarity


class _Ranking(torch.autograd.Function):
    """The loss with its gradients: tensors that may get one are arguments, everything else is in the problem."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: RankingProblem,
        backend: str | None,
        guard: Tensor,  # (), see double_backward_guard
        *tensors: Tensor | float | None,  # scores, scale, weights
    ) -> Tensor:
        result = _run(problem, backend, Needs(*ctx.needs_input_grad[3:]))
        # Saved in the loss's dtype, not the scores': a gradient scaler multiplies before the rounding.
        ctx.save_for_backward(guard, result.scores, result.scale, result.weights)
        ctx.destinations = destinations_of(tensors)
        return result.loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        guard, *gradients = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *scaled("ranking_loss", gradients, ctx.destinations, wanted, grad_output, guard)


def _run(problem: RankingProblem, backend: str | None, needs: Needs) -> RankingResult:
    if not readable(*problem.tensors()):
        return _traced.ranking(problem, backend, needs)
    check_values(problem)
    with backend_for("ranking", backend, problem) as chosen:
        return chosen.operations.ranking.ranking(problem, needs)


def ranking_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = 20.0,
    weights: Tensor | None = None,
    gather_across_devices: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Returns how far the scores are from the order of the labels.

    The loss is log(1 + sum of exp(scale (s_i - s_j)) over the pairs of pairs with l_i < l_j).

    Differentiable once in ``scores``, and in ``scale`` and ``weights`` where they are tensors; a second derivative
    raises. Deterministic.

    Args:
        scores: One for each pair of texts, [n], of whatever similarity; n may be 0.
        labels: How similar the two texts should be, [n] or [n, 1], of any real type: only their order counts.
        scale: Multiplies the scores: the inverse temperature. A finite number, or a 0-d tensor (a learnable one gets
            its gradient).
        weights: Of the pairs, [n], >= 0; a comparison counts with the product of its two. A weight k is a pair that
            stands k times in the batch.
        gather_across_devices: Compare with the pairs of all ranks, as many as each may have; only scores, labels and
            weights travel. Each rank gets the loss over the union, and gradients of its own scores that are multiplied
            by the number of ranks: averaged over the ranks, as data-parallel training does, they are those of one
            process with all the pairs.
        backend: Name of the backend to use; None lets :func:`sbert_kernels.use_backend` or the library choose.

    Returns:
        The loss, a 0-d tensor; float32, or float64 for float64 scores. Exactly 0 where all labels are
            equal. An infinite score counts as such; one that is not a number makes the loss not a number.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or a value cannot be served (NaN labels, say, which have no order; on a GPU, where
            looking for them would wait for it, the loss is then not a number). The message names the argument.
    """
    problem = _validated(scores, labels, scale, weights)
    if gather_across_devices:
        scores, labels, weights = gather_rows(problem.scores, problem.labels, problem.weights, labels.dtype)
        problem = replace(problem, scores=scores, labels=labels, weights=weights)
    inputs: Sequence[Tensor | float | None] = (problem.scores, problem.scale.given, problem.weights)
    tensors = learnable("ranking_loss", inputs)
    if tensors:
        if not readable(*problem.tensors()):
            inputs = _traced.distinct(inputs)
        return _Ranking.apply(problem, backend, double_backward_guard(tensors), *inputs)
    return _run(problem, backend, Needs()).loss


def cosent_loss(
    x: Tensor,
    y: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    scale: float | Tensor = 20.0,
    weights: Tensor | None = None,
    gather_across_devices: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Returns :func:`ranking_loss` of the cosine similarities of the pairs (x_i, y_i), without copying embeddings.

    Args:
        x: Embeddings, [n, D].
        y: Their partners, [n, D], or C such columns, as :func:`pairwise_similarity` takes them.
        labels: [n], or [C * n], column after column.
        scale, weights, gather_across_devices, backend: See :func:`ranking_loss`.

    Raises:
        TypeError, ValueError: As :func:`ranking_loss` and :func:`pairwise_similarity`.
    """
    (scores,) = pairwise_similarity(x, y, ("cos",), backend=backend)
    return ranking_loss(
        scores,
        labels,
        scale=scale,
        weights=weights,
        gather_across_devices=gather_across_devices,
        backend=backend,
    )


def angle_loss(
    x: Tensor,
    y: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    scale: float | Tensor = 20.0,
    weights: Tensor | None = None,
    gather_across_devices: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Returns :func:`ranking_loss` of AnglE's angle similarities of the pairs; arguments as :func:`cosent_loss`."""
    (scores,) = pairwise_similarity(x, y, ("angle",), backend=backend)
    return ranking_loss(
        scores,
        labels,
        scale=scale,
        weights=weights,
        gather_across_devices=gather_across_devices,
        backend=backend,
    )


def _validated(scores: Any, labels: Any, scale: Any, weights: Any) -> RankingProblem:
    checks.floating("scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"scores must have shape [pairs], got {list(scores.shape)}.")
    if not isinstance(labels, Tensor) or labels.is_complex() or labels.layout != torch.strided:
        got = f"{labels.dtype}, {labels.layout}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a dense tensor of real numbers, got {got}.")
    n = scores.shape[0]  # not len(): it would make a symbolic number of pairs a constant
    if list(labels.shape) not in ([n], [n, 1]) or labels.device != scores.device:
        raise ValueError(
            f"labels must have shape [{n}] or [{n}, 1] on {scores.device}, as the scores, got {list(labels.shape)} on "
            f"{labels.device}."
        )
    checked_scale = Scale(checks.scale_type(scale))
    checks.row_weights(weights, n, scores.device)
    return RankingProblem(scores, comparable(labels.detach().reshape(-1)), checked_scale, weights)
