"""How kernels are started: on which device, for which target, and how a launch is looked at instead of run.

A target is what code is compiled for. It decides the tile sizes (`tuning`), never the result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether this process runs kernels in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported)."""


@dataclass(frozen=True)
class Target:
    """A GPU's kind of code: ("cuda", 90) or ("hip", "gfx942"), and its number of multiprocessors."""

    backend: str
    arch: int | str
    multiprocessors: int = 132


@dataclass(frozen=True)
class Config:
    """Tile sizes and what the compiler needs to know of them; a kernel's `constexpr` of these names get them."""

    tiles: tuple[tuple[str, int], ...]  # ("BLOCK_M", 128), ...
    num_warps: int
    num_stages: int
    # A thread may have so many, which keeps the compiler of NVIDIA's from spilling some for the sake of occupancy.
    registers: int | None = None

    def __getitem__(self, name: str) -> int:
        return dict(self.tiles)[name]

    def options(self, backend: str) -> dict[str, int]:
        """What the compiler of a target's ``backend`` is told."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if backend == "cuda" and self.registers is not None:
            options["maxnreg"] = self.registers
        return options


@dataclass(frozen=True)
class Launch:
    """A start of a kernel that was recorded instead of run."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # tensors, numbers, None: those that are not constexpr, in the kernel's order
    constants: dict[str, Any]  # by name, with the tile sizes
    config: Config


_recorder: ContextVar[tuple[Target, list[Launch]] | None] = ContextVar("sbert_kernels_launches", default=None)


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Within the block nothing runs: launches are listed, as they would be on that target. For tensors on "meta"."""
    launches: list[Launch] = []
    token = _recorder.set((target, launches))
    try:
        yield launches
    finally:
        _recorder.reset(token)


def target_of(device: torch.device) -> Target:
    """What kernels are compiled for on a device."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder[0]
    if INTERPRETED:
        return Target("interpreter", 0, multiprocessors=4)
    return _target(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    return Target("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Tensor | float | None, config: Config, **constants: Any
) -> None:
    """Start a kernel on the device of its first tensor, in that device's current stream.

    ``arguments`` are the kernel's ordinary ones in its order; ``constants`` its constexpr, beside the tile sizes.
    """
    constants = dict(config.tiles) | constants
    recorder = _recorder.get()
    if recorder is not None:
        recorder[1].append(Launch(kernel, grid, arguments, constants, config))
        return
    if 0 in grid:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cpu":  # the interpreter
        kernel[grid](*arguments, **constants)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **constants, **config.options("hip" if torch.version.hip else "cuda"))
