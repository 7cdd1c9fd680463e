"""The kernel that weighs dot products which a matrix product has written: one pass over them, two for a maximum.

A program has BLOCK_A rows and walks through all of their columns, so that it may find their maximum first:

    e, w from dot                                   # see `epilogue`

The weights may lie in the memory of the dot products: row i's begin where its dot products begin. Numbers of half the
size then overwrite dot products of columns further left, which all threads of the program have read by then: the
barriers see to that. No atomics, the same bits each time.

Bytes of a call: 4 n m K read (twice to find the maximum first), and the weights written.
"""

# Triton unrolls loops over prefixes, in which tuples grow; a type checker cannot follow that.
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import (
    add_duplicates,
    add_online,
    add_radial,
    exponentials,
    finite,
    logits,
    masks,
    store_sums,
    store_weights,
    weights_of,
)


@triton.jit
def dots_of(dots, dots_stride, k, row, column, n_rows, n_columns):
    """Loads dot products of prefix k: (BLOCK_A, BLOCK_B)."""
    at = (k * n_rows + row.to(tl.int64))[:, None] * dots_stride + column[None, :]
    return tl.load(dots + at, mask=(row < n_rows)[:, None] & (column < n_columns)[None, :], other=0.0)


@triton.jit(do_not_specialize=["n_rows"])
def weigh(
    dots,  # (K, n_rows, n_columns) fp32
    dots_stride,  # from one row to the next
    rows,  # Side of n_rows vectors, of which the norms are read
    columns,  # Side of n_columns vectors
    n_rows,
    n_columns,
    rule,  # Rule
    guide,  # Guide
    known,  # Known
    sums,  # Sums, of one split
    weights,  # (K, n_rows, n_columns), in the operands' type; None: not wanted
    weights_stride,
    PREFIXES: tl.constexpr,  # K
    EXCLUDED: tl.constexpr,  # these as in `sweep`
    EXCEPTIONS: tl.constexpr,
    HARD_EVERYWHERE: tl.constexpr,
    DUPLICATES_ARE_POSITIVE: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Turns dot products into the sums and weights that have a pointer."""
    K: tl.constexpr = PREFIXES
    ONLINE: tl.constexpr = sums.maximum is not None
    WEIGHTED: tl.constexpr = weights is not None
    block = tl.program_id(0)
    row = block * BLOCK_A + tl.arange(0, BLOCK_A)
    scale = rule.scale
    if rule.scale_tensor is not None:
        scale = tl.load(rule.scale_tensor)

    maxima, totals, similarity_totals, counts, duplicate_totals, radials = (), (), (), (), (), ()
    for _ in tl.static_range(K):
        maxima += (tl.full((BLOCK_A,), -float("inf"), tl.float32),)
        totals += (tl.zeros((BLOCK_A,), tl.float32),)
        similarity_totals += (tl.zeros((BLOCK_A,), tl.float32),)
        counts += (tl.zeros((BLOCK_A,), tl.float32),)
        duplicate_totals += (tl.zeros((BLOCK_A,), tl.float32),)
        radials += (tl.zeros((BLOCK_A,), tl.float32),)

    if ONLINE:
        for begin in range(0, n_columns, BLOCK_B):
            column = begin + tl.arange(0, BLOCK_B)
            masked, duplicate = masks(rule, guide, row, column, n_rows, n_columns, DUPLICATES_ARE_POSITIVE)
            new_maxima, new_totals, new_similarity, new_counts, new_duplicates = (), (), (), (), ()
            for k in tl.static_range(K):
                dot = dots_of(dots, dots_stride, k, row, column, n_rows, n_columns)
                s, z = logits(
                    dot, k, rows, columns, row, column, block * BLOCK_A, begin, n_rows, n_columns,
                    rule, scale, guide, masked, duplicate,
                    EXCLUDED, EXCEPTIONS, HARD_EVERYWHERE, DUPLICATES_ARE_POSITIVE, BLOCK_A, BLOCK_B,
                )  # fmt: skip
                maximum, total, similarity_total = add_online(
                    z, s, maxima[k], totals[k], similarity_totals[k], sums.similarity_total is not None
                )
                count, duplicate_total = add_duplicates(sums, s, duplicate, counts[k], duplicate_totals[k])
                new_maxima += (maximum,)
                new_totals += (total,)
                new_similarity += (similarity_total,)
                new_counts += (count,)
                new_duplicates += (duplicate_total,)
            maxima, totals, similarity_totals, counts, duplicate_totals = (
                new_maxima, new_totals, new_similarity, new_counts, new_duplicates,
            )  # fmt: skip
    if WEIGHTED:
        if ONLINE:
            tl.debug_barrier()  # all threads have read the row before one of them writes weights into it
        for begin in range(0, n_columns, BLOCK_B):
            column = begin + tl.arange(0, BLOCK_B)
            masked, duplicate = masks(rule, guide, row, column, n_rows, n_columns, DUPLICATES_ARE_POSITIVE)
            new_totals, new_similarity, new_radials, of_prefixes = (), (), (), ()
            for k in tl.static_range(K):
                dot = dots_of(dots, dots_stride, k, row, column, n_rows, n_columns)
                s, z = logits(
                    dot, k, rows, columns, row, column, block * BLOCK_A, begin, n_rows, n_columns,
                    rule, scale, guide, masked, duplicate,
                    EXCLUDED, EXCEPTIONS, HARD_EVERYWHERE, DUPLICATES_ARE_POSITIVE, BLOCK_A, BLOCK_B,
                )  # fmt: skip
                total, similarity_total, radial = totals[k], similarity_totals[k], radials[k]
                if ONLINE:
                    e = tl.exp2(z - finite(maxima[k])[:, None])
                else:
                    e = exponentials(z, k, row, n_rows, known)
                    if sums.total is not None:
                        total += tl.sum(e, 1)
                    if sums.similarity_total is not None:
                        similarity_total += tl.sum(tl.where(e == 0.0, 0.0, e * s), 1)
                w = weights_of(
                    e, k, rows, columns, row, column, n_rows, n_columns,
                    rule, known, duplicate, DUPLICATES_ARE_POSITIVE,
                )  # fmt: skip
                radial = add_radial(sums, w, dot, k, radial, block, column, n_columns, K)
                of_prefixes += (w,)
                new_totals += (total,)
                new_similarity += (similarity_total,)
                new_radials += (radial,)
            totals, similarity_totals, radials = new_totals, new_similarity, new_radials
            tl.debug_barrier()  # all threads have read these columns before one of them writes weights over them
            store_weights(weights, weights_stride, of_prefixes, row, column, n_rows, n_columns, LIFT, K)

    for k in tl.static_range(K):
        store_sums(
            sums, 0, k, row, n_rows,
            maxima[k], totals[k], similarity_totals[k], counts[k], duplicate_totals[k], radials[k], K,
        )  # fmt: skip
