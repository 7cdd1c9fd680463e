"""The kernels that bring the factors of the rows in, after the sums over the columns: each row is read once.

Weights that were written before their sum was known lack the row's factors: its inverse norm f, and

    c = coefficient exp(shift - logsumexp)          # coefficient: row weight times prefix weight

Both products with them need the factors: the columns' gradient takes rows that are multiplied by c f beforehand, the
rows' gradient is multiplied by c f afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launching import Prepared, cdiv
from . import tiles
from .epilogue import LARGEST, LOG2E
from .plan import Plan


@triton.jit(do_not_specialize=["n_rows"])
def scale_rows(
    rows,  # Side of n_rows vectors
    n_rows,
    width,
    maximum,  # (n_rows,) base 2: what was subtracted from the logits of each row; None: `shift`
    shift,  # natural units
    logsumexp,  # (n_rows,) base 2
    coefficient,  # (n_rows,); None: 1
    row_coefficient,  # (n_rows,): c 2^ROW_LIFT, an output
    scaled,  # (n_rows, width): the vectors times c f 2^ROW_LIFT, an output; None: not wanted
    ROW_LIFT: tl.constexpr,  # so that c of a row with a large sum and a small weight keeps its digits
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes the coefficient of each row, and multiplies the rows by their factors."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < n_rows
    if maximum is not None:
        # As where the weights were written, see `epilogue.finite`; but a row without entries has no weights, and a
        # coefficient of 0, as any other one might be infinite.
        subtracted = tl.minimum(tl.load(maximum + row, mask=inside, other=0.0), LARGEST)
    else:
        subtracted = shift * LOG2E
    c = tl.exp2(subtracted - tl.load(logsumexp + row, mask=inside, other=0.0) + ROW_LIFT)
    if coefficient is not None:
        c *= tl.load(coefficient + row, mask=inside, other=0.0)
    tl.store(row_coefficient + row, c, mask=inside)
    if scaled is not None:
        f = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
        if rows.inverse_norms is not None:
            f = tl.load(rows.inverse_norms + row, mask=inside, other=0.0)
        vectors = rows.vectors + row.to(tl.int64)[:, None] * rows.stride
        for begin in range(0, width, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            mask = inside[:, None] & (d < width)[None, :]
            x = tl.load(vectors + d[None, :], mask=mask, other=0.0).to(tl.float32)
            # Unit length first: the product of the factors may leave fp32 where the result does not.
            x = (x * f[:, None]) * c[:, None]
            at = row.to(tl.int64)[:, None] * width + d[None, :]
            tl.store(scaled + at, x.to(scaled.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def add_rows(
    found,  # (n_rows, width) fp32: product of weights and columns
    row_coefficient,  # (n_rows,)
    inverse_norms,  # (n_rows,), or None
    gradient,  # (n_rows, width) fp32, added to
    gradient_stride,
    n_rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the rows' product to their gradient, times the rows' factors."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < n_rows
    c = tl.load(row_coefficient + row, mask=inside, other=0.0)
    f = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if inverse_norms is not None:
        f = tl.load(inverse_norms + row, mask=inside, other=0.0)
    for begin in range(0, width, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < width)[None, :]
        x = tl.load(found + row.to(tl.int64)[:, None] * width + d[None, :], mask=mask, other=0.0)
        to = gradient + row.to(tl.int64)[:, None] * gradient_stride + d[None, :]
        tl.store(to, tl.load(to, mask=mask, other=0.0) + (x * c[:, None]) * f[:, None], mask=mask)


def prepared_scale_rows(plan: Plan, n: int) -> Prepared:
    """Returns the launch of `scale_rows` for n rows."""
    config = tiles.rows_config(plan.target)
    grid = (cdiv(n, config["BLOCK_ROWS"]),)
    return Prepared(scale_rows, grid, config=config, n_rows=n, width=plan.dims[-1], ROW_LIFT=plan.row_lift)


def prepared_add_rows(plan: Plan, n: int) -> Prepared:
    """Returns the launch of `add_rows` for n rows."""
    config, width = tiles.rows_config(plan.target), plan.dims[-1]
    grid = (cdiv(n, config["BLOCK_ROWS"]),)
    return Prepared(add_rows, grid, config=config, gradient_stride=width, n_rows=n, width=width)
