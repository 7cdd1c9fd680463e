"""How kernels are started: by keyword, on the device of their tensors; or listed, or left out, without a GPU.

The first start of a kernel with arguments of some kind goes through Triton, which compiles it for that kind. What it
returns is remembered, and starts the kernel from then on: to find it again, Triton looks at the arguments in ways that
take 11 to 60 microseconds a launch, by its version, and telling their kind here takes 3 to 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter

from .targets import Target

INTERPRETED = triton.knobs.runtime.interpret
"""True if this process runs kernels in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported)."""

_HIP = torch.version.hip is not None
# From 3.4 to 3.9 `CompiledKernel.run` takes the same arguments; of a newer Triton only what is public is called.
_RUN_IS_KNOWN = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) <= (3, 9)
# So many kinds of arguments are remembered of a kernel: a number that changes at each call makes a kind each time.
_MOST_KINDS = 1024


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


@dataclass(frozen=True)
class _Recorder:
    """Says what becomes of launches without a GPU."""

    target: Target
    launches: list[Any]
    idle: bool = False  # they go the whole way of the host but for the driver
    kernels: dict[int, _Kernel] = field(default_factory=dict)  # what an idle one remembers of kernels


_recorder: ContextVar[_Recorder | None] = ContextVar("sbert_kernels_launches", default=None)


@contextmanager
def _recorded(recorder: _Recorder) -> Iterator[list[Any]]:
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


def recording(target: Target) -> AbstractContextManager[list[Launch]]:
    """Lists launches as they would be on a target, and runs none of them; for tensors on the device "meta"."""
    return _recorded(_Recorder(target, []))


def idling(target: Target) -> AbstractContextManager[list[str]]:
    """Lists the names of the kernels that would start on a target, while the host does all that it does for a start.

    What is left out is the call of the driver, 1 to 3 microseconds a launch. On the device "meta" the vendor's products
    and torch's other operations compute nothing either, so that what takes time is the host.
    """
    return _recorded(_Recorder(target, [], idle=True))


def target_of(device: torch.device) -> Target:
    """Returns the target that kernels are compiled for on a device; where none run, the one that was given for it."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.target
    if INTERPRETED:
        return Target("interpreter", 0, multiprocessors=4)
    return _target(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    size = (properties.multi_processor_count, properties.total_memory)
    if _HIP:
        return Target("hip", properties.gcnArchName.partition(":")[0], *size)
    return Target("cuda", 10 * properties.major + properties.minor, *size)


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up; that of Triton is made for kernels, and slow on the host."""
    return -(-a // b)


def launch(kernel: Any, grid: tuple[int, ...], *, config: Config, **arguments: Any) -> None:
    """Starts a kernel on the device of its first tensor, in that device's current stream.

    The settings of Triton's compiler (``triton.knobs``) are those of the kernel's first start with such arguments.

    Args:
        kernel: The triton.JITFunction.
        grid: How many programs; none where one of the numbers is 0.
        config: Tile sizes, which the kernel gets by their names, and options of the compiler.
        **arguments: All other parameters of the kernel, by name: tensors, numbers, None, or (named) tuples of these, in
            which ``tl.constexpr`` marks what the kernel is compiled for.

    Raises:
        TypeError: A parameter is missing, or one is given that the kernel does not have.
    """
    arguments.update(config.tiles)
    recorder = _recorder.get()
    kernels = _KERNELS if recorder is None else recorder.kernels
    known = kernels.get(id(kernel))
    if known is None:
        known = kernels[id(kernel)] = _Kernel(kernel)
    try:
        values = [arguments[name] for name in known.names]
    except KeyError:
        values = []
    if len(values) != len(arguments):
        wrong = sorted(arguments.keys() ^ set(known.names))
        raise TypeError(f"{kernel.__name__} was launched without some of its parameters, or with others: {wrong}.")
    if recorder is not None and not recorder.idle:
        recorder.launches.append(known.listed(grid, config, values))
    elif 0 in grid:
        return
    elif recorder is not None:
        recorder.launches.append(kernel.__name__)
        known.start(grid, config, values, _first_tensor(values).get_device(), 0, _left_out)
    elif INTERPRETED:
        kernel[grid](*values)
    else:
        device, driver = _first_tensor(values).get_device(), triton.runtime.driver.active
        if device == driver.get_current_device():
            known.start(grid, config, values, device, driver.get_current_stream(device))
        else:
            with torch.cuda.device(device):
                known.start(grid, config, values, device, driver.get_current_stream(device))


class Prepared:
    """Starts a kernel at each call with arguments of the same kind, in half the time of :func:`launch`.

    Its calls may differ in the addresses of tensors and in floats: types and device of the tensors, all integers, and
    what is None are those of the first call, and nothing looks at them again. So it belongs to a plan, which is made
    for shapes, types and a device. If an address is no multiple of 16 bytes, it does what :func:`launch` does.

    Args:
        kernel, grid, config: As for :func:`launch`.
        **fixed: The parameters that are the same in every call.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *, config: Config, **fixed: Any) -> None:
        self.kernel, self.grid, self.config, self.fixed = kernel, grid, config, fixed
        self._start: _Start | None = None
        self._recorder: _Recorder | None = None  # that the start was made for
        self._device = -1
        self._names: tuple[str, ...] = ()  # of the arguments that each call gives
        self._values: list[Any] = []  # of all parameters
        self._places: list[int] = []  # of those that each call gives

    def __call__(self, **arguments: Any) -> None:
        """Starts the kernel; ``arguments`` are the parameters that are not fixed, or (named) tuples of such."""
        recorder, start = _recorder.get(), self._start
        if (
            start is None
            or recorder is not self._recorder
            or tuple(arguments) != self._names
            or _is_watched(self.kernel)
        ):
            self._first(recorder, arguments)
            return
        values, addresses = self._values.copy(), 0
        for place, value in zip(self._places, arguments.values(), strict=True):
            values[place] = value
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Tensor):
                    addresses |= part.data_ptr()
        if addresses % 16:
            launch(self.kernel, self.grid, config=self.config, **self.fixed, **arguments)
        elif recorder is not None:
            recorder.launches.append(self.kernel.__name__)
            start(self.grid, 0, values)
        else:
            driver = triton.runtime.driver.active
            if driver.get_current_device() == self._device:
                start(self.grid, driver.get_current_stream(self._device), values)
            else:
                with torch.cuda.device(self._device):
                    start(self.grid, driver.get_current_stream(self._device), values)

    def _first(self, recorder: _Recorder | None, arguments: dict[str, Any]) -> None:
        """Starts the kernel by :func:`launch`, and remembers the start that this found or made."""
        launch(self.kernel, self.grid, config=self.config, **self.fixed, **arguments)
        known = (_KERNELS if recorder is None else recorder.kernels)[id(self.kernel)]
        given = self.fixed | arguments | dict(self.config.tiles)
        values = [given[name] for name in known.names]
        device = _first_tensor(values).get_device()
        kind = known.kind_of(self.config, values, device)
        nested = any(
            isinstance(part, tuple) for value in arguments.values() if isinstance(value, tuple) for part in value
        )
        # Those in a tuple of a tuple are not looked at in later calls.
        if kind is None or nested or any(tensor.data_ptr() % 16 for tensor in _tensors(values)):
            return
        self._recorder, self._device = recorder, device
        self._names, self._places = tuple(arguments), [known.names.index(name) for name in arguments]
        self._values = [None if name in arguments else value for name, value in zip(known.names, values, strict=True)]
        self._start = known.starts.get(kind)  # at last, for another thread may look at it


