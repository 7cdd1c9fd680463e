"""The layout of the tensors that the kernels read."""

from __future__ import annotations

from torch import Tensor


def with_unit_stride(vectors: Tensor) -> Tensor:
    """Returns the vectors themselves if their entries lie side by side, else a copy in which they do: (n, D)."""
    return vectors if vectors.stride(1) == 1 else vectors.contiguous()
