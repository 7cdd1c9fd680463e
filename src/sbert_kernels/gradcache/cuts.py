"""Where a sequence of rows, sorted by length, is cut into mini-batches at the least cost."""

from __future__ import annotations

import numpy as np

# Levels of length that the search for the best cuts tells apart; its time grows as their square.
MOST_LEVELS = 1024


def pack(lengths: np.ndarray, budget: int, per_call: int) -> list[np.ndarray]:
    """Cut rows into mini-batches of at most ``budget`` padded tokens each (or of one row), at the least cost.

    The cost of a mini-batch is its padded tokens and ``per_call`` more. Rows are sorted by length and cut between two
    lengths where the sum is least (a shortest path over the lengths that occur), and where the budget is full.

    Args:
        lengths: Tokens of each row, [n] int.

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
