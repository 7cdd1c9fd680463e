"""The one kernel with matrix products: a block of one side of the similarity matrix against all of the other side.

A program owns BLOCK_OWN rows (or columns, with OWN_COLUMNS) and walks through the other side in blocks:

    s = (own . other) f_own f_other                 # [BLOCK_OWN, D] @ [D, BLOCK_OTHER], f = 1 / norm (cosine)
    z = scale s (+ hardness s), -inf where excluded
    e = exp(z - shift)                              # shift: 0, the running maximum, or the known logsumexp

and keeps what it is asked for: row statistics (maximum, sum of e, sum of e s), the weights w = e f_own f_other (less
1 / count where the column is a further positive) as a matrix, or their product with the other side, which is the
gradient of its own before the norm: [BLOCK_OWN, BLOCK_OTHER] @ [BLOCK_OTHER, D].

Each of these is a constexpr flag derived from a pointer that is None, so the plain kernel has the plain code only.
Sums are fp32, exponents in base 2. A program writes its own rows of its own split: no atomics, the same bits each time.

FLOPs of a call: 2 n_own n_other D for s, the same again for a gradient of at most BLOCK_S entries a program (for more,
programs share the D entries and each computes s anew). Bytes: own once, other once for each block of own (from L2).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, sum, PRECISION: tl.constexpr, OPERAND: tl.constexpr, WIDEN: tl.constexpr):
    """sum + a @ b with operands rounded to OPERAND; the interpreter multiplies them widened, as it cannot bf16."""
    a, b = a.to(OPERAND), b.to(OPERAND)
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def similarities(
    sum,  # (BLOCK_OWN, BLOCK_OTHER)
    own,  # (n_own, D)
    own_stride,
    other,  # (n_other, D)
    other_stride,
    own_index,  # (BLOCK_OWN,)
    other_index,  # (BLOCK_OTHER,)
    n_own,
    n_other,
    width,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """sum + the dot products of entries BEGIN .. END."""
    own_rows = own + own_index.to(tl.int64)[:, None] * own_stride
    other_rows = other + other_index.to(tl.int64)[None, :] * other_stride
    own_inside, other_inside = (own_index < n_own)[:, None], (other_index < n_other)[None, :]
    # A bound that the compiler does not know: it would unroll the loop, and run out of registers.
    for begin in range(BEGIN, tl.minimum(END, width), BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        a_mask, b_mask = own_inside, other_inside
        if (END - BEGIN) % BLOCK_D != 0:
            a_mask, b_mask = own_inside & (d < END)[None, :], other_inside & (d < END)[:, None]
        a = tl.load(own_rows + d[None, :], mask=a_mask, other=0.0)
        b = tl.load(other_rows + d[:, None], mask=b_mask, other=0.0)
        # [BLOCK_OWN, BLOCK_D] @ [BLOCK_D, BLOCK_OTHER] -> [BLOCK_OWN, BLOCK_OTHER]
        sum = product(a, b, sum, PRECISION, OPERAND, WIDEN)
    return sum


@triton.jit
def of_rows(pointer, own_index, other_index, n_own, n_other, absent, OWN_COLUMNS: tl.constexpr):
    """A number of each row of the matrix, to be broadcast over the tile: (BLOCK_OWN, 1) or (1, BLOCK_OTHER)."""
    if OWN_COLUMNS:
        found = tl.load(pointer + other_index, mask=other_index < n_other, other=absent)[None, :]
    else:
        found = tl.load(pointer + own_index, mask=own_index < n_own, other=absent)[:, None]
    return found


@triton.jit
def of_columns(pointer, own_index, other_index, n_own, n_other, absent, OWN_COLUMNS: tl.constexpr):
    """A number of each column of the matrix, to be broadcast over the tile."""
    return of_rows(pointer, own_index, other_index, n_own, n_other, absent, not OWN_COLUMNS)


@triton.jit
def on_diagonals(own_index, other_index, first, stride, COUNT: tl.constexpr, OWN_COLUMNS: tl.constexpr):
    """Where column - row is one of COUNT values, ``stride`` apart: (BLOCK_OWN, BLOCK_OTHER)."""
    found = (own_index + (-first if OWN_COLUMNS else first))[:, None] == other_index[None, :]
    for k in tl.static_range(1, COUNT):
        column = first + k * stride
        found |= (own_index + (-column if OWN_COLUMNS else column))[:, None] == other_index[None, :]
    return found


@triton.jit
def exclude(
    z,  # (BLOCK_OWN, BLOCK_OTHER)
    own_index,
    other_index,
    own_begin,
    other_begin,
    n_other,
    first,
    stride,
    COUNT: tl.constexpr,
    OWN_COLUMNS: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """z with -inf on COUNT diagonals and beyond the end of other. Few tiles have such entries, and only they pay."""
    touched = other_begin + BLOCK_OTHER > n_other
    for k in tl.static_range(COUNT):
        column = first + k * stride
        begin = own_begin + (-column if OWN_COLUMNS else column)
        touched |= (begin < other_begin + BLOCK_OTHER) & (begin + BLOCK_OWN > other_begin)
    if touched:
        excluded = (other_index >= n_other)[None, :]
        if COUNT > 0:
            excluded |= on_diagonals(own_index, other_index, first, stride, COUNT, OWN_COLUMNS)
        z = tl.where(excluded, -float("inf"), z)
    return z


# Numbers that only tell where something is: no kernel for each kind of them. (Of others_a_split it has to be known that
# it is a multiple of 16, as it always is: weights are stored in whole lines.)
@triton.jit(
    do_not_specialize=[
        "n_own",
        "own_factors_stride",
        "other_factors_stride",
        "excluded_first",
        "excluded_stride",
        "negatives_first",
        "negatives_stride",
        "own_column",
        "rows_stride",
    ]
)
def sweep(
    own,  # (n_own, D)
    own_stride,
    other,  # (n_other, D)
    other_stride,
    n_own,
    n_other,
    width,  # D, in a form that the compiler does not know
    own_factors,  # (K, n_own) fp32, 1 / norm of each prefix; None: dot products
    own_factors_stride,
    other_factors,  # (K, n_other)
    other_factors_stride,
    others_a_split,
    scale,
    scale_tensor,  # () fp32; None: it is `scale`
    hardness,
    excluded_first,  # the column excluded for row 0, and how far the next such diagonal is from it
    excluded_stride,
    negatives_first,  # the same of the row's own hard negatives
    negatives_stride,
    row_ids,  # (rows,) int64, of each row's own column
    column_ids,  # (columns,) int64
    own_column,  # of row 0: equal to itself, not a duplicate
    guide_own,  # (n_own, G) fp32
    guide_own_stride,
    guide_other,  # (n_other, G)
    guide_other_stride,
    guide_width,
    guide_own_factors,  # (n_own,)
    guide_other_factors,  # (n_other,)
    threshold,  # (rows,): guide similarity above which a column is excluded
    shift,  # (K, rows) fp32, base 2: what z is known to be less by; None: 0, or the running maximum
    coefficient,  # (K, rows): multiplies the weights of a row; None: 1
    further_share,  # (K, rows): 1 / number of positives of a row
    rows_stride,  # from one prefix to the next in shift, coefficient, further_share
    maximum,  # (splits, K, n_own): base 2, of z; None: no maximum is searched for
    total,  # (splits, K, n_own): sum of e
    similarity_total,  # (splits, K, n_own): sum of e s
    further_count,  # (splits, K, n_own): columns that are further positives
    further_total,  # (splits, K, n_own): the sum of their s
    gradient,  # (splits, n_own, D) fp32
    weights,  # (K, n_own, n_other), in the operands' type: of slice k, the sum over the prefixes that contain it
    own_along,  # (splits, K, n_own): sum of w (own . other) over the other side
    other_along,  # (blocks of own, K, n_other): the same over this block of own
    DIMS: tl.constexpr,  # widths of the K prefixes, ascending
    GUIDE_D: tl.constexpr,
    OWN_COLUMNS: tl.constexpr,
    EXCLUDED: tl.constexpr,  # how many excluded diagonals
    NEGATIVES: tl.constexpr,  # how many diagonals of own negatives differ in hardness
    MOST_ARE_HARD: tl.constexpr,  # hardness counts off these diagonals, else on them
    FURTHER: tl.constexpr,  # duplicates are further positives, else excluded
    LIFT: tl.constexpr,  # weights are written times 2^LIFT, so that fp16 holds them
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GROUP: tl.constexpr,
):
    K: tl.constexpr = len(DIMS)
    D: tl.constexpr = DIMS[K - 1]
    LOG2E: tl.constexpr = 1.4426950408889634
    ONLINE: tl.constexpr = maximum is not None
    MASKED: tl.constexpr = guide_own is not None or (row_ids is not None and not FURTHER)
    WEIGHTED: tl.constexpr = gradient is not None or weights is not None or own_along is not None
    # Blocks of own that are near each other meet the same split, so that L2 serves it.
    blocks, splits = tl.cdiv(n_own, BLOCK_OWN), tl.cdiv(n_other, others_a_split)
    pid = tl.program_id(0)
    first_block = pid // (GROUP * splits) * GROUP
    in_group = tl.minimum(blocks - first_block, GROUP)
    block = first_block + pid % (GROUP * splits) % in_group
    split = pid % (GROUP * splits) // in_group
    own_index = block * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    own_inside = own_index < n_own
    slice_begin = tl.program_id(1) * BLOCK_S
    if scale_tensor is not None:
        scale = tl.load(scale_tensor)

    maxima, sums, weighted_sums, counts, further_sums, alongs = (), (), (), (), (), ()
    for _ in tl.static_range(K):
        maxima += (tl.full((BLOCK_OWN,), -float("inf"), tl.float32),)
        sums += (tl.zeros((BLOCK_OWN,), tl.float32),)
        weighted_sums += (tl.zeros((BLOCK_OWN,), tl.float32),)
        counts += (tl.zeros((BLOCK_OWN,), tl.float32),)
        further_sums += (tl.zeros((BLOCK_OWN,), tl.float32),)
        alongs += (tl.zeros((BLOCK_OWN,), tl.float32),)
    slice_sum = tl.zeros((BLOCK_OWN, BLOCK_S if gradient is not None else 1), tl.float32)

    for begin in range(split * others_a_split, tl.minimum((split + 1) * others_a_split, n_other), BLOCK_OTHER):
        other_index = begin + tl.arange(0, BLOCK_OTHER)
        # [BLOCK_OWN, d_0] @ [d_0, BLOCK_OTHER] -> [BLOCK_OWN, BLOCK_OTHER]
        dot = tl.zeros((BLOCK_OWN, BLOCK_OTHER), tl.float32)
        dot = similarities(
            dot, own, own_stride, other, other_stride, own_index, other_index, n_own, n_other, width,
            0, DIMS[0], BLOCK_D, PRECISION, OPERAND, WIDEN,
        )  # fmt: skip
        # After the product: masks that live through its loop would be packed into registers and out of them again.
        if row_ids is not None:
            row_id = of_rows(row_ids, own_index, other_index, n_own, n_other, 0, OWN_COLUMNS)
            column_id = of_columns(column_ids, own_index, other_index, n_own, n_other, 0, OWN_COLUMNS)
            further = (row_id == column_id) & (other_index < n_other)[None, :]
            further &= ~on_diagonals(own_index, other_index, own_column, 0, 1, OWN_COLUMNS)
            if not FURTHER:
                masked = further
        if guide_own is not None:
            closeness = tl.zeros((BLOCK_OWN, BLOCK_OTHER), tl.float32)
            closeness = similarities(  # [BLOCK_OWN, G] @ [G, BLOCK_OTHER] -> [BLOCK_OWN, BLOCK_OTHER]
                closeness, guide_own, guide_own_stride, guide_other, guide_other_stride, own_index, other_index,
                n_own, n_other, guide_width, 0, GUIDE_D, 32, "ieee", tl.float32, WIDEN,
            )  # fmt: skip
            closeness *= tl.load(guide_own_factors + own_index, mask=own_inside, other=0.0)[:, None]
            closeness *= tl.load(guide_other_factors + other_index, mask=other_index < n_other, other=0.0)[None, :]
            closer = closeness > of_rows(threshold, own_index, other_index, n_own, n_other, 0.0, OWN_COLUMNS)
            if FURTHER and row_ids is not None:
                closer &= ~further
            if row_ids is not None and not FURTHER:
                masked |= closer
            else:
                masked = closer

        # Its last use as the sum over prefixes is in the first slice, which lies in all of them.
        slice_weights = tl.zeros((BLOCK_OWN, BLOCK_OTHER), tl.float32)
        prefix_weights, new_maxima, new_sums, new_weighted, new_counts, new_further, new_alongs = (
            (), (), (), (), (), (), (),
        )  # fmt: skip
        for k in tl.static_range(K):
            if k > 0:  # [BLOCK_OWN, d_k - d_(k-1)] @ [d_k - d_(k-1), BLOCK_OTHER] -> [BLOCK_OWN, BLOCK_OTHER]
                dot = similarities(
                    dot, own, own_stride, other, other_stride, own_index, other_index, n_own, n_other, width,
                    DIMS[k - 1], DIMS[k], BLOCK_D, PRECISION, OPERAND, WIDEN,
                )  # fmt: skip
            s = dot
            if own_factors is not None:
                own_factor = tl.load(own_factors + k * own_factors_stride + own_index, mask=own_inside, other=0.0)
                other_factor = tl.load(
                    other_factors + k * other_factors_stride + other_index, mask=other_index < n_other, other=0.0
                )
                # Never as a tile of factors: it would take as many registers as the similarities. The row's first, in
                # either orientation: z and the logsumexp have to be rounded alike.
                by_own, by_other = own_factor[:, None], other_factor[None, :]
                by_row, by_column = (by_other, by_own) if OWN_COLUMNS else (by_own, by_other)
                s = dot * by_row * by_column
                z = dot * (by_row * (scale * LOG2E)) * by_column
            else:
                z = s * (scale * LOG2E)
            if NEGATIVES > 0:
                hard = on_diagonals(own_index, other_index, negatives_first, negatives_stride, NEGATIVES, OWN_COLUMNS)
                if MOST_ARE_HARD:
                    hard = ~hard
                if FURTHER and row_ids is not None:
                    hard &= ~further
                z = tl.where(hard, s * ((scale + hardness) * LOG2E), z)
            elif MOST_ARE_HARD:
                hard_z = s * ((scale + hardness) * LOG2E)
                z = tl.where(further, z, hard_z) if FURTHER and row_ids is not None else hard_z
            z = exclude(
                z, own_index, other_index, block * BLOCK_OWN, begin, n_other, excluded_first, excluded_stride,
                EXCLUDED, OWN_COLUMNS, BLOCK_OWN, BLOCK_OTHER,
            )  # fmt: skip
            if MASKED:
                z = tl.where(masked, -float("inf"), z)
            if FURTHER and row_ids is not None:
                if further_count is not None:
                    new_counts += (counts[k] + tl.sum(tl.where(further, 1.0, 0.0), 1),)
                    new_further += (further_sums[k] + tl.sum(tl.where(further, s, 0.0), 1),)
                else:
                    new_counts += (counts[k],)
                    new_further += (further_sums[k],)
            else:
                new_counts += (counts[k],)
                new_further += (further_sums[k],)

            if ONLINE:
                found = tl.maximum(maxima[k], tl.max(z, 1))
                # Of an infinite maximum the largest number, of none at all 0: inf - inf is not a number.
                least = tl.where(found == -float("inf"), 0.0, tl.minimum(found, 3.0e38))
                before = tl.where(maxima[k] == -float("inf"), 0.0, tl.exp2(tl.minimum(maxima[k], 3.0e38) - least))
                e = tl.exp2(z - least[:, None])
                new_maxima += (found,)
            else:
                before = 1.0
                new_maxima += (maxima[k],)
                if shift is not None:
                    z -= of_rows(shift + k * rows_stride, own_index, other_index, n_own, n_other, 0.0, OWN_COLUMNS)
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
                if FURTHER and row_ids is not None and further_share is not None:
                    share = of_rows(
                        further_share + k * rows_stride, own_index, other_index, n_own, n_other, 0.0, OWN_COLUMNS
                    )
                    w = tl.where(further, e - share, e)
                if coefficient is not None:
                    w *= of_rows(
                        coefficient + k * rows_stride, own_index, other_index, n_own, n_other, 0.0, OWN_COLUMNS
                    )
                if own_factors is not None:
                    w = w * by_row * by_column
                if own_along is not None:
                    along = tl.where(w == 0.0, 0.0, w * dot)
                    new_alongs += (alongs[k] + tl.sum(along, 1),)
                    tl.store(
                        other_along + (block.to(tl.int64) * K + k) * n_other + other_index,
                        tl.sum(along, 0),
                        mask=other_index < n_other,
                    )
                else:
                    new_alongs += (alongs[k],)
                prefix_weights += (w,)
        maxima, sums, weighted_sums, counts, further_sums, alongs = (
            new_maxima, new_sums, new_weighted, new_counts, new_further, alongs if not WEIGHTED else new_alongs,
        )  # fmt: skip

        if weights is not None:
            inside = own_inside[:, None] & (other_index < n_other)[None, :]
            for back in tl.static_range(K):
                slice_weights += prefix_weights[K - 1 - back]
                at = ((K - 1 - back) * n_own + own_index.to(tl.int64))[:, None] * n_other + other_index[None, :]
                lifted = slice_weights * (2.0**LIFT)
                tl.store(weights + at, lifted.to(weights.dtype.element_ty), mask=inside)
        if gradient is not None:
            d = slice_begin + tl.arange(0, BLOCK_S)
            values = tl.load(
                other + other_index.to(tl.int64)[:, None] * other_stride + d[None, :],
                mask=(other_index < n_other)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            # [BLOCK_OWN, BLOCK_OTHER] @ [BLOCK_OTHER, BLOCK_S] -> [BLOCK_OWN, BLOCK_S]
            slice_sum = product(prefix_weights[0] * (2.0**LIFT), values, slice_sum, PRECISION, OPERAND, WIDEN)

    for k in tl.static_range(K):
        at = (split * K + k).to(tl.int64) * n_own + own_index
        if ONLINE:
            tl.store(maximum + at, maxima[k], mask=own_inside)
        if total is not None:
            tl.store(total + at, sums[k], mask=own_inside)
        if similarity_total is not None:
            tl.store(similarity_total + at, weighted_sums[k], mask=own_inside)
        if further_count is not None:
            tl.store(further_count + at, counts[k], mask=own_inside)
            tl.store(further_total + at, further_sums[k], mask=own_inside)
        if own_along is not None:
            tl.store(own_along + at, alongs[k], mask=own_inside)
    if gradient is not None:
        d = slice_begin + tl.arange(0, BLOCK_S)
        at = (split.to(tl.int64) * n_own + own_index)[:, None] * D + d[None, :]
        tl.store(gradient + at, slice_sum * (2.0**-LIFT), mask=own_inside[:, None] & (d < D)[None, :])
