"""The kernel that does rows again whose sum vanished beside the constant that `sweep` subtracted from their logits.

One constant serves all rows as long as the largest logit of a row is not far below it (see `problems.contrastive`). A
row where it is, is rare: all of its columns, and its positive, point away from it. This kernel adds up the splits of
each row, the positive included. A block of rows none of which vanished ends there; it has read some numbers, and nobody
has waited for it. Otherwise the block computes its similarities again: for the maximum of its vanished rows, and once
more for their weights relative to it, if there are weights.

It leaves sums of one split in the form of `Sums`: relative to the constant, or to the maximum of a row done again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import LOG2E, add_online, finite, logits, masks, store_sums, store_weights, weights_of
from .sweep import similarities


@triton.jit
def sum_of_splits(pointer, begin, end, row, n_rows, BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns the sum of (splits, n_rows) numbers over splits begin .. end: (BLOCK_A,)."""
    found = tl.zeros((BLOCK_A,), tl.float32)
    for first in range(begin, end, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        at = split.to(tl.int64)[:, None] * n_rows + row[None, :]
        found += tl.sum(tl.load(pointer + at, mask=(split < end)[:, None] & (row < n_rows)[None, :], other=0.0), 0)
    return found


@triton.jit(do_not_specialize=["n_rows"])
def redo(
    rows,  # Side of n_rows vectors
    columns,  # Side of n_columns vectors
    n_rows,
    n_columns,
    width,
    rule,  # Rule
    guide,  # Guide, without dots
    least,  # a row vanished if its sum is below this
    swept,  # Sums that `sweep` wrote, (splits, n_rows), all terms of the softmax one after the other
    splits,  # of all terms; the first of this term; the one behind its last
    positives,  # similarities of one or two positive pairs: (n_rows,), and (n_rows,) or None
    known,  # Known: the constant that `sweep` subtracted from the logits
    sums,  # Sums of one split
    weights,  # (1, n_rows, n_columns), of which the vanished rows are written again; None: not wanted
    weights_stride,
    DIMS: tl.constexpr,  # (D,); these as in `sweep`
    DIAGONALS: tl.constexpr,  # (EXCLUDED, EXCEPTIONS)
    HARD_EVERYWHERE: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,  # splits that are added up at once
):
    """Adds up the splits of each row, and computes the rows again whose sum vanished."""
    PASSES: tl.constexpr = 2 if weights is not None else 1
    EXCLUDED: tl.constexpr = DIAGONALS[0]
    EXCEPTIONS: tl.constexpr = DIAGONALS[1]
    block = tl.program_id(0)
    row = block * BLOCK_A + tl.arange(0, BLOCK_A)
    inside = row < n_rows
    scale = rule.scale
    if rule.scale_tensor is not None:
        scale = tl.load(rule.scale_tensor)
    everything = sum_of_splits(swept.total, 0, splits[0], row, n_rows, BLOCK_A, BLOCK_S)
    everything += tl.exp2((tl.load(positives[0] + row, mask=inside, other=0.0) * scale - known.shift) * LOG2E)
    if positives[1] is not None:
        everything += tl.exp2((tl.load(positives[1] + row, mask=inside, other=0.0) * scale - known.shift) * LOG2E)
    vanished = inside & (everything < least)

    maximum = tl.full((BLOCK_A,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_A,), tl.float32)
    similarity_total = tl.zeros((BLOCK_A,), tl.float32)
    if tl.max(vanished.to(tl.int32), 0) > 0:
        for pass_ in tl.static_range(PASSES):  # the maximum, then the weights relative to it
            for begin in range(0, n_columns, BLOCK_B):
                column = begin + tl.arange(0, BLOCK_B)
                dot = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
                dot = similarities(
                    dot, rows, columns, row, column, n_rows, n_columns, width,
                    0, DIMS[0], BLOCK_D, PRECISION, OPERAND, WIDEN,
                )  # fmt: skip
                masked, duplicate = masks(rule, guide, row, column, n_rows, n_columns, False)
                s, z = logits(
                    dot, 0, rows, columns, row, column, block * BLOCK_A, begin, n_rows, n_columns, rule, scale, guide,
                    masked, duplicate, EXCLUDED, EXCEPTIONS, HARD_EVERYWHERE, False, BLOCK_A, BLOCK_B,
                )  # fmt: skip
                if pass_ == 0:
                    maximum, total, similarity_total = add_online(
                        z, s, maximum, total, similarity_total, sums.similarity_total is not None
                    )
                else:
                    e = tl.exp2(z - finite(maximum)[:, None])
                    w = weights_of(e, 0, rows, columns, row, column, n_rows, n_columns, rule, known, duplicate, False)
                    # A row beyond the last one is not written.
                    store_weights(
                        weights, weights_stride, (w,), tl.where(vanished, row, n_rows), column, n_rows, n_columns, 0, 1
                    )  # fmt: skip
    maximum = tl.where(vanished, maximum, known.shift * LOG2E)
    total = tl.where(vanished, total, sum_of_splits(swept.total, splits[1], splits[2], row, n_rows, BLOCK_A, BLOCK_S))
    if sums.similarity_total is not None:
        of_splits = sum_of_splits(swept.similarity_total, splits[1], splits[2], row, n_rows, BLOCK_A, BLOCK_S)
        similarity_total = tl.where(vanished, similarity_total, of_splits)
    store_sums(sums, 0, 0, row, n_rows, maximum, total, similarity_total, total, total, total, 1)
