"""The problem of the `ranking` operation, and its result.

Symbols used on every floor: n scored pairs, s_i the score of pair i, l_i its label, w_i its weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .scale import Scale


@dataclass(frozen=True)
class RankingProblem:
    """Validated inputs of one call (see :func:`sbert_kernels.ranking_loss` for their meaning)."""

    scores: Tensor  # (n,)
    labels: Tensor  # (n,), comparable
    scale: Scale
    weights: Tensor | None = None  # (n,)

    @property
    def device(self) -> torch.device:
        """The device of scores, labels and weights."""
        return self.scores.device

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns all tensors of the call."""
        found = (self.scores, self.labels, self.scale.tensor, self.weights)
        return tuple(value for value in found if value is not None)

    @property
    def dtype(self) -> torch.dtype:
        """The type of loss and gradients."""
        return torch.float64 if self.scores.dtype == torch.float64 else torch.float32


class Needs(NamedTuple):
    """Says which gradients the caller will use."""

    scores: bool = False
    scale: bool = False
    weights: bool = False


class RankingResult(NamedTuple):
    """The loss and the gradients that were asked for, for a gradient of one on the loss."""

    loss: Tensor  # ()
    scores: Tensor | None = None  # (n,)
    scale: Tensor | None = None  # ()
    weights: Tensor | None = None  # (n,)


def comparable(labels: Tensor) -> Tensor:
    """Returns labels of any type as int64, float32 or float64, which keep their order and can be sorted everywhere."""
    if labels.dtype in (torch.float32, torch.float64):
        return labels
    if labels.dtype == torch.uint64:  # [0, 2^64) moved down to the range of int64
        return labels.view(torch.int64) ^ torch.iinfo(torch.int64).min
    return labels.to(torch.float32 if labels.is_floating_point() else torch.int64)


def check_values(problem: RankingProblem) -> None:
    """Raise ValueError for values that have no ranking.

    On a device they are left unread, as reading would wait for all that comes before them; the loss is then not a
    number.
    """
    value, weights = problem.scale.value, problem.weights
    if value is not None and not math.isfinite(value):
        raise ValueError(f"scale must be a finite number, got {value}.")
    if problem.device.type != "cpu":
        return
    if problem.labels.is_floating_point():
        unordered = int(problem.labels.isnan().sum())
        if unordered:
            raise ValueError(
                f"labels must be numbers that can be ordered, got {unordered} NaN among {problem.labels.numel()}."
            )
    if weights is not None and not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(
            f"weights must be finite and >= 0, got values in {float(weights.min())} .. {float(weights.max())}."
        )
