"""Tile sizes of the contrastive kernels: one good default for each kind of sweep; the rows of `targets` hold the GPU's.

What decides, in this order: no register spills; tiles large enough that loads from L2 keep up with the tensor cores (a
BLOCK_A x BLOCK_B tile does BLOCK_A BLOCK_B / (BLOCK_A + BLOCK_B) multiply-adds a loaded number); shared memory for the
loads in flight. What was found with `python -m benchmarks.aot`, without a GPU, is free of spills; which of such tiles
is fastest, only a GPU can tell.
"""

from __future__ import annotations

from ..launching import Config
from ..targets import Target
from .precision import MatmulPrecision

# Tiles of a sweep beside the default ones (0): half as wide in B; in A; in both, with one more load in flight. Of
# `weigh`: half as many columns at once; twice as many warps; both.
VARIANTS = (0, 1, 2, 3)


def rows_config(target: Target) -> Config:
    """Returns the tiles of kernels that read rows of vectors once, in full lines, a few rows a program."""
    if target.backend == "interpreter":
        return Config((("BLOCK_ROWS", 32), ("BLOCK_D", 32)), 1, 1)
    return Config((("BLOCK_ROWS", 4), ("BLOCK_D", 256)), 4, 1)


def statistics_config(target: Target) -> Config:
    """Returns the tiles of `softmax_statistics`: splits that are added up at once, and rows."""
    if target.backend == "interpreter":
        return Config((("BLOCK_S", 4), ("BLOCK_N", 32)), 1, 1)
    return Config((("BLOCK_S", 32), ("BLOCK_N", 32)), 4, 1, registers=255)


def sweep_config(
    target: Target,
    precision: MatmulPrecision,
    *,
    masked: bool,
    prefixes: int,
    aligned: bool = True,
    variant: int = 0,
) -> Config:
    """Returns the tiles of `sweep`.

    Args:
        target: What it is compiled for.
        precision: How it multiplies.
        masked: Ids or hardness tell entries apart, which takes registers.
        prefixes: So many tiles of weights are held at once.
        aligned: Rows of vectors are a multiple of 16 numbers apart; others are read number by number.
        variant: One of `VARIANTS`.
    """
    if target.backend == "interpreter":
        return _config(32, 32, 32, 1, 1)
    tiles = target.gpu.tiles
    slow = precision.fma or precision.split
    stages = 2 if slow or prefixes > 2 else tiles.stages
    d = 16 if slow else 32 if precision.dtype.itemsize == 4 else 64
    if prefixes > 2:
        a, b = (32, 16) if precision.fma else (64, 16) if precision.split else tiles.prefixes
    elif slow:
        a, b = tiles.in_parts
    elif masked or not aligned:
        a, b = tiles.masked
    elif prefixes > 1 or precision.dtype.itemsize == 4:
        a, b = min(tiles.plain, (128, 128), key=lambda sizes: sizes[0] * sizes[1])
    else:
        a, b = tiles.plain
    if variant in (1, 3):
        b = max(16, b // 2)
    if variant in (2, 3):
        a = max(16, a // 2)
    return _config(a, b, d, 8, stages + 1 if variant == 3 else stages)


def product_config(target: Target, precision: MatmulPrecision) -> Config:
    """Returns the tiles of a plain matrix product."""
    if target.backend == "interpreter":
        return _config(32, 32, 32, 1, 1)
    tiles = target.gpu.tiles
    if precision.fma or precision.split:
        return _config(*tiles.in_parts, 16, 8, 2)
    a, b = min(tiles.plain, (128, 128), key=lambda sizes: sizes[0] * sizes[1])
    return _config(a, b, 32, 8, tiles.stages)


def redo_config(target: Target, precision: MatmulPrecision) -> Config:
    """Returns the tiles of `redo`: few rows a program, since it is rare that more than a few are done again."""
    if target.backend == "interpreter":
        return Config((("BLOCK_A", 16), ("BLOCK_B", 32), ("BLOCK_D", 32), ("BLOCK_S", 16)), 1, 1)
    b, d = (16, 16) if precision.fma else (32, 32) if precision.split else (64, 32)
    return Config((("BLOCK_A", 32), ("BLOCK_B", b), ("BLOCK_D", d), ("BLOCK_S", 32)), 4, 2, registers=255)


def weigh_config(target: Target, columns: int, prefixes: int, masked: bool, variant: int = 0) -> Config:
    """Returns the tiles of `weigh`: one row a program, a few where the columns' radial part is summed up over them."""
    if target.backend == "interpreter":
        return Config((("BLOCK_A", 16), ("BLOCK_B", 32)), 1, 1)
    if prefixes > 1:
        return Config((("BLOCK_A", 32), ("BLOCK_B", 32 if prefixes > 2 else 64)), 8, 1, registers=255)
    most = (1024 if masked else 2048) >> (variant & 1)
    block = 128
    while block < min(columns, most):
        block *= 2
    return Config((("BLOCK_A", 1), ("BLOCK_B", block)), 8 if variant & 2 else 4, 1, registers=255)


def _config(a: int, b: int, d: int, warps: int, stages: int) -> Config:
    # Eight blocks of rows and the columns of a wave lie in L2 together.
    tiles = (("BLOCK_A", a), ("BLOCK_B", b), ("BLOCK_D", d), ("GROUP", 8))
    return Config(tiles, warps, stages, registers=min(255, 2048 // warps))
