"""The layout of the tensors that the kernels read."""

from __future__ import annotations

from torch import Tensor


def with_unit_stride(vectors: Tensor) -> Tensor:
    """Returns the vectors themselves if their entries lie side by side, else a copy in which they do: (n, D).

    torch gives the row stride of a single row any value; here it is D, as kernels have rules for how far rows may be
    apart.
    """
    if vectors.stride(1) != 1:
        vectors = vectors.contiguous()
    n, width = vectors.shape
    return vectors.as_strided((n, width), (width, 1)) if n == 1 else vectors
