"""Puts together what encoders return, mini-batch by mini-batch, for all the rows of a pool.

The second dimension of an output may differ between mini-batches. That of token embeddings [n, tokens, D] does, because
a mini-batch is as wide as its longest text, and so does that of their mask. Each row is then filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import MiniBatch


class Output:
    """Holds one output of an encoder, for all the rows of a pool.

    Args:
        first: The output for the first mini-batch, [n, ...].
        rows: The number of rows of the pool.
        alone: True if the encoder returns nothing else. The second dimension of vectors [n, D] is then fixed.
    """

    def __init__(self, first: Tensor, rows: int, alone: bool) -> None:
        self._values = first.new_zeros(rows, *first.shape[1:])
        self._widths = np.zeros(rows, dtype=np.int64)
        self._fixed = first.ndim < 2 or (first.ndim == 2 and alone)

    def put(self, output: Tensor, mini_batch: MiniBatch) -> None:
        """Stores the output of a mini-batch.

        Raises:
            ValueError: Its shape does not go with that of the mini-batches before.
        """
        before = self._values.shape
        fixed = 1 if self._fixed else 2
        if output.ndim != len(before) or output.shape[fixed:] != before[fixed:]:
            raise ValueError(
                f"an encoder returned {list(output.shape)} for {len(output)} rows, which does not go with "
                f"{list(before[1:])} a row in another mini-batch: only the second of three or more dimensions may "
                "differ."
            )
        index = mini_batch.index(output.device)
        if self._fixed:
            self._values[index] = output
            return
        width = output.shape[1]
        if width > before[1]:
            self._values = F.pad(self._values, [0, 0] * (output.ndim - 2) + [0, width - before[1]])
        self._values[:, :width][index] = output
        self._widths[mini_batch.rows] = width

    def of(self, index: np.ndarray | None) -> Tensor:
        """Returns the rows of a column, in its order, no wider than the mini-batches that they were in.

        Args:
            index: For each row of the column, its row in the pool; None if the column is the pool.
        """
        if index is None:
            return self._values
        values = self._values if self._fixed else self._values[:, : int(self._widths[index].max())]
        return values[torch.from_numpy(index).to(values.device)]


def put(outputs: list[Output], new: Sequence[Tensor], mini_batch: MiniBatch) -> None:
    """Stores the outputs of a mini-batch beside those of the other mini-batches of its pool.

    Args:
        outputs: What the pool has so far; empty before the first mini-batch.
        new: The outputs of the mini-batch.
        mini_batch: The mini-batch.

    Raises:
        ValueError: An output has not one entry for each row, or does not go with those of the mini-batches before.
    """
    rows = len(mini_batch.rows)
    for values in new:
        if not values.ndim or len(values) != rows:
            raise ValueError(f"an encoder must return [{rows}, dimension] for {rows} rows, got {list(values.shape)}.")
    if not outputs:
        outputs += [Output(values, mini_batch.pool.rows, alone=len(new) == 1) for values in new]
    if len(outputs) != len(new):
        raise ValueError(f"an encoder returned {len(outputs)} tensors for one mini-batch and {len(new)} for another.")
    with torch.no_grad():
        for output, values in zip(outputs, new, strict=True):
            output.put(values.detach(), mini_batch)


def gradients_of_rows(columns: Sequence[tuple[Tensor | None, np.ndarray | None]], rows: int) -> Tensor | None:
    """Returns the gradient of one output for all the rows of a pool, or None if no column has any.

    Args:
        columns: For each column its gradient, and for each of its rows the row in the pool (None: the same rows).
        rows: The number of rows of the pool.
    """
    given = [(gradient, index) for gradient, index in columns if gradient is not None]
    if not given:
        return None
    if len(columns) == 1 and given[0][1] is None:
        return given[0][0]
    widest = max((gradient for gradient, _ in given), key=lambda gradient: gradient.shape[1:])
    total = widest.new_zeros(rows, *widest.shape[1:])
    for gradient, index in given:
        as_wide = total if gradient.ndim < 2 else total[:, : gradient.shape[1]]
        as_wide.index_add_(0, torch.from_numpy(index).to(gradient.device), gradient)
    return total
