"""The operator `contrastive_weights` on a CPU: torch's product, and the CUDA kernels' own epilogue on the host.

The epilogue (csrc/common) is compiled by the C++ compiler from the file that the kernels include.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

TILE = 128
POLICIES = ("rows", "sums", "known")
SOURCE = Path(__file__).with_name("epilogue_on_host.cpp")


class Diagonals(ctypes.Structure):
    """`Diagonals` of csrc/common."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("first", "stride", "count"))


class Epilogue(ctypes.Structure):
    """`Epilogue` of csrc/common."""

    _fields_ = (
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("row_factor", ctypes.c_void_p),
        ("column_factor", ctypes.c_void_p),
        ("logit_factor", ctypes.c_float),
        ("inverse_logit_factor", ctypes.c_float),
        ("shift", ctypes.c_float),
        ("excluded", Diagonals),
        ("special", Diagonals),
        ("special_ratio", ctypes.c_float),
        ("row_ids", ctypes.c_void_p),
        ("column_ids", ctypes.c_void_p),
        ("own_column", ctypes.c_int),
        ("row_coefficient", ctypes.c_void_p),
        ("column_coefficient", ctypes.c_void_p),
        ("row_sums", ctypes.c_void_p),
        ("column_sums", ctypes.c_void_p),
        ("summed_columns", ctypes.c_int),
    )


@cache
def library() -> ctypes.CDLL:
    """Returns the compiled epilogue; skips the test where there is no C++ compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tempfile.mkdtemp()
    try:
        output = Path(folder) / "epilogue.so"
        command = [
            compiler,
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Werror",
            "-shared",
            "-fPIC",
            str(SOURCE),
            "-o",
            str(output),
        ]
        subprocess.run(command, check=True)
        found = ctypes.CDLL(str(output))
        assert found.epilogue_bytes() == ctypes.sizeof(Epilogue), "the struct here is not that of csrc/common"
        return found
    finally:
        shutil.rmtree(folder)


def policy_of(weights: Tensor | None, row_coefficient: Tensor | None) -> str:
    """Returns the name of the policy that these arguments ask for."""
    return "known" if row_coefficient is not None else "sums" if weights is None else "rows"


def walk_tile(epilogue: Epilogue, policy: str, ids: bool, tile_row: int, tile_column: int, dots: Tensor) -> Tensor:
    """Returns the weights of a tile, (128, 128) fp32, from its dot products; sums go where the epilogue says."""
    weights = torch.full((TILE, TILE), math.nan)
    library().walk_tile(
        ctypes.byref(epilogue),
        POLICIES.index(policy),
        int(ids),
        tile_row,
        tile_column,
        ctypes.c_void_p(dots.data_ptr()),
        ctypes.c_void_p(weights.data_ptr()),
    )
    return weights


def contrastive_weights(
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
    """Does what the operator of the CUDA library does, with its arguments."""
    (m, n), log2e = (len(rows), len(columns)), 1 / math.log(2)
    pointer = {
        name: None if tensor is None else tensor.data_ptr()
        for name, tensor in {
            "row_factor": row_factor,
            "column_factor": column_factor,
            "row_ids": row_ids,
            "column_ids": column_ids,
            "row_coefficient": row_coefficient,
            "column_coefficient": column_coefficient,
            "row_sums": row_sums,
            "column_sums": column_sums,
        }.items()
    }
    epilogue = Epilogue(
        rows=m,
        columns=n,
        logit_factor=scale * log2e,
        inverse_logit_factor=1 / (scale * log2e),
        shift=shift * log2e,
        excluded=Diagonals(*excluded),
        special=Diagonals(*special),
        special_ratio=special_ratio,
        own_column=own_column,
        summed_columns=0 if column_sums is None else column_sums.shape[1],
        **pointer,
    )
    policy = policy_of(weights, row_coefficient)
    down, across = -(-m // TILE), -(-n // TILE)
    dots = torch.zeros(down * TILE, across * TILE)
    dots[:m, :n] = rows.float() @ columns.float().T
    for tile_row in range(down):
        for tile_column in range(across):
            begin_m, begin_n = tile_row * TILE, tile_column * TILE
            tile = dots[begin_m : begin_m + TILE, begin_n : begin_n + TILE].contiguous()
            found = walk_tile(epilogue, policy, row_ids is not None, tile_row, tile_column, tile)
            if weights is not None:
                inside = weights[begin_m : begin_m + TILE, begin_n : begin_n + TILE]
                inside.copy_(found[: inside.shape[0], : inside.shape[1]])
