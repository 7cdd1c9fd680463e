"""What a kernel does with a tile of dot products, whoever computed them: `sweep` itself, or the vendor for `weigh`.

    s = dot f_row f_column                       # f = 1 / norm (cosine)
    z = scale s (+ hardness s), -inf where excluded
    e = exp(z - shift)                           # shift: a constant, the running maximum, or the known logsumexp
    w = e f_column                               # before the sums are known: the row's factors come later
    w = e coefficient f_row f_column             # once they are; minus 1 / count on duplicates of the positive

Exponents are in base 2, sums in fp32. Every rule of a term is here, and nowhere else in the Triton kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.0e38)  # stands for infinity where infinity minus infinity would be no number


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr, OPERAND: tl.constexpr, WIDEN: tl.constexpr):
    """Returns accumulator + a @ b of OPERAND numbers; WIDEN is for the interpreter, which has no bf16 products."""
    a, b = a.to(OPERAND), b.to(OPERAND)
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def on_diagonals(row, column, first, stride, COUNT: tl.constexpr):
    """Returns where column - row is ``first`` + k ``stride`` for a k below COUNT: (BLOCK_A, BLOCK_B)."""
    found = (row + first)[:, None] == column[None, :]
    for k in tl.static_range(1, COUNT):
        found |= (row + (first + k * stride))[:, None] == column[None, :]
    return found


@triton.jit
def is_duplicate(rule, row, column, n_rows, n_columns):
    """Returns where a column has the id of the row's own column, and is another one: (BLOCK_A, BLOCK_B)."""
    row_id = tl.load(rule.row_ids + row, mask=row < n_rows, other=0)
    column_id = tl.load(rule.column_ids + column, mask=column < n_columns, other=0)
    same = (row_id[:, None] == column_id[None, :]) & (column < n_columns)[None, :]
    return same & ~on_diagonals(row, column, rule.own_column, 0, 1)


@triton.jit
def is_false_negative(guide, row, column, n_rows, n_columns):
    """Returns where the guide finds a column too similar to be a negative: (BLOCK_A, BLOCK_B)."""
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    at = row.to(tl.int64)[:, None] * guide.stride + column[None, :]
    s = tl.load(guide.dots + at, mask=inside, other=0.0)
    s *= tl.load(guide.row_inverse_norms + row, mask=row < n_rows, other=0.0)[:, None]
    s *= tl.load(guide.column_inverse_norms + column, mask=column < n_columns, other=0.0)[None, :]
    return s > tl.load(guide.threshold + row, mask=row < n_rows, other=0.0)[:, None]


@triton.jit
def masks(rule, guide, row, column, n_rows, n_columns, DUPLICATES_ARE_POSITIVE: tl.constexpr):
    """Returns (masked, duplicate): what ids or the guide exclude, and the duplicates of the positive.

    (BLOCK_A, BLOCK_B) each; (1, 1) and False where nothing decides so.
    """
    masked = tl.zeros((1, 1), tl.int1)
    duplicate = tl.zeros((1, 1), tl.int1)
    if rule.row_ids is not None:
        duplicate = is_duplicate(rule, row, column, n_rows, n_columns)
        if not DUPLICATES_ARE_POSITIVE:
            masked = duplicate
    if guide.dots is not None:
        false_negative = is_false_negative(guide, row, column, n_rows, n_columns)
        if rule.row_ids is not None and DUPLICATES_ARE_POSITIVE:
            false_negative &= ~duplicate
        masked = false_negative | masked
    return masked, duplicate


@triton.jit
def factors(side, k, index, n):
    """Returns 1 / norm of prefix k of some vectors: (BLOCK,)."""
    return tl.load(side.inverse_norms + k * side.norms_stride + index, mask=index < n, other=0.0)


