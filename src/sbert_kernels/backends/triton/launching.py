"""How kernels are started: by keyword, on the device of their tensors; or listed instead of run, without a GPU."""

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

from .targets import Target

INTERPRETED = triton.knobs.runtime.interpret
"""True if this process runs kernels in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported)."""


@dataclass(frozen=True)
class Config:
    """Holds the tile sizes of a launch, which a kernel has a `constexpr` of each name for, and compiler options."""

    tiles: tuple[tuple[str, int], ...]  # ("BLOCK_A", 128), ...
    num_warps: int
    num_stages: int
    # A thread may have so many, which keeps NVIDIA's compiler from spilling some for the sake of occupancy.
    registers: int | None = None

    def __getitem__(self, name: str) -> int:
        """Returns the size of a tile by its name."""
        return dict(self.tiles)[name]

    def options(self, backend: str) -> dict[str, int]:
        """Returns the options for the compiler of a target's ``backend``."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if backend == "cuda" and self.registers is not None:
            options["maxnreg"] = self.registers
        return options


@dataclass(frozen=True)
class Launch:
    """A start of a kernel that was listed instead of run."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors, numbers and None, by name, in the kernel's order
    constants: dict[str, Any]  # its constexpr by name, with the tile sizes
    config: Config


_recorder: ContextVar[tuple[Target, list[Launch]] | None] = ContextVar("sbert_kernels_launches", default=None)


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Lists launches as they would be on a target, and runs none of them; for tensors on the device "meta"."""
    launches: list[Launch] = []
    token = _recorder.set((target, launches))
    try:
        yield launches
    finally:
        _recorder.reset(token)


def target_of(device: torch.device) -> Target:
    """Returns the target that kernels are compiled for on a device; within `recording`, the target given there."""
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


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up; that of Triton is made for kernels, and slow on the host."""
    return -(-a // b)


def launch(kernel: Any, grid: tuple[int, ...], *, config: Config, **arguments: Any) -> None:
    """Starts a kernel on the device of its first tensor, in that device's current stream.

    Args:
        kernel: The triton.JITFunction.
        grid: How many programs; none where one of the numbers is 0.
        config: Tile sizes, which the kernel gets by their names, and options of the compiler.
        **arguments: All other parameters of the kernel, by name.
    """
    arguments |= dict(config.tiles)
    recorder = _recorder.get()
    if recorder is not None:
        recorder[1].append(_listed(kernel, grid, config, arguments))
        return
    if 0 in grid:
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "cpu":  # the interpreter
        kernel[grid](**arguments)
        return
    with torch.cuda.device(device):
        kernel[grid](**arguments, **config.options("hip" if torch.version.hip else "cuda"))


def _listed(kernel: Any, grid: tuple[int, ...], config: Config, arguments: dict[str, Any]) -> Launch:
    names = kernel.arg_names
    if arguments.keys() != set(names):
        wrong = sorted(arguments.keys() ^ set(names))
        raise TypeError(f"{kernel.__name__} was launched without some of its parameters, or with others: {wrong}.")
    constexpr = _constexpr_names(kernel)
    return Launch(
        kernel,
        grid,
        {name: arguments[name] for name in names if name not in constexpr},
        {name: arguments[name] for name in names if name in constexpr},
        config,
    )


@cache
def _constexpr_names(kernel: Any) -> frozenset[str]:
    annotations = kernel.fn.__annotations__.items()
    return frozenset(name for name, annotation in annotations if "constexpr" in str(annotation))
