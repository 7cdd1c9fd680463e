"""Compares what the ranks are about to gather, and gathers the pairs of all ranks for a ranking loss.

Each pair sends at most three numbers (score, label, weight), in one collective, and never an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..values import dry, readable, recorded

# Sent first, so that ranks with different dtypes raise an error instead of misreading each other's bytes.
KINDS = (None, torch.int64, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64)

GATHERING = ("an in-batch loss", "a GIST loss", "a ranking loss")


def several_ranks() -> bool:
    """Returns True if torch.distributed runs with more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def tell(what: str, device: torch.device, *numbers: int) -> list[list[int]]:
    """Returns the numbers of every rank, after a check that all ranks are about to gather for the same kind of loss.

    Ranks may have batches of different data sets in one step, and so run different losses: their collectives would
    meet, and end in a hang, an abort or wrong numbers.

    Args:
        what: One of :data:`GATHERING`.
        numbers: At most 4.

    Raises:
        ValueError: the losses differ; on every rank.
    """
    if "cpu" in dist.get_backend_config():  # no wait for a GPU
        device = torch.device("cpu")
    header = torch.zeros(5, dtype=torch.int64, device=device)
    header[: 1 + len(numbers)] = torch.tensor([GATHERING.index(what), *numbers])
    told = _all_gather(header).tolist()  # (W, 5)
    kinds = [GATHERING[row[0]] for row in told]
    if len(set(kinds)) > 1:
        raise ValueError(
            "gather_across_devices needs the same loss on every rank in every step, but the ranks are about to gather "
            f"for {kinds}: batches of different data sets or formats met in one step."
        )
    return [row[1 : 1 + len(numbers)] for row in told]


def check_batches(what: str, columns: Sequence[Tensor]) -> None:
    """Checks that every rank gathers columns [N, D] of the same number, shape and dtype; does nothing on one rank.

    Raises:
        ValueError: they differ; on every rank.
    """
    if not several_ranks() or not readable(*columns):
        return
    first = columns[0]
    told = tell(what, first.device, len(columns), *first.shape, KINDS.index(first.dtype))
    if any(other != told[0] for other in told):
        described = [f"{count} columns of [{rows}, {width}] {KINDS[kind]}" for count, rows, width, kind in told]
        raise ValueError(f"gather_across_devices needs batches of the same shape on every rank, got {described}.")


def gather_rows(
    scores: Tensor, labels: Tensor, weights: Tensor | None, label_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns scores, comparable labels and weights of the pairs of all ranks, [sum of n], in the order of the ranks.

    ``label_dtype`` is that of the labels before they became comparable.

    The gradient of this rank's scores (and weights) is its part of that of all, times the number of ranks: every rank
    computes the same loss, and the mean of their gradients is to be that of the loss.

    Without a process group of several ranks it returns the arguments.

    Raises:
        ValueError: the ranks disagree on a dtype or on whether there are weights; on every rank.
    """
    if not several_ranks():
        return scores, labels, weights
    # uint64 was moved to int64, where it is not to be compared with what was int64 before.
    label_kind = label_dtype if label_dtype == torch.uint64 else labels.dtype
    kind = [KINDS.index(dtype) for dtype in (scores.dtype, label_kind, None if weights is None else weights.dtype)]
    if recorded() or not dry(scores, labels, weights):
        told = tell("a ranking loss", scores.device, len(scores), *kind)
        counts, kinds = [row[0] for row in told], [row[1:] for row in told]
    else:
        counts, kinds = [len(scores)] * dist.get_world_size(), [kind]  # without data nothing can be told
    if any(other != kind for other in kinds):
        described = [
            ", ".join(f"{name}: {KINDS[k]}" for name, k in zip(("scores", "labels", "weights"), other, strict=True))
            for other in kinds
        ]
        raise ValueError(f"gather_across_devices needs the same types on every rank, got {described}.")

    columns = [column for column in (scores, labels, weights) if column is not None]
    packed = torch.zeros(len(columns), max(counts), dtype=torch.int64, device=scores.device)
    for row, column in zip(packed, columns, strict=True):
        wide = column.detach()
        row[: len(wide)] = wide if wide.dtype == torch.int64 else wide.to(torch.float64).view(torch.int64)
    everyone = _all_gather(packed)  # (W, columns, most pairs of a rank)
    gathered: list[Tensor] = []
    begin = sum(counts[: dist.get_rank()])
    for index, column in enumerate(columns):
        joined = torch.cat([rows[index, :count] for rows, count in zip(everyone, counts, strict=True)])
        if column.dtype != torch.int64:
            joined = joined.view(torch.float64).to(column.dtype)
        gathered.append(_Joined.apply(column, joined, begin) if column.requires_grad else joined)
    return gathered[0], gathered[1], gathered[2] if weights is not None else None


def _all_gather(value: Tensor) -> Tensor:
    """Returns the tensors of all ranks, which have one shape, as (W, *shape)."""
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value)
    return torch.stack(parts)


class _Joined(torch.autograd.Function):
    """The values of all ranks as a function of this rank's."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, joined: Tensor, begin: int) -> Tensor:
        ctx.begin, ctx.count = begin, len(own)
        return joined

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output[ctx.begin : ctx.begin + ctx.count] * dist.get_world_size(), None, None
