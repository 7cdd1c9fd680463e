"""The CUDA library's operator for tensors on a CPU, which holds its caller to what the library's own asks for.

What computes is the kernels' epilogue (`host_epilogue`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from support.host_epilogue import TILE, contrastive_weights

SCHEMA = (
    "contrastive_weights(Tensor rows, Tensor columns, Tensor row_factor, Tensor column_factor, float scale, "
    "float shift, int[] excluded, int[] special, float special_ratio, Tensor? row_ids, Tensor? column_ids, "
    "int own_column, Tensor? row_coefficient, Tensor? column_coefficient, Tensor(a!)? weights, Tensor(b!)? row_sums, "
    "Tensor(c!)? column_sums) -> ()"
)


@contextmanager
def registered() -> Iterator[None]:
    """Has `torch.ops.sbert_kernels_cuda.contrastive_weights` serve tensors on the CPU, and those without memory."""

    def checked(*arguments: Any) -> None:
        check(*arguments)
        contrastive_weights(*arguments)

    there = hasattr(torch.ops.sbert_kernels_cuda, "contrastive_weights")
    library = torch.library.Library("sbert_kernels_cuda", "FRAGMENT")
    if not there:
        library.define(SCHEMA)
        torch.library.register_fake("sbert_kernels_cuda::contrastive_weights", lambda *_: None, lib=library)
    library.impl("contrastive_weights", checked, "CPU")
    try:
        yield
    finally:
        library._destroy()


def check(
    rows: Tensor,
    columns: Tensor,
    row_factor: Tensor,
    column_factor: Tensor,
    scale: float,
    shift: float,
    excluded: Sequence[int],
    special: Sequence[int],
    special_ratio: float,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    own_column: int,
    row_coefficient: Tensor | None,
    column_coefficient: Tensor | None,
    weights: Tensor | None,
    row_sums: Tensor | None,
    column_sums: Tensor | None,
) -> None:
    """Fails unless the library would take these arguments, and reads and writes within them."""
    (m, width), n = rows.shape, len(columns)
    assert columns.shape == (n, width)
    assert width % 8 == 0
    assert rows.dtype == columns.dtype
    assert rows.dtype in (torch.bfloat16, torch.float16)
    for vectors in (rows, columns, *(() if weights is None else (weights,))):
        assert vectors.stride(1) == 1
        assert vectors.stride(0) % 8 == 0
        assert vectors.stride(0) >= vectors.shape[1]
        assert vectors.data_ptr() % 16 == 0
    assert scale > 0
    assert len(excluded) == len(special) == 3
    assert (row_ids is None) == (column_ids is None)
    tiles_down, tiles_across = -(-m // TILE), -(-n // TILE)
    expected: dict[tuple[int, ...], list[Tensor | None]] = {
        (m,): [row_factor, row_coefficient, row_ids],
        (n,): [column_factor, column_coefficient, column_ids],
        (tiles_across, m): [row_sums],
        (tiles_down, 0 if column_sums is None else column_sums.shape[1]): [column_sums],
    }
    for shape, tensors in expected.items():
        for tensor in tensors:
            if tensor is not None:
                assert tensor.shape == shape
                assert tensor.is_contiguous()
                assert tensor.dtype == (torch.int64 if tensor is row_ids or tensor is column_ids else torch.float32)
    assert column_factor.data_ptr() % 8 == 0
    if row_coefficient is not None:  # "known"
        assert weights is not None
        assert weights.shape == (m, n)
        assert row_sums is None
        assert column_sums is None
        assert row_ids is None or rows.dtype == torch.float16, "no such kernel is compiled"
        assert column_coefficient is None or column_coefficient.data_ptr() % 8 == 0
    else:
        assert column_coefficient is None
        assert row_sums is not None
        if weights is not None:  # "rows"
            assert rows.dtype == torch.bfloat16
            assert weights.shape == (m, n)
            assert weights.dtype == rows.dtype
            assert column_sums is None
    if column_sums is not None:
        assert column_sums.shape[1] <= n
