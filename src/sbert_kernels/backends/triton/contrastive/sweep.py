"""The kernel with matrix products: a block of one side of the similarity matrix against all of the other side.

One side of the matrix is called A, the other B: rows and columns, or columns and rows with A_IS_COLUMNS. A program
has BLOCK_A vectors of A, and walks through those of B in blocks:

    s = (a . b) f_a f_b                             # [BLOCK_A, D] @ [D, BLOCK_B], f = 1 / norm (cosine)
    z = scale s (+ hardness s), -inf where excluded
    e = exp(z - shift)                              # shift: 0, the running maximum, or the known logsumexp

It writes what it is asked for: row statistics (maximum, sum of e, sum of e s), the weights w = e f_a f_b (minus
1 / count where the column is a duplicate of the positive) as a matrix, or their product with B, which is the gradient
of A before the norm: [BLOCK_A, BLOCK_B] @ [BLOCK_B, D].

Each output is a pointer that may be None, and the compiler drops the code of those that are, so that the plain kernel
has the plain code only. Sums are fp32, exponents in base 2. A program writes its own rows of its own split: no atomics,
the same bits each time.

FLOPs of a call: 2 n_a n_b D for s, the same again for a gradient of at most BLOCK_S entries a program (for more,
several programs share the D entries and each computes s again). Bytes: A once, B once for each block of A (from L2).
"""

