"""The problem of the `pairwise` operation: rows x_i and, in each of C columns, their partners y_i.

A backend has two functions: ``pairwise(problem)`` gives the scores of each similarity, and ``pairwise_gradients`` what
flows back from their gradients. Nothing but x and y is kept between the two: whoever writes a gradient reads both rows
anyway, and has their dot products for the price of arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SIMILARITIES = ("cos", "dot", "angle")
EPS = 1e-12  # the least norm, that of torch.nn.functional.normalize


@dataclass(frozen=True)
class PairwiseProblem:
    """Validated inputs of one call (see :func:`sbert_kernels.pairwise_similarity` for their meaning)."""

    x: Tensor  # (n, D)
    columns: tuple[Tensor, ...]  # C times (n, D)
    similarities: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """The device of all embeddings."""
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the scores."""
        wide = any(vectors.dtype == torch.float64 for vectors in (self.x, *self.columns))
        return torch.float64 if wide else torch.float32

    @property
    def half(self) -> int:
        """Number of complex numbers in an embedding; in odd dimensions the last has no imaginary part."""
        return (self.x.shape[1] + 1) // 2


class PairwiseGradients(NamedTuple):
    """Gradients of the embeddings, in the embeddings' own types; None where not asked for."""

    x: Tensor | None
    columns: tuple[Tensor | None, ...]
