"""The pairwise operation in row blocks of torch ops, on any device.

With x = a + ib and y = c + id for the halves of two embeddings (AnglE's complex numbers), |x|, |y| their norms:

    dot = a c + b d,   cos = dot / |x||y|,   t = (dot + b c - a d) / |x||y|,   angle = |t|

so that all three come from x and y as they are, and the gradients are combinations of the two rows: for gradients g of
the scores, m = g_cos / |x||y| + g_dot + g_t / |x||y|, r = g_t / |x||y| with g_t = sign(t) g_angle,

    dx = (m c - r d) + i (m d + r c) - (g_cos cos + g_t t) x / |x|^2      # the last term is the norm's, none below eps
    dy = (m a + r b) + i (m b - r a) - (g_cos cos + g_t t) y / |y|^2
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ... import settings
from ...problems.pairwise import EPS, PairwiseGradients, PairwiseProblem

# Rows at a time such that the passes over a block stay in a cache of usual size.
TARGET_BLOCK_BYTES = settings.MIB


def pairwise(problem: PairwiseProblem) -> tuple[Tensor, ...]:
    """Returns the scores of each similarity, (C * n,)."""
    rows = len(problem.x)
    scores = [problem.x.new_empty(len(problem.columns) * rows, dtype=problem.dtype) for _ in problem.similarities]
    for column, block in _blocks(problem):
        pairs = _Pairs(problem, column, block)
        for similarity, out in zip(problem.similarities, scores, strict=True):
            out[column * rows : (column + 1) * rows][block] = pairs.score(similarity)
    return tuple(scores)


def pairwise_gradients(
    problem: PairwiseProblem, gradients: Sequence[Tensor | None], needs: Sequence[bool]
) -> PairwiseGradients:
    """Gradients of x and of each column, where needed, from those of the scores."""
    need_x, *need_columns = needs
    rows = len(problem.x)
    # Summed up over the columns in the scores' type, whatever that of x.
    x = problem.x.new_zeros(problem.x.shape, dtype=problem.dtype) if need_x else None
    columns = [y.new_empty(y.shape) if need else None for y, need in zip(problem.columns, need_columns, strict=True)]
    given = {name: g for name, g in zip(problem.similarities, gradients, strict=True) if g is not None}
    for column, block in _blocks(problem):
        pairs = _Pairs(problem, column, block)
        pairs.take({name: g[column * rows : (column + 1) * rows][block] for name, g in given.items()})
        if x is not None:
            x[block] += pairs.x_gradient()
        y_gradient = columns[column]
        if y_gradient is not None:
            y_gradient[block] = pairs.y_gradient()
    return PairwiseGradients(None if x is None else x.to(problem.x.dtype), tuple(columns))


def _blocks(problem: PairwiseProblem) -> Iterator[tuple[int, slice]]:
    """Yields (column, rows) of each block."""
    rows, dimension = problem.x.shape
    step = TARGET_BLOCK_BYTES if problem.device.type == "cpu" else settings.block_bytes()
    step = max(1, step // (dimension * problem.dtype.itemsize))
    for column in range(len(problem.columns)):
        for begin in range(0, rows, step):
            yield column, slice(begin, begin + step)


class _Pairs:
    """A block of rows x and y, with what their scores and gradients share."""

    def __init__(self, problem: PairwiseProblem, column: int, block: slice) -> None:
        self.problem = problem
        self.x, self.y = (v[block].detach().to(problem.dtype) for v in (problem.x, problem.columns[column]))  # (B, D)
        # Sums, one a pair, are float64 where the device has it.
        self.exact = torch.float32 if problem.device.type == "mps" else torch.float64
        self.dots = _dot(self.x, self.y, self.exact)  # (B,)
        if set(problem.similarities) == {"dot"}:
            return
        norms = [_dot(v, v, self.exact).sqrt() for v in (self.x, self.y)]
        self.inverse = [norm.clamp(min=EPS).reciprocal() for norm in norms]  # (B,) each
        # Below eps the divisor is a constant, and nothing flows through it.
        self.through_norm = [(i * i).masked_fill(n < EPS, 0) for i, n in zip(self.inverse, norms, strict=True)]
        self.cos = self.dots * self.inverse[0] * self.inverse[1]
        if "angle" in problem.similarities:
            a, b, c, d = self._halves(self.x, self.y)
            sines = _dot(b, c[:, : b.shape[1]], self.exact) - _dot(a[:, : d.shape[1]], d, self.exact)
            self.signed_angle = self.cos + sines * self.inverse[0] * self.inverse[1]

    def score(self, similarity: str) -> Tensor:
        if similarity == "dot":
            return self.dots
        return self.cos if similarity == "cos" else self.signed_angle.abs()

    def take(self, gradients: dict[str, Tensor]) -> None:
        """Takes the gradients of the block's scores; to be called before those of x and y are asked for."""
        zero = self.dots.new_zeros(())
        dot, cos, angle = (gradients.get(name, zero) for name in ("dot", "cos", "angle"))
        self.direct, self.rotated, self.radial = dot, None, None
        if set(gradients) <= {"dot"}:
            return
        both = self.inverse[0] * self.inverse[1]
        self.direct, self.radial = dot + cos * both, cos * self.cos
        if "angle" in gradients:
            turned = angle * self.signed_angle.sign()
            self.rotated = turned * both
            self.direct, self.radial = self.direct + self.rotated, self.radial + turned * self.signed_angle

    def x_gradient(self) -> Tensor:
        return self._gradient(self.y, self.x, side=0)

    def y_gradient(self) -> Tensor:
        return self._gradient(self.x, self.y, side=1)

    def _gradient(self, other: Tensor, own: Tensor, side: int) -> Tensor:
        def column(numbers: Tensor) -> Tensor:
            return numbers.to(other.dtype).unsqueeze(-1)  # (B, 1)

        result = other * column(self.direct)  # (B, D)
        if self.rotated is not None:
            half = self.problem.half
            real, imaginary = other[:, :half], other[:, half:]
            turn = column(self.rotated if side == 0 else -self.rotated)
            result[:, : imaginary.shape[1]].addcmul_(imaginary, turn, value=-1)
            result[:, half:].addcmul_(real[:, : imaginary.shape[1]], turn)
        if self.radial is not None:
            result.addcmul_(own, column(self.radial * self.through_norm[side]), value=-1)
        return result

    def _halves(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half = self.problem.half
        return x[:, :half], x[:, half:], y[:, :half], y[:, half:]


def _dot(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x . y of each row: the products in the rows' own type, their sum in ``dtype``."""
    return (x * y).sum(dim=1, dtype=dtype)
