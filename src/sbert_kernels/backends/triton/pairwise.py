"""The pairwise operation in Triton kernels: an embedding is read once for all its scores, and once for its gradient.

Formulas as in `backends/blockwise/pairwise.py`; sums in fp32. Traffic of a pair: 2 D numbers for the scores; for the
gradients 2 D read (twice, the second time from the cache) and 2 D written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problems.pairwise import EPS, SIMILARITIES, PairwiseGradients, PairwiseProblem
from .launching import Config, cdiv, launch
from .layout import with_unit_stride

CONFIG = Config((("BLOCK_ROWS", 4), ("BLOCK_D", 128)), 4, 1)


@triton.jit
def _halves(rows, d, inside, HALF: tl.constexpr, D: tl.constexpr):
    """Loads the real and the imaginary parts d of each row: (BLOCK_ROWS, BLOCK_D) twice."""
    real = tl.load(rows + d[None, :], mask=inside[:, None] & (d < HALF)[None, :], other=0.0)
    imaginary = tl.load(rows + HALF + d[None, :], mask=inside[:, None] & (HALF + d < D)[None, :], other=0.0)
    return real.to(tl.float32), imaginary.to(tl.float32)


@triton.jit
def _sums(x_rows, y_rows, inside, HALF: tl.constexpr, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns x . y, what the angle adds to it, |x|^2 and |y|^2: (BLOCK_ROWS,) each."""
    dots = tl.zeros((BLOCK_ROWS,), tl.float32)
    sines = tl.zeros((BLOCK_ROWS,), tl.float32)
    x_squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    y_squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    for begin in range(0, HALF, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        a, b = _halves(x_rows, d, inside, HALF, D)
        c, e = _halves(y_rows, d, inside, HALF, D)
        dots += tl.sum(a * c + b * e, 1)
        sines += tl.sum(b * c - a * e, 1)
        x_squares += tl.sum(a * a + b * b, 1)
        y_squares += tl.sum(c * c + e * e, 1)
    return dots, sines, x_squares, y_squares


@triton.jit(do_not_specialize=["n"])
def pair_scores(
    x,  # (n, D)
    x_stride,
    y,  # (n, D)
    y_stride,
    n,
    eps,
    cos,  # (n,) fp32, or None
    dot,  # (n,)
    angle,  # (n,)
    HALF: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes the scores of each pair that have a pointer."""
    index = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = index < n
    x_rows = x + index.to(tl.int64)[:, None] * x_stride
    y_rows = y + index.to(tl.int64)[:, None] * y_stride
    dots, sines, x_squares, y_squares = _sums(x_rows, y_rows, inside, HALF, D, BLOCK_ROWS, BLOCK_D)
    both = 1.0 / tl.maximum(tl.sqrt(x_squares), eps) / tl.maximum(tl.sqrt(y_squares), eps)
    if dot is not None:
        tl.store(dot + index, dots, mask=inside)
    if cos is not None:
        tl.store(cos + index, dots * both, mask=inside)
    if angle is not None:
        tl.store(angle + index, tl.abs((dots + sines) * both), mask=inside)


@triton.jit(do_not_specialize=["n"])
def pair_gradients(
    x,  # (n, D)
    x_stride,
    y,  # (n, D)
    y_stride,
    n,
    eps,
    cos,  # (n,) gradient of the score, or None
    dot,  # (n,)
    angle,  # (n,)
    x_gradient,  # (n, D), or None
    y_gradient,  # (n, D), or None
    ADD: tl.constexpr,  # to x_gradient
    HALF: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes the gradients of x and y from those of the scores."""
    index = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = index < n
    x_rows = x + index.to(tl.int64)[:, None] * x_stride
    y_rows = y + index.to(tl.int64)[:, None] * y_stride
    dots, sines, x_squares, y_squares = _sums(x_rows, y_rows, inside, HALF, D, BLOCK_ROWS, BLOCK_D)
    x_norm, y_norm = tl.sqrt(x_squares), tl.sqrt(y_squares)
    x_inverse, y_inverse = 1.0 / tl.maximum(x_norm, eps), 1.0 / tl.maximum(y_norm, eps)
    both = x_inverse * y_inverse
    direct = tl.zeros((BLOCK_ROWS,), tl.float32)
    radial = tl.zeros((BLOCK_ROWS,), tl.float32)
    rotated = tl.zeros((BLOCK_ROWS,), tl.float32)
    if dot is not None:
        direct += tl.load(dot + index, mask=inside, other=0.0).to(tl.float32)
    if cos is not None:
        given = tl.load(cos + index, mask=inside, other=0.0).to(tl.float32)
        direct += given * both
        radial += given * dots * both
    if angle is not None:
        signed = (dots + sines) * both
        sign = tl.where(signed > 0.0, 1.0, tl.where(signed < 0.0, -1.0, 0.0))
        turned = tl.load(angle + index, mask=inside, other=0.0).to(tl.float32) * sign
        rotated += turned * both
        direct += rotated
        radial += turned * signed
    # Below eps the divisor is a constant, and nothing flows through it.
    x_radial = tl.where(x_norm < eps, 0.0, radial * x_inverse * x_inverse)[:, None]
    y_radial = tl.where(y_norm < eps, 0.0, radial * y_inverse * y_inverse)[:, None]
    direct, rotated = direct[:, None], rotated[:, None]
    at = index.to(tl.int64)[:, None] * D
    for begin in range(0, HALF, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        real_mask = inside[:, None] & (d < HALF)[None, :]
        imaginary_mask = inside[:, None] & (HALF + d < D)[None, :]
        a, b = _halves(x_rows, d, inside, HALF, D)
        c, e = _halves(y_rows, d, inside, HALF, D)
        if x_gradient is not None:
            real, imaginary = direct * c - rotated * e - x_radial * a, direct * e + rotated * c - x_radial * b
            if ADD:
                real += tl.load(x_gradient + at + d[None, :], mask=real_mask, other=0.0)
                imaginary += tl.load(x_gradient + at + HALF + d[None, :], mask=imaginary_mask, other=0.0)
            kind = x_gradient.dtype.element_ty
            tl.store(x_gradient + at + d[None, :], real.to(kind), mask=real_mask)
            tl.store(x_gradient + at + HALF + d[None, :], imaginary.to(kind), mask=imaginary_mask)
        if y_gradient is not None:
            real, imaginary = direct * a + rotated * b - y_radial * c, direct * b - rotated * a - y_radial * e
            kind = y_gradient.dtype.element_ty
            tl.store(y_gradient + at + d[None, :], real.to(kind), mask=real_mask)
            tl.store(y_gradient + at + HALF + d[None, :], imaginary.to(kind), mask=imaginary_mask)


def why_not(problem: PairwiseProblem | None) -> str | None:
    """Returns why these kernels cannot serve a problem (None: the most usual one) where Triton runs, or None."""
    return "float64 is computed in torch ops" if problem is not None and problem.dtype == torch.float64 else None


def pairwise(problem: PairwiseProblem) -> tuple[Tensor, ...]:
    """Returns the scores of each similarity, (C n)."""
    n = len(problem.x)
    shape = (len(problem.columns), n)
    scores = {name: problem.x.new_empty(shape, dtype=problem.dtype) for name in problem.similarities}
    for index in range(len(problem.columns)):
        outputs = {name: scores[name][index] if name in scores else None for name in SIMILARITIES}
        _launch(pair_scores, problem, index, **outputs)
    return tuple(scores[name].view(-1) for name in problem.similarities)


def pairwise_gradients(
    problem: PairwiseProblem, gradients: Sequence[Tensor | None], needs: Sequence[bool]
) -> PairwiseGradients:
    """Returns the gradients of x and of each column, where needed, from those of the scores."""
    n, (need_x, *need_columns) = len(problem.x), needs
    given = {
        name: gradient.contiguous().view(len(problem.columns), n)
        for name, gradient in zip(problem.similarities, gradients, strict=True)
        if gradient is not None
    }

    def empty(like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(like.shape, dtype=dtype, device=like.device)

    # A sum over several columns is rounded once, at its end.
    several = len(problem.columns) > 1
    x = empty(problem.x, problem.dtype if several else problem.x.dtype) if need_x else None
    columns = [empty(y, y.dtype) if need else None for y, need in zip(problem.columns, need_columns, strict=True)]
    for index, column in enumerate(columns):
        if x is None and column is None:
            continue
        flowing = {name: given[name][index] if name in given else None for name in SIMILARITIES}
        _launch(pair_gradients, problem, index, **flowing, x_gradient=x, y_gradient=column, ADD=index > 0)
    return PairwiseGradients(None if x is None else x.to(problem.x.dtype), tuple(columns))


def _launch(
    kernel: triton.JITFunction, problem: PairwiseProblem, index: int, **arguments: Tensor | bool | None
) -> None:
    """Launches a kernel for x and the column of an index; ``arguments`` are those of this kernel alone."""
    x, y = (with_unit_stride(v.detach()) for v in (problem.x, problem.columns[index]))
    n, dimension = x.shape
    launch(
        kernel,
        (cdiv(n, CONFIG["BLOCK_ROWS"]),),
        config=CONFIG,
        x=x,
        x_stride=x.stride(0),
        y=y,
        y_stride=y.stride(0),
        n=n,
        eps=EPS,
        **arguments,
        HALF=problem.half,
        D=dimension,
    )