# Triton unrolls loops over prefixes, in which tuples grow; a type checker cannot follow that.
# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr, OPERAND: tl.constexpr, WIDEN: tl.constexpr):
    """Returns accumulator + a @ b of OPERAND numbers; WIDEN is for the interpreter, which has no bf16 products."""
    a, b = a.to(OPERAND), b.to(OPERAND)
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def similarities(
    dots,  # (BLOCK_A, BLOCK_B)
    a,  # (n_a, D)
    a_stride,
    b,  # (n_b, D)
    b_stride,
    a_index,  # (BLOCK_A,)
    b_index,  # (BLOCK_B,)
    n_a,
    n_b,
    width,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Returns dots + the dot products of the vectors' entries BEGIN .. END."""
    a_rows = a + a_index.to(tl.int64)[:, None] * a_stride
    b_rows = b + b_index.to(tl.int64)[None, :] * b_stride
    a_inside, b_inside = (a_index < n_a)[:, None], (b_index < n_b)[None, :]
    # A bound that the compiler does not know: it would unroll the loop, and run out of registers.
    for begin in range(BEGIN, tl.minimum(END, width), BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        a_mask, b_mask = a_inside, b_inside
        if (END - BEGIN) % BLOCK_D != 0:
            a_mask, b_mask = a_inside & (d < END)[None, :], b_inside & (d < END)[:, None]
        a_tile = tl.load(a_rows + d[None, :], mask=a_mask, other=0.0)
        b_tile = tl.load(b_rows + d[:, None], mask=b_mask, other=0.0)
        # [BLOCK_A, BLOCK_D] @ [BLOCK_D, BLOCK_B] -> [BLOCK_A, BLOCK_B]
        dots = product(a_tile, b_tile, dots, PRECISION, OPERAND, WIDEN)
    return dots


@triton.jit
def of_row(pointer, a_index, b_index, n_a, n_b, absent, A_IS_COLUMNS: tl.constexpr):
    """Loads a number for each row of the matrix, to broadcast over the tile: (BLOCK_A, 1) or (1, BLOCK_B)."""
    if A_IS_COLUMNS:
        found = tl.load(pointer + b_index, mask=b_index < n_b, other=absent)[None, :]
    else:
        found = tl.load(pointer + a_index, mask=a_index < n_a, other=absent)[:, None]
    return found


@triton.jit
def of_column(pointer, a_index, b_index, n_a, n_b, absent, A_IS_COLUMNS: tl.constexpr):
    """Loads a number for each column of the matrix, to broadcast over the tile."""
    return of_row(pointer, a_index, b_index, n_a, n_b, absent, not A_IS_COLUMNS)


@triton.jit
def on_diagonals(a_index, b_index, first, stride, COUNT: tl.constexpr, A_IS_COLUMNS: tl.constexpr):
    """Returns where column - row is ``first`` + k ``stride`` for a k below COUNT: (BLOCK_A, BLOCK_B)."""
    found = (a_index + (-first if A_IS_COLUMNS else first))[:, None] == b_index[None, :]
    for k in tl.static_range(1, COUNT):
        column = first + k * stride
        found |= (a_index + (-column if A_IS_COLUMNS else column))[:, None] == b_index[None, :]
    return found


@triton.jit
def exclude(
    z,  # (BLOCK_A, BLOCK_B)
    a_index,
    b_index,
    a_begin,
    b_begin,
    n_b,
    first,
    stride,
    COUNT: tl.constexpr,
    A_IS_COLUMNS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Returns z with -inf on COUNT diagonals and beyond the end of B; tiles without such entries skip it."""
    touched = b_begin + BLOCK_B > n_b
    for k in tl.static_range(COUNT):
        column = first + k * stride
        begin = a_begin + (-column if A_IS_COLUMNS else column)
        touched |= (begin < b_begin + BLOCK_B) & (begin + BLOCK_A > b_begin)
    if touched:
        excluded = (b_index >= n_b)[None, :]
        if COUNT > 0:
            excluded |= on_diagonals(a_index, b_index, first, stride, COUNT, A_IS_COLUMNS)
        z = tl.where(excluded, -float("inf"), z)
    return z


# Positions and strides: a kernel compiled for each kind of them would not be faster. (b_per_split is not one of them:
# the compiler stores weights in whole lines because it sees that this number is a multiple of 16.)
@triton.jit(
    do_not_specialize=[
        "n_a",
        "a_inverse_norms_stride",
        "b_inverse_norms_stride",
        "excluded_column",
        "excluded_stride",
        "exceptions_column",
        "exceptions_stride",
        "own_column",
        "rows_stride",
    ]
)
def sweep(
    a,  # (n_a, D)
    a_stride,
    b,  # (n_b, D)
    b_stride,
    n_a,
    n_b,
    width,  # D, given at run time, so that the loop over it is not unrolled
    a_inverse_norms,  # (K, n_a) fp32, 1 / norm of each prefix; None: dot products
    a_inverse_norms_stride,
    b_inverse_norms,  # (K, n_b)
    b_inverse_norms_stride,
    b_per_split,
    scale,
    scale_tensor,  # () fp32; None: it is `scale`
    hardness,
    excluded_column,  # the first excluded column of row 0, and how far the next one is from it
    excluded_stride,
    exceptions_column,  # the same of the diagonals that are exceptions from HARD_EVERYWHERE
    exceptions_stride,
    row_ids,  # (rows,) int64, the id of each row's own column
    column_ids,  # (columns,) int64
    own_column,  # the column that row 0's duplicates are duplicates of; it is none itself
    guide_a,  # (n_a, G) fp32
    guide_a_stride,
    guide_b,  # (n_b, G)
    guide_b_stride,
    guide_width,
    guide_a_inverse_norms,  # (1, n_a)
    guide_b_inverse_norms,  # (1, n_b)
    guide_threshold,  # (rows,): the guide's similarity above which a column is excluded
    shift,  # (K, rows) fp32, base 2: the logsumexp, subtracted from z; None: 0, or the running maximum
    coefficient,  # (K, rows): multiplies the weights of a row; None: 1
    positive_share,  # (K, rows): 1 / number of positives of a row
    rows_stride,  # from one prefix to the next in shift, coefficient, positive_share
    maximum,  # (splits, K, n_a): base 2, of z; None: no maximum is searched for
    total,  # (splits, K, n_a): sum of e
    similarity_total,  # (splits, K, n_a): sum of e s
    duplicate_count,  # (splits, K, n_a): how many columns are duplicates of the positive
    duplicate_similarity_total,  # (splits, K, n_a): the sum of their s
    gradient,  # (splits, n_a, D) fp32
    weights,  # (K, n_a, n_b), in the operands' type: of slice k, the sum over the prefixes that contain it
    a_radial,  # (splits, K, n_a): the radial part of A's gradient, sum of w (a . b) over B
    b_radial,  # (blocks of A, K, n_b): that of B's gradient, over this block of A
    DIMS: tl.constexpr,  # widths of the K prefixes, ascending
    GUIDE_D: tl.constexpr,
    A_IS_COLUMNS: tl.constexpr,
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
    BLOCK_S: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes similarities of A and B, and writes the statistics, weights or gradient that have a pointer."""
    K: tl.constexpr = len(DIMS)
    D: tl.constexpr = DIMS[K - 1]
    LOG2E: tl.constexpr = 1.4426950408889634
    ONLINE: tl.constexpr = maximum is not None
    MASKED: tl.constexpr = guide_a is not None or (row_ids is not None and not DUPLICATES_ARE_POSITIVE)
    WEIGHTED: tl.constexpr = gradient is not None or weights is not None or a_radial is not None
    # Blocks of A that are near each other read the same split of B at the same time, so that it stays in L2.
    blocks, splits = tl.cdiv(n_a, BLOCK_A), tl.cdiv(n_b, b_per_split)
    pid = tl.program_id(0)
    first_block = pid // (GROUP * splits) * GROUP
    in_group = tl.minimum(blocks - first_block, GROUP)
    block = first_block + pid % (GROUP * splits) % in_group
    split = pid % (GROUP * splits) // in_group
    a_index = block * BLOCK_A + tl.arange(0, BLOCK_A)
    a_inside = a_index < n_a
    slice_begin = tl.program_id(1) * BLOCK_S
    if scale_tensor is not None:
        scale = tl.load(scale_tensor)

    maxima, sums, weighted_sums, counts, duplicate_sums, radials = (), (), (), (), (), ()
    for _ in tl.static_range(K):
        maxima += (tl.full((BLOCK_A,), -float("inf"), tl.float32),)
        sums += (tl.zeros((BLOCK_A,), tl.float32),)
        weighted_sums += (tl.zeros((BLOCK_A,), tl.float32),)
        counts += (tl.zeros((BLOCK_A,), tl.float32),)
        duplicate_sums += (tl.zeros((BLOCK_A,), tl.float32),)
        radials += (tl.zeros((BLOCK_A,), tl.float32),)
    slice_sum = tl.zeros((BLOCK_A, BLOCK_S if gradient is not None else 1), tl.float32)

    for begin in range(split * b_per_split, tl.minimum((split + 1) * b_per_split, n_b), BLOCK_B):
        b_index = begin + tl.arange(0, BLOCK_B)
        # [BLOCK_A, d_0] @ [d_0, BLOCK_B] -> [BLOCK_A, BLOCK_B]
        dot = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        dot = similarities(
            dot, a, a_stride, b, b_stride, a_index, b_index, n_a, n_b, width,
            0, DIMS[0], BLOCK_D, PRECISION, OPERAND, WIDEN,
        )  # fmt: skip
        # After the product: masks that live through its loop would cost registers in it.
        if row_ids is not None:
            row_id = of_row(row_ids, a_index, b_index, n_a, n_b, 0, A_IS_COLUMNS)
            column_id = of_column(column_ids, a_index, b_index, n_a, n_b, 0, A_IS_COLUMNS)
            duplicate = (row_id == column_id) & (b_index < n_b)[None, :]
            duplicate &= ~on_diagonals(a_index, b_index, own_column, 0, 1, A_IS_COLUMNS)
            if not DUPLICATES_ARE_POSITIVE:
                masked = duplicate
        if guide_a is not None:
            guide_similarity = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
            guide_similarity = similarities(  # [BLOCK_A, G] @ [G, BLOCK_B] -> [BLOCK_A, BLOCK_B]
                guide_similarity, guide_a, guide_a_stride, guide_b, guide_b_stride, a_index, b_index,
                n_a, n_b, guide_width, 0, GUIDE_D, 32, "ieee", tl.float32, WIDEN,
            )  # fmt: skip
            guide_similarity *= tl.load(guide_a_inverse_norms + a_index, mask=a_inside, other=0.0)[:, None]
            guide_similarity *= tl.load(guide_b_inverse_norms + b_index, mask=b_index < n_b, other=0.0)[None, :]
            false_negative = guide_similarity > of_row(guide_threshold, a_index, b_index, n_a, n_b, 0.0, A_IS_COLUMNS)
            if DUPLICATES_ARE_POSITIVE and row_ids is not None:
                false_negative &= ~duplicate
            if row_ids is not None and not DUPLICATES_ARE_POSITIVE:
                masked |= false_negative
            else:
                masked = false_negative

        # Sum of the weights of the prefixes that contain the slice that is written: all of them contain the first one.
        slice_weights = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        prefix_weights, new_maxima, new_sums, new_weighted, new_counts, new_duplicate_sums, new_radials = (
            (), (), (), (), (), (), (),
        )  # fmt: skip
        for k in tl.static_range(K):
            if k > 0:  # [BLOCK_A, d_k - d_(k-1)] @ [d_k - d_(k-1), BLOCK_B] -> [BLOCK_A, BLOCK_B]
                dot = similarities(
                    dot, a, a_stride, b, b_stride, a_index, b_index, n_a, n_b, width,
                    DIMS[k - 1], DIMS[k], BLOCK_D, PRECISION, OPERAND, WIDEN,
                )  # fmt: skip
            s = dot
            if a_inverse_norms is not None:
                a_factors = a_inverse_norms + k * a_inverse_norms_stride + a_index
                b_factors = b_inverse_norms + k * b_inverse_norms_stride + b_index
                a_inverse_norm = tl.load(a_factors, mask=a_inside, other=0.0)
                b_inverse_norm = tl.load(b_factors, mask=b_index < n_b, other=0.0)
                # Two vectors, not one tile of their products, which would take as many registers as the similarities.
                # The row's norm comes first in either orientation, so that z and the logsumexp are rounded alike.
                by_a, by_b = a_inverse_norm[:, None], b_inverse_norm[None, :]
                by_row, by_column = (by_b, by_a) if A_IS_COLUMNS else (by_a, by_b)
                s = dot * by_row * by_column
                z = dot * (by_row * (scale * LOG2E)) * by_column
            else:
                z = s * (scale * LOG2E)
            if EXCEPTIONS > 0:
                hard = on_diagonals(a_index, b_index, exceptions_column, exceptions_stride, EXCEPTIONS, A_IS_COLUMNS)
                if HARD_EVERYWHERE:
                    hard = ~hard
                if DUPLICATES_ARE_POSITIVE and row_ids is not None:
                    hard &= ~duplicate
                z = tl.where(hard, s * ((scale + hardness) * LOG2E), z)
            elif HARD_EVERYWHERE:
                hard_z = s * ((scale + hardness) * LOG2E)
                z = tl.where(duplicate, z, hard_z) if DUPLICATES_ARE_POSITIVE and row_ids is not None else hard_z
            z = exclude(
                z, a_index, b_index, block * BLOCK_A, begin, n_b, excluded_column, excluded_stride,
                EXCLUDED, A_IS_COLUMNS, BLOCK_A, BLOCK_B,
            )  # fmt: skip
            if MASKED:
                z = tl.where(masked, -float("inf"), z)
            if DUPLICATES_ARE_POSITIVE and row_ids is not None:
                if duplicate_count is not None:
                    new_counts += (counts[k] + tl.sum(tl.where(duplicate, 1.0, 0.0), 1),)
                    new_duplicate_sums += (duplicate_sums[k] + tl.sum(tl.where(duplicate, s, 0.0), 1),)
                else:
                    new_counts += (counts[k],)
                    new_duplicate_sums += (duplicate_sums[k],)
            else:
                new_counts += (counts[k],)
                new_duplicate_sums += (duplicate_sums[k],)

            if ONLINE:
                found = tl.maximum(maxima[k], tl.max(z, 1))
                # +inf becomes the largest number and -inf (no entry yet) 0, since inf - inf is not a number.
                least = tl.where(found == -float("inf"), 0.0, tl.minimum(found, 3.0e38))
                before = tl.where(maxima[k] == -float("inf"), 0.0, tl.exp2(tl.minimum(maxima[k], 3.0e38) - least))
                e = tl.exp2(z - least[:, None])
                new_maxima += (found,)
            else:
                before = 1.0
                new_maxima += (maxima[k],)
                if shift is not None:
                    z -= of_row(shift + k * rows_stride, a_index, b_index, n_a, n_b, 0.0, A_IS_COLUMNS)
                e = tl.exp2(z)
            if total is not None:
                new_sums += (sums[k] * before + tl.sum(e, 1),)
            else:
                new_sums += (sums[k],)
            if similarity_total is not None:
                new_weighted += (weighted_sums[k] * before + tl.sum(tl.where(e == 0.0, 0.0, e * s), 1),)
            else:
                new_weighted += (weighted_sums[k],)

            if WEIGHTED:
                w = e
                if DUPLICATES_ARE_POSITIVE and row_ids is not None and positive_share is not None:
                    share = of_row(positive_share + k * rows_stride, a_index, b_index, n_a, n_b, 0.0, A_IS_COLUMNS)
                    w = tl.where(duplicate, e - share, e)
                if coefficient is not None:
                    w *= of_row(coefficient + k * rows_stride, a_index, b_index, n_a, n_b, 0.0, A_IS_COLUMNS)
                if a_inverse_norms is not None:
                    w = w * by_row * by_column
                if a_radial is not None:
                    radial = tl.where(w == 0.0, 0.0, w * dot)
                    new_radials += (radials[k] + tl.sum(radial, 1),)
                    tl.store(
                        b_radial + (block.to(tl.int64) * K + k) * n_b + b_index,
                        tl.sum(radial, 0),
                        mask=b_index < n_b,
                    )
                else:
                    new_radials += (radials[k],)
                prefix_weights += (w,)
        maxima, sums, weighted_sums, counts, duplicate_sums, radials = (
            new_maxima, new_sums, new_weighted, new_counts, new_duplicate_sums,
            radials if not WEIGHTED else new_radials,
        )  # fmt: skip

        if weights is not None:
            inside = a_inside[:, None] & (b_index < n_b)[None, :]
            for back in tl.static_range(K):
                slice_weights += prefix_weights[K - 1 - back]
                at = ((K - 1 - back) * n_a + a_index.to(tl.int64))[:, None] * n_b + b_index[None, :]
                lifted = slice_weights * (2.0**LIFT)
                tl.store(weights + at, lifted.to(weights.dtype.element_ty), mask=inside)
        if gradient is not None:
            d = slice_begin + tl.arange(0, BLOCK_S)
            values = tl.load(
                b + b_index.to(tl.int64)[:, None] * b_stride + d[None, :],
                mask=(b_index < n_b)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            # [BLOCK_A, BLOCK_B] @ [BLOCK_B, BLOCK_S] -> [BLOCK_A, BLOCK_S]
            slice_sum = product(prefix_weights[0] * (2.0**LIFT), values, slice_sum, PRECISION, OPERAND, WIDEN)

    for k in tl.static_range(K):
        at = (split * K + k).to(tl.int64) * n_a + a_index
        if ONLINE:
            tl.store(maximum + at, maxima[k], mask=a_inside)
        if total is not None:
            tl.store(total + at, sums[k], mask=a_inside)
        if similarity_total is not None:
            tl.store(similarity_total + at, weighted_sums[k], mask=a_inside)
        if duplicate_count is not None:
            tl.store(duplicate_count + at, counts[k], mask=a_inside)
            tl.store(duplicate_similarity_total + at, duplicate_sums[k], mask=a_inside)
        if a_radial is not None:
            tl.store(a_radial + at, radials[k], mask=a_inside)
    if gradient is not None:
        d = slice_begin + tl.arange(0, BLOCK_S)
        at = (split.to(tl.int64) * n_a + a_index)[:, None] * D + d[None, :]
        tl.store(gradient + at, slice_sum * (2.0**-LIFT), mask=a_inside[:, None] & (d < D)[None, :])
