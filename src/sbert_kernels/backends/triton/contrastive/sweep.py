"""The kernel that multiplies and weighs in one go: dot products become weights, or sums over a row, where they arise.

A program has BLOCK_A rows and walks through some of the columns in blocks:

    dot = row . column                              # [BLOCK_A, D] @ [D, BLOCK_B] -> [BLOCK_A, BLOCK_B], fp32
    e, w from it                                    # see `epilogue`

It writes the sums of its rows over its columns, and the weights in the operands' type, whichever is asked for. A
program writes its own rows of its own split: no atomics, the same bits each time.

FLOPs of a call: 2 n m D. Bytes: the rows once, the columns once for each block of rows (from L2), the weights once.
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
    logits,
    masks,
    product,
    store_sums,
    store_weights,
    weights_of,
)


@triton.jit
def similarities(
    dots,  # (BLOCK_A, BLOCK_B)
    rows,  # (n_rows, D)
    columns,  # (n_columns, D)
    row,  # (BLOCK_A,)
    column,  # (BLOCK_B,)
    n_rows,
    n_columns,
    width,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Returns dots + the dot products of the vectors' entries BEGIN .. END."""
    a = rows.vectors + row.to(tl.int64)[:, None] * rows.stride
    b = columns.vectors + column.to(tl.int64)[None, :] * columns.stride
    a_inside, b_inside = (row < n_rows)[:, None], (column < n_columns)[None, :]
    # A bound that the compiler does not know: it would unroll the loop, and run out of registers.
    for begin in range(BEGIN, tl.minimum(END, width), BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        a_mask, b_mask = a_inside, b_inside
        if (END - BEGIN) % BLOCK_D != 0:
            a_mask, b_mask = a_inside & (d < END)[None, :], b_inside & (d < END)[:, None]
        a_tile = tl.load(a + d[None, :], mask=a_mask, other=0.0)
        b_tile = tl.load(b + d[:, None], mask=b_mask, other=0.0)
        # [BLOCK_A, BLOCK_D] @ [BLOCK_D, BLOCK_B] -> [BLOCK_A, BLOCK_B]
        dots = product(a_tile, b_tile, dots, PRECISION, OPERAND, WIDEN)
    return dots


@triton.jit
def halves(tile, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    """Returns the left and the right half of a tile: (BLOCK_A, BLOCK_B / 2) each."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_A, 2, BLOCK_B // 2)), (0, 2, 1)))


# Positions: a kernel compiled for each kind of them would not be faster. (columns_per_program is not one of them: the
# compiler stores weights in whole lines because it sees that this number is a multiple of 16.)
@triton.jit(do_not_specialize=["n_rows"])
def sweep(
    rows,  # Side of n_rows vectors
    columns,  # Side of n_columns vectors
    n_rows,
    n_columns,
    width,  # D, given at run time, so that the loop over it is not unrolled
    columns_per_program,
    rule,  # Rule
    guide,  # Guide without dots, for the epilogue: products of a guide are the vendor's, and go through `weigh`
    known,  # Known
    sums,  # Sums
    weights,  # (K, n_rows, n_columns), in the operands' type; None: not wanted
    weights_stride,  # from one row to the next
    DIMS: tl.constexpr,  # widths of the K prefixes, ascending
    EXCLUDED: tl.constexpr,  # how many excluded diagonals
    EXCEPTIONS: tl.constexpr,  # how many diagonals are hard, or the only ones that are not
    HARD_EVERYWHERE: tl.constexpr,  # hardness counts off the exceptions, else on them only
    DUPLICATES_ARE_POSITIVE: tl.constexpr,  # duplicates count as positives, else they are excluded
    LIFT: tl.constexpr,  # weights are written times 2^LIFT, so that fp16 holds them
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes dot products of rows and columns, and writes the sums and weights that have a pointer."""
    K: tl.constexpr = len(DIMS)
    ONLINE: tl.constexpr = sums.maximum is not None
    WEIGHTED: tl.constexpr = weights is not None
    # Blocks of rows that are near each other read the same columns at the same time, so that they stay in L2.
    blocks, splits = tl.cdiv(n_rows, BLOCK_A), tl.cdiv(n_columns, columns_per_program)
    pid = tl.program_id(0)
    first_block = pid // (GROUP * splits) * GROUP
    in_group = tl.minimum(blocks - first_block, GROUP)
    block = first_block + pid % (GROUP * splits) % in_group
    split = pid % (GROUP * splits) // in_group
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

    # A wide tile of one prefix is weighed part by part: similarities and weights of all of it would spill registers.
    PARTS: tl.constexpr = BLOCK_B // 64 if K == 1 and BLOCK_B > 64 else 1
    PART: tl.constexpr = BLOCK_B // PARTS
    for begin in range(split * columns_per_program, tl.minimum((split + 1) * columns_per_program, n_columns), BLOCK_B):
        # [BLOCK_A, d_0] @ [d_0, BLOCK_B] -> [BLOCK_A, BLOCK_B]
        dot = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        dot = similarities(
            dot, rows, columns, row, begin + tl.arange(0, BLOCK_B), n_rows, n_columns, width,
            0, DIMS[0], BLOCK_D, PRECISION, OPERAND, WIDEN,
        )  # fmt: skip
        dots = (dot,)
        if PARTS == 2:
            dots = halves(dot, BLOCK_A, BLOCK_B)
        elif PARTS == 4:
            left, right = halves(dot, BLOCK_A, BLOCK_B)
            dots = halves(left, BLOCK_A, BLOCK_B // 2) + halves(right, BLOCK_A, BLOCK_B // 2)
        for part in tl.static_range(PARTS):
            column_begin = begin + part * PART
            column = column_begin + tl.arange(0, PART)
            # After the product: masks that live through its loop would cost registers in it.
            masked, duplicate = masks(rule, guide, row, column, n_rows, n_columns, DUPLICATES_ARE_POSITIVE)
            new_maxima, new_totals, new_similarity, new_counts, new_duplicates, new_radials, of_prefixes = (
                (), (), (), (), (), (), (),
            )  # fmt: skip
            for k in tl.static_range(K):
                if k == 0:
                    part_dot = dots[part]
                else:  # [BLOCK_A, d_k - d_(k-1)] @ [d_k - d_(k-1), BLOCK_B] -> [BLOCK_A, BLOCK_B]
                    part_dot = similarities(
                        part_dot, rows, columns, row, column, n_rows, n_columns, width,
                        DIMS[k - 1], DIMS[k], BLOCK_D, PRECISION, OPERAND, WIDEN,
                    )  # fmt: skip
                s, z = logits(
                    part_dot, k, rows, columns, row, column, block * BLOCK_A, column_begin, n_rows, n_columns,
                    rule, scale, guide, masked, duplicate,
                    EXCLUDED, EXCEPTIONS, HARD_EVERYWHERE, DUPLICATES_ARE_POSITIVE, BLOCK_A, PART,
                )  # fmt: skip
                count, duplicate_total = add_duplicates(sums, s, duplicate, counts[k], duplicate_totals[k])
                new_counts += (count,)
                new_duplicates += (duplicate_total,)
                maximum, total, similarity_total, radial = maxima[k], totals[k], similarity_totals[k], radials[k]
                if ONLINE:
                    maximum, total, similarity_total = add_online(
                        z, s, maximum, total, similarity_total, sums.similarity_total is not None
                    )
                else:
                    e = exponentials(z, k, row, n_rows, known)
                    if sums.total is not None:
                        total += tl.sum(e, 1)
                    if sums.similarity_total is not None:
                        similarity_total += tl.sum(tl.where(e == 0.0, 0.0, e * s), 1)
                    if WEIGHTED:
                        w = weights_of(
                            e, k, rows, columns, row, column, n_rows, n_columns,
                            rule, known, duplicate, DUPLICATES_ARE_POSITIVE,
                        )  # fmt: skip
                        radial = add_radial(sums, w, part_dot, k, radial, block, column, n_columns, K)
                        of_prefixes += (w,)
                new_maxima += (maximum,)
                new_totals += (total,)
                new_similarity += (similarity_total,)
                new_radials += (radial,)
            maxima, totals, similarity_totals, counts, duplicate_totals, radials = (
                new_maxima, new_totals, new_similarity, new_counts, new_duplicates, new_radials,
            )  # fmt: skip
            if WEIGHTED:
                store_weights(weights, weights_stride, of_prefixes, row, column, n_rows, n_columns, LIFT, K)

    for k in tl.static_range(K):
        store_sums(
            sums, split, k, row, n_rows,
            maxima[k], totals[k], similarity_totals[k], counts[k], duplicate_totals[k], radials[k], K,
        )  # fmt: skip