class _Start(NamedTuple):
    """Starts a compiled kernel on the current device."""

    run: Callable[..., Any]
    function: Any = None
    packed: Any = None
    compiled: Any = None  # kept, because its code is unloaded from the GPU with it

    def __call__(self, grid: tuple[int, ...], stream: int, values: list[Any]) -> None:
        """Starts so many programs in a stream with the values of all parameters; nobody may be hooked into launches."""
        x, y, z = (*grid, 1, 1)[:3]
        self.run(x, y, z, stream, self.function, self.packed, None, None, None, *values)


def _start_of(compiled: Any) -> _Start:
    if _RUN_IS_KNOWN:
        return _Start(compiled.run, compiled.function, compiled.packed_metadata, compiled)

    def run(x: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any) -> None:
        compiled[(x, y, z)](*rest[3:], stream=stream)

    return _Start(run)


def _left_out(*arguments: Any) -> None:
    """Stands for the call of the driver, where launches are left out."""


class _Kernel:
    """Remembers a kernel's parameters, and what starts it with arguments of each kind that came so far."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.names: tuple[str, ...] = tuple(kernel.arg_names)
        annotations = kernel.fn.__annotations__
        self.constexpr = tuple("constexpr" in str(annotations.get(name)) for name in self.names)
        # Of what stands before it, floats count as floats, not by their value.
        self.first_constexpr = self.constexpr.index(True) if True in self.constexpr else len(self.names)
        self.starts: dict[tuple[Any, ...], _Start] = {}

    def listed(self, grid: tuple[int, ...], config: Config, values: list[Any]) -> Launch:
        """Returns a launch that is listed instead of run."""
        given = list(zip(self.names, values, self.constexpr, strict=True))
        return Launch(
            self.kernel,
            grid,
            {name: value for name, value, constexpr in given if not constexpr},
            {name: value for name, value, constexpr in given if constexpr},
            config,
        )

    def start(
        self,
        grid: tuple[int, ...],
        config: Config,
        values: list[Any],
        device: int,
        stream: int,
        instead: Callable[..., None] | None = None,
    ) -> None:
        """Starts the kernel on the current device as before with arguments of this kind, or else through Triton.

        ``instead`` of the driver another function may be called.
        """
        kind = None if _is_watched(self.kernel) else self.kind_of(config, values, device)
        start = None if kind is None else self.starts.get(kind)
        if start is not None:
            start(grid, stream, values)
            return
        if instead is None:
            compiled = self.kernel[grid](*values, **config.options("hip" if _HIP else "cuda"))
            # A kernel that another thread still compiles is no CompiledKernel yet.
            start = _start_of(compiled) if isinstance(compiled, triton.compiler.CompiledKernel) else None
        else:
            start = _Start(instead)
        if kind is not None and start is not None:
            if len(self.starts) >= _MOST_KINDS:
                self.starts.clear()
            self.starts[kind] = start

    def kind_of(self, config: Config, values: list[Any], device: int) -> tuple[Any, ...] | None:
        """Returns all that a compiled kernel depends on, or None if a value is of a kind that is not known here.

        It tells more apart than Triton does, never less.
        """
        kind: list[Any] = [device, config.num_warps, config.num_stages, config.registers]
        if not _add_kinds(kind, values[: self.first_constexpr], float):
            return None
        return tuple(kind) if _add_kinds(kind, values[self.first_constexpr :], None) else None


_KERNELS: dict[int, _Kernel] = {}
_BOOLS = ((bool, False), (bool, True))


def _add_kinds(kinds: list[Any], values: Iterable[Any], of_float: Any) -> bool:
    """Adds to a list what a compiled kernel depends on of some arguments; returns False if that is not known of one.

    Triton compiles for the type and the alignment of a tensor (on AMD also for whether it is within 2 GiB), for an
    integer's size and divisors, and for the value of what is None, a string or a `constexpr`. Integers count by their
    value here, as telling them apart in the same way would take longer. ``of_float``: what stands for a float that the
    kernel is not compiled for; None if it counts by its value.
    """
    add = kinds.append
    for value in values:
        cls = type(value)
        if cls is Tensor or cls is Parameter:
            add(value.dtype)
            add(value.data_ptr() % 16)
            if _HIP:
                add(value.untyped_storage().nbytes() < 2**31)
        elif cls is int or cls is str or value is None:
            add(value)
        elif cls is float:
            add(of_float or (float, repr(value)))
        elif cls is bool:  # which would be equal to an integer
            add(_BOOLS[value])
        elif cls is tl.dtype:
            add((cls, value.name))
        elif cls is tl.constexpr:
            add(cls)
            if not _add_kinds(kinds, (value.value,), None):
                return False
        elif isinstance(value, tuple):
            add(cls)
            add(len(value))
            if not _add_kinds(kinds, value, of_float):
                return False
        else:
            return False
    return True


def _first_tensor(values: Iterable[Any]) -> Tensor:
    return next(_tensors(values))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _is_watched(kernel: Any) -> bool:
    """Returns True if a profiler, say, is hooked into launches: Triton has more to tell it than is known here."""
    knobs = triton.knobs.runtime
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook  # from 3.5 on chains of hooks, mostly without any
    return bool(
        (enter and getattr(enter, "calls", True))
        or (leave and getattr(leave, "calls", True))
        or getattr(kernel, "pre_run_hooks", ())
    )
