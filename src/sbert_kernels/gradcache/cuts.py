"""Cuts rows, sorted by length, into mini-batches so that encoding them costs least."""

from __future__ import annotations

import numpy as np

# The search takes at most so many different lengths; others are rounded up. Its time grows as their square.
MOST_LEVELS = 1024


def pack(lengths: np.ndarray, budget: int, per_call: int) -> list[np.ndarray]:
    """Cuts rows into mini-batches of at most ``budget`` padded tokens each (or of one row), at the least cost.

    The cost of a mini-batch is its padded tokens plus ``per_call``. Rows are sorted by length. They are cut between
    different lengths where the sum of the costs is least, which is a shortest path over the lengths that occur, and
    wherever the budget is full.

    Args:
        lengths: Tokens of each row, [n] int.
        budget: The most padded tokens of a mini-batch.
        per_call: The cost of one more call of the encoder, in padded tokens.

    Returns:
        Indices of the rows of each mini-batch, the longest first.
    """
    if not len(lengths):
        return []
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    step = max(1, -(-int(ordered[0]) // MOST_LEVELS))
    level = -(-ordered // step)
    starts = np.flatnonzero(np.diff(level, prepend=level[0] + 1))
    bounds = np.append(starts, len(ordered))
    widths = np.maximum(ordered[starts], 1)
    fitting = np.maximum(budget // widths, 1)
    cost = np.zeros(len(bounds))
    cut_before = np.zeros(len(bounds), dtype=np.int64)
    for end in range(1, len(bounds)):
        rows = bounds[end] - bounds[:end]
        through = cost[:end] + rows * widths[:end] + per_call * -(-rows // fitting[:end])
        cut_before[end] = np.argmin(through)
        cost[end] = through[cut_before[end]]
    cuts = [len(bounds) - 1]
    while cuts[-1]:
        cuts.append(int(cut_before[cuts[-1]]))
    mini_batches = []
    for begin, end in zip(cuts[:0:-1], cuts[-2::-1], strict=True):
        rows = order[bounds[begin] : bounds[end]]
        mini_batches += np.array_split(rows, -(-len(rows) // fitting[begin]))
    return mini_batches
