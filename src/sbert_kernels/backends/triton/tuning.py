"""Tile sizes: one good default for each kernel, kind of product and kind of GPU; candidates for those who time them.

What decides, in this order: no register spills; tiles large enough that loads from L2 keep up with the tensor cores
(a BLOCK_OWN x BLOCK_OTHER tile does BLOCK_OWN BLOCK_OTHER / (BLOCK_OWN + BLOCK_OTHER) multiply-adds a loaded number);
shared memory for the stages in flight, which is 64 KiB on gfx942 and sm_75 and 99 KiB on sm_86, 89 and 120. What was
found with `bench aot`, without a GPU, is free of spills; which of such tiles is fastest, only a GPU can tell.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from triton.runtime.errors import OutOfResources

from .launching import Config, Target

logger = logging.getLogger(__name__)
Candidate = TypeVar("Candidate")

# Tiles of a sweep beside the default ones: the other side's half as wide; own's; both, of more stages.
VARIANTS = (0, 1, 2, 3)

SMALL_SHARED_MEMORY = (75, 86, 89, 120, "hip")


def sweep_config(
    target: Target,
    operand_bytes: int,
    *,
    fma: bool,
    split: bool,
    statistics: bool,
    gradient: bool,
    masked: bool,
    guided: bool,
    prefixes: int,
    width: int,
    aligned: bool = True,
    variant: int = 0,
) -> Config:
    """The tiles of a sweep.

    ``fma``: products are not computed by tensor cores; ``split``: they are, of float32 in parts. ``statistics``: it
    sums up the rows of a softmax; ``gradient``: it sums up a gradient, of ``width`` entries a program. ``masked``: ids
    or hardness tell entries apart, which takes registers; ``guided``: a second product does. ``prefixes``: so many
    tiles of weights are held at once. ``aligned``: rows of vectors are a multiple of 16 numbers apart; others are read
    number by number, at addresses of their own. ``variant``: one of `VARIANTS`.
    """
    if target.backend == "interpreter":
        return _config(32, 32, 32, width, 1, 1)
    arch = _family(target)
    stages = 2 if arch in SMALL_SHARED_MEMORY or fma or split or guided or prefixes > 2 else 3
    d = 16 if fma or split else 32 if guided or operand_bytes == 4 else 64
    if guided:
        own, other = 32, 16 if split else 32
    elif prefixes > 2:
        own, other = (32, 16) if fma else (64, 16) if split else (64 if arch in (90, 100, "hip") else 32, 32)
    elif fma or split:
        own, other = 64, 16 if arch == 75 else 32
    elif gradient:
        # sm_100 accumulates in a memory of its own, but brings a tile into registers as a whole.
        own = 128 if arch == 100 and operand_bytes == 2 and aligned and not (masked or statistics) else 64
        other = 32 if not aligned or (operand_bytes == 4 and statistics) else 64
    elif masked or not aligned:
        own, other = 64, 32 if arch == 120 else 64
    else:
        own, other = 128, 64 if arch in (100, 120) else 128
    if variant in (1, 3):
        other = max(16, other // 2)
    if variant in (2, 3):
        own = max(16, own // 2)
    return _config(own, other, d, width, 8, stages + 1 if variant == 3 else stages)


def _family(target: Target) -> int | str:
    """The target that another's tiles are made like."""
    if target.backend == "hip":
        return "hip"
    return target.arch // 10 * 10 if target.arch >= 100 else target.arch


def _config(own: int, other: int, d: int, s: int, warps: int, stages: int) -> Config:
    # Eight blocks of own and the columns of a wave lie in L2 together.
    tiles = (("BLOCK_OWN", own), ("BLOCK_OTHER", other), ("BLOCK_D", d), ("BLOCK_S", s), ("GROUP", 8))
    return Config(tiles, warps, stages, registers=min(255, 2048 // warps))


def slice_width(dimension: int, fma: bool, crowded: bool = False) -> int:
    """Entries of a gradient that one program of a sweep sums up: its accumulators have to stay in registers.

    ``crowded``: masks, a guide or products in parts need some, too.
    """
    width = 16
    while width < min(dimension, 128 if fma or crowded else 256):
        width *= 2
    return width


# Memory-bound: a row's entries are read in full lines, a few rows a program.
EDGES = Config((("BLOCK_ROWS", 4), ("BLOCK_D", 256)), 4, 1)
COMBINE = Config((("BLOCK_S", 32), ("BLOCK_N", 32)), 4, 1, registers=255)


_fastest: dict[Hashable, object] = {}


def fastest(
    key: Hashable,
    candidates: Sequence[Candidate],
    run: Callable[[Candidate], object],
    device: torch.device,
    usual: Candidate,
) -> Candidate:
    """The candidate with the shortest run; found once for each key in a process, by running all of them, and waiting.

    One that needs more of the device than it has is passed over. While a CUDA graph is captured nobody can wait: the
    ``usual`` one is taken unless the fastest is known.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _fastest.get(key, usual)
    if key not in _fastest:
        seconds: dict[Candidate, float] = {}
        for candidate in candidates:
            try:
                run(candidate)  # compiles
                seconds[candidate] = min(_seconds(run, candidate, device) for _ in range(3))
            except (OutOfResources, torch.OutOfMemoryError) as error:
                logger.info("%s is passed over: %s", candidate, error)
        _fastest[key] = min(seconds, key=seconds.__getitem__, default=usual)
        logger.info("for %s: %s, of %s", key, _fastest[key], seconds)
    return _fastest[key]


def _seconds(run: Callable[[Candidate], object], candidate: Candidate, device: torch.device) -> float:
    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begin = finished()
    run(candidate)
    return finished() - begin
