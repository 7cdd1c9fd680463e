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

# Tiles of a sweep beside the default ones (0): half as wide in B; in A; in both, with one more load in flight.
VARIANTS = (0, 1, 2, 3)

# Memory-bound: a row's entries are read in full lines, a few rows a program.
NORMS = Config((("BLOCK_ROWS", 4), ("BLOCK_D", 256)), 4, 1)
SOFTMAX_STATISTICS = Config((("BLOCK_S", 32), ("BLOCK_N", 32)), 4, 1, registers=255)


def sweep_config(
    target: Target,
    precision: MatmulPrecision,
    *,
    statistics: bool,
    gradient: bool,
    masked: bool,
    guided: bool,
    prefixes: int,
    width: int,
    aligned: bool = True,
    variant: int = 0,
) -> Config:
    """Returns the tiles of a sweep.

    Args:
        target: What it is compiled for.
        precision: How it multiplies.
        statistics: It sums up the rows of a softmax.
        gradient: It sums up a gradient, of ``width`` entries a program.
        masked: Ids or hardness tell entries apart, which takes registers.
        guided: It computes the guide's similarities, too.
        prefixes: So many tiles of weights are held at once.
        width: See ``gradient``; 16 without one.
        aligned: Rows of vectors are a multiple of 16 numbers apart; others are read number by number.
        variant: One of `VARIANTS`.
    """
    if target.backend == "interpreter":
        return _config(32, 32, 32, width, 1, 1)
    tiles = target.gpu.tiles
    operand_bytes = precision.dtype.itemsize
    slow = precision.fma or precision.split
    stages = 2 if slow or guided or prefixes > 2 else tiles.stages
    d = 16 if slow else 32 if guided or operand_bytes == 4 else 64
    if guided:
        a, b = 32, 16 if precision.split else 32
    elif prefixes > 2:
        a, b = (32, 16) if precision.fma else (64, 16) if precision.split else tiles.prefixes
    elif slow:
        a, b = tiles.in_parts
    elif gradient:
        a = tiles.gradient_rows if operand_bytes == 2 and aligned and not (masked or statistics) else 64
        b = 32 if not aligned or (operand_bytes == 4 and statistics) else 64
    elif masked or not aligned:
        a, b = tiles.masked
    else:
        a, b = tiles.plain
    if variant in (1, 3):
        b = max(16, b // 2)
    if variant in (2, 3):
        a = max(16, a // 2)
    return _config(a, b, d, width, 8, stages + 1 if variant == 3 else stages)


def _config(a: int, b: int, d: int, s: int, warps: int, stages: int) -> Config:
    # Eight blocks of A and the columns of a wave lie in L2 together.
    tiles = (("BLOCK_A", a), ("BLOCK_B", b), ("BLOCK_D", d), ("BLOCK_S", s), ("GROUP", 8))
    return Config(tiles, warps, stages, registers=min(255, 2048 // warps))


def slice_width(dimension: int, fma: bool, high_register_pressure: bool = False) -> int:
    """Returns how many entries of a gradient one program of a sweep sums up: its accumulators stay in registers.

    ``high_register_pressure``: masks, a guide or products in parts need some, too.
    """
    width = 16
    while width < min(dimension, 128 if fma or high_register_pressure else 256):
        width *= 2
    return width