@triton.jit
def logits(
    dot,  # (BLOCK_A, BLOCK_B)
    k,
    rows,
    columns,
    row,  # (BLOCK_A,)
    column,  # (BLOCK_B,)
    row_begin,
    column_begin,
    n_rows,
    n_columns,
    rule,
    scale,
    guide,
    masked,
    duplicate,
    EXCLUDED: tl.constexpr,
    EXCEPTIONS: tl.constexpr,
    HARD_EVERYWHERE: tl.constexpr,
    DUPLICATES_ARE_POSITIVE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Returns (s, z): similarities, and logits in base 2 with -inf where excluded."""
    s = dot
    if rows.inverse_norms is not None:
        # Two vectors, not one tile of their products, which would take as many registers as the similarities.
        by_row = factors(rows, k, row, n_rows)[:, None]
        by_column = factors(columns, k, column, n_columns)[None, :]
        s = dot * by_row * by_column
        z = dot * (by_row * (scale * LOG2E)) * by_column
    else:
        z = s * (scale * LOG2E)
    if EXCEPTIONS > 0 or HARD_EVERYWHERE:
        hard_z = s * ((scale + rule.hardness) * LOG2E)
        if EXCEPTIONS > 0:
            hard = on_diagonals(row, column, rule.exceptions, rule.exceptions_stride, EXCEPTIONS)
            if HARD_EVERYWHERE:
                hard = ~hard
            if DUPLICATES_ARE_POSITIVE and rule.row_ids is not None:
                hard &= ~duplicate
            z = tl.where(hard, hard_z, z)
        elif DUPLICATES_ARE_POSITIVE and rule.row_ids is not None:
            z = tl.where(duplicate, z, hard_z)
        else:
            z = hard_z
    # Most tiles have no entry on an excluded diagonal, or beyond the last column: those skip the comparisons.
    touched = column_begin + BLOCK_B > n_columns
    for i in tl.static_range(EXCLUDED):
        first = row_begin + rule.excluded + i * rule.excluded_stride
        touched |= (first < column_begin + BLOCK_B) & (first + BLOCK_A > column_begin)
    if touched:
        excluded = (column >= n_columns)[None, :]
        if EXCLUDED > 0:
            excluded |= on_diagonals(row, column, rule.excluded, rule.excluded_stride, EXCLUDED)
        z = tl.where(excluded, -float("inf"), z)
    if guide.dots is not None or (rule.row_ids is not None and not DUPLICATES_ARE_POSITIVE):
        z = tl.where(masked, -float("inf"), z)
    return s, z


@triton.jit
def finite(maximum):
    """Returns a maximum as a number to subtract: infinity as the largest number, and 0 where there is no entry yet."""
    return tl.where(maximum == -float("inf"), 0.0, tl.minimum(maximum, LARGEST))


@triton.jit
def add_online(z, s, maximum, total, similarity_total, SIMILARITIES: tl.constexpr):
    """Returns the maximum of each row, and its sums of e and e s relative to it, with a tile of logits added."""
    found = tl.maximum(maximum, tl.max(z, 1))
    before = tl.where(maximum == -float("inf"), 0.0, tl.exp2(tl.minimum(maximum, LARGEST) - finite(found)))
    e = tl.exp2(z - finite(found)[:, None])
    if SIMILARITIES:
        similarity_total = similarity_total * before + tl.sum(tl.where(e == 0.0, 0.0, e * s), 1)
    return found, total * before + tl.sum(e, 1), similarity_total


@triton.jit
def weights_of(
    e,  # (BLOCK_A, BLOCK_B)
    k,
    rows,
    columns,
    row,
    column,
    n_rows,
    n_columns,
    rule,
    known,
    duplicate,
    DUPLICATES_ARE_POSITIVE: tl.constexpr,
):
    """Returns the weight of each entry: e times all factors that are known."""
    w = e
    if known.logsumexp is not None:
        if DUPLICATES_ARE_POSITIVE and rule.row_ids is not None and known.positive_share is not None:
            share = tl.load(known.positive_share + k * known.stride + row, mask=row < n_rows, other=0.0)
            w = tl.where(duplicate, e - share[:, None], e)
        if known.coefficient is not None:
            w *= tl.load(known.coefficient + k * known.stride + row, mask=row < n_rows, other=0.0)[:, None]
        if rows.inverse_norms is not None:
            w *= factors(rows, k, row, n_rows)[:, None]
    if columns.inverse_norms is not None:
        w *= factors(columns, k, column, n_columns)[None, :]
    return w


@triton.jit
def store_sums(sums, split, k, row, n_rows, maximum, total, similarity_total, count, duplicate_total, radial, K):
    """Stores what one program has summed up of its rows for prefix k."""
    at = n_rows.to(tl.int64) * (split * K + k) + row
    inside = row < n_rows
    if sums.maximum is not None:
        tl.store(sums.maximum + at, maximum, mask=inside)
    if sums.total is not None:
        tl.store(sums.total + at, total, mask=inside)
    if sums.similarity_total is not None:
        tl.store(sums.similarity_total + at, similarity_total, mask=inside)
    if sums.duplicate_count is not None:
        tl.store(sums.duplicate_count + at, count, mask=inside)
        tl.store(sums.duplicate_similarity_total + at, duplicate_total, mask=inside)
    if sums.row_radial is not None:
        tl.store(sums.row_radial + at, radial, mask=inside)


@triton.jit
def exponentials(z, k, row, n_rows, known):
    """Returns e: the probabilities of the entries if the logsumexp is known, else relative to a constant shift."""
    if known.logsumexp is not None:
        logsumexp = tl.load(known.logsumexp + k * known.stride + row, mask=row < n_rows, other=0.0)
        e = tl.exp2(z - logsumexp[:, None])
    else:
        e = tl.exp2(z - known.shift * LOG2E)
    return e


@triton.jit
def add_duplicates(sums, s, duplicate, count, duplicate_total):
    """Returns how many duplicates of the positive each row has, and the sum of their similarities."""
    if sums.duplicate_count is not None:
        count += tl.sum(tl.where(duplicate, 1.0, 0.0), 1)
        duplicate_total += tl.sum(tl.where(duplicate, s, 0.0), 1)
    return count, duplicate_total


@triton.jit
def add_radial(sums, w, dot, k, radial, block, column, n_columns, K: tl.constexpr):
    """Returns the radial part of the rows' gradient with a tile added; stores that of the columns'."""
    if sums.row_radial is not None:
        part = tl.where(w == 0.0, 0.0, w * dot)
        radial += tl.sum(part, 1)
        at = (block.to(tl.int64) * K + k) * n_columns + column
        tl.store(sums.column_radial + at, tl.sum(part, 0), mask=column < n_columns)
    return radial


@triton.jit
def store_weights(
    weights,  # (K, n_rows, n_columns), of rows `stride` apart
    stride,
    of_prefixes,  # K tiles (BLOCK_A, BLOCK_B)
    row,
    column,
    n_rows,
    n_columns,
    LIFT: tl.constexpr,
    K: tl.constexpr,
):
    """Stores for each slice of the entries the sum of the weights of all prefixes that contain it."""
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    of_slice = of_prefixes[K - 1]
    for back in tl.static_range(K):
        if back > 0:
            of_slice += of_prefixes[K - 1 - back]
        at = ((K - 1 - back) * n_rows + row.to(tl.int64))[:, None] * stride + column[None, :]
        tl.store(weights + at, (of_slice * (2.0**LIFT)).to(weights.dtype.element_ty), mask=inside)
