"""Facts about this machine, the project's one timer and its one meter of peak memory.

`info`, the benchmarks and the demo share them. Contenders are timed in one process in the order A B A B ..., so that
whatever else the machine does meets all of them alike. Peak memory is read in a process of its own, because allocators
keep what an earlier contender has freed. Running out of memory is a result, not a crash.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import importlib.util
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .values import float32_matmul_precision

__all__ = [
    "MIB",
    "OUT_OF_MEMORY",
    "ProcessResult",
    "Timing",
    "commit",
    "copy_bandwidth",
    "device_peak",
    "facts",
    "gemm_seconds",
    "host_seconds",
    "is_out_of_memory",
    "line",
    "matmul_precision",
    "measure",
    "run_in_process",
    "version",
]

OUT_OF_MEMORY = "out of memory"
MIB = 2**20
COPIED_BYTES = 512 * MIB
_PACKAGE = Path(__file__).resolve().parent


# -- facts ------------------------------------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """Returns what a measured number depends on: hardware, threads, versions and torch's precision setting.

    Values that are not known are None.
    """
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "ram_gib": _ram_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("sbert-kernels", "torch", "sentence-transformers", "triton")},
        "float32_matmul_precision": float32_matmul_precision("cuda" if torch.cuda.is_available() else "cpu"),
    }


def line(dtype: torch.dtype | None = None) -> str:
    """Returns the facts about this machine on one line, with the dtype of the run where there is one."""
    found = facts()
    parts = [
        f"{found['cpu']} ({found['cpu_capability']}), {found['threads']} threads on {found['cores']} cores",
        f"{found['ram_gib']} GiB RAM" if found["ram_gib"] else None,
        found["gpu"] or "no GPU",
        f"Python {found['python']}",
        *(f"{name} {found[name]}" for name in ("torch", "sentence-transformers", "triton") if found[name]),
        str(dtype).removeprefix("torch.") if dtype else None,
        f"float32 matmul precision {found['float32_matmul_precision']}",
    ]
    return "; ".join(part for part in parts if part)


def commit() -> str | None:
    """Returns the commit that runs here, with "-dirty" if tracked files differ from it; None outside of a clone."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository, whose commit says nothing about it.
        if Path(git("rev-parse", "--show-toplevel")) / "src" / "sbert_kernels" != _PACKAGE:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def version(distribution: str) -> str | None:
    """Returns the installed version of a distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    if sys.platform == "linux":
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Sets `torch.set_float32_matmul_precision` for a block of code."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# -- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Holds the seconds of each timed call, or says in `error` why a contender stopped. Without samples all are nan."""

    samples: tuple[float, ...] = ()
    error: str | None = None

    @property
    def median_s(self) -> float:
        """Returns the median of the samples in seconds."""
        return statistics.median(self.samples) if self.samples else math.nan

    @property
    def min_s(self) -> float:
        """Returns the shortest sample in seconds."""
        return min(self.samples, default=math.nan)

    @property
    def max_s(self) -> float:
        """Returns the longest sample in seconds."""
        return max(self.samples, default=math.nan)


def measure(
    contenders: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    budget_s: float | None = None,
) -> dict[str, Timing]:
    """Times the contenders in the order A B A B ... after `warmup` untimed rounds in the same order.

    With `budget_s` no further round starts once the timed rounds have taken that many seconds; the first always runs.
    A contender that runs out of memory leaves the race with `error` set; any other exception propagates.
    """
    if not contenders:
        raise ValueError("contenders: expected at least one callable, got an empty mapping")
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}

    def one_round(*, timed: bool) -> None:
        for name, contender in contenders.items():
            if name in errors:
                continue
            try:
                seconds = _seconds(contender)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                errors[name] = OUT_OF_MEMORY
                continue
            if timed:
                samples[name].append(seconds)

    for _ in range(warmup):
        one_round(timed=False)
    begin = time.perf_counter()
    for done in range(repeats):
        if done and budget_s is not None and time.perf_counter() - begin > budget_s:
            break
        one_round(timed=True)
    return {name: Timing(tuple(samples[name]), errors.get(name)) for name in contenders}


def gemm_seconds(
    m: int, n: int, k: int, dtype: torch.dtype, repeats: int = 5, device: torch.device | str = "cpu"
) -> float:
    """Returns the median seconds of torch.mm of [m, k] and [k, n] into [m, n], into memory that exists already.

    Fused kernels are compared with it: no kernel that has to do this product can be expected to be much faster.
    """
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(k, n, device=device, dtype=dtype)
    c = torch.empty(m, n, device=device, dtype=dtype)
    timing = measure({"gemm": lambda: torch.mm(a, b, out=c)}, repeats=repeats)["gemm"]
    return timing.median_s


def copy_bandwidth(device: torch.device | str = "cpu", repeats: int = 5) -> float:
    """Returns the bytes a second, read plus written, of copying a block of memory that is larger than any cache."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # written, so that its pages exist
    return 2 * COPIED_BYTES / measure({"copy": lambda: target.copy_(source)}, repeats=repeats)["copy"].median_s


def host_seconds(call: Callable[[], object], calls: int) -> float:
    """Returns the seconds that the host takes for a call, of so many that do not wait for the device in between."""
    _synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = (time.perf_counter() - begin) / calls
    _synchronize()
    return seconds


def _seconds(call: Callable[[], object]) -> float:
    _synchronize()
    begin = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - begin


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """True if an exception says that memory ran out, the device's or the machine's."""
    # On the CPU torch raises a plain RuntimeError that only its text tells apart.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


# -- peak memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessResult:
    """Holds what `run_in_process` brings back. After an out-of-memory only `error` is set."""

    value: Any = None
    peak_extra_bytes: int | None = None
    error: str | None = None
    seconds: float = math.nan

    @property
    def cell(self) -> float | str | None:
        """Returns the peak in MiB for a report, or the reason why there is none."""
        return self.error or (None if self.peak_extra_bytes is None else self.peak_extra_bytes / MIB)


def run_in_process(target: Callable[..., Callable[[], Any]], *args: Any, **kwargs: Any) -> ProcessResult:
    """Runs `target(*args, **kwargs)()` in a fresh spawned process and meters the second call.

    `target` is a module-level function. It imports, makes the inputs, warms up and returns a zero-argument callable;
    the meter starts when it returns. `value` is the (picklable) result of the callable, `peak_extra_bytes` its peak
    over what was there when it began: resident memory, or allocated device memory if `target` used CUDA. The child has
    the parent's number of torch threads and float32 matmul precision. A child killed by SIGKILL, as the system's
    out-of-memory killer does, ran out of memory; an exception in the child is raised here as a RuntimeError.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    source = (target.__module__, getattr(sys.modules[target.__module__], "__file__", None), target.__qualname__)
    settings = (torch.get_num_threads(), torch.get_float32_matmul_precision())
    process = context.Process(target=_child, args=(sender, source, args, kwargs, settings))
    process.start()
    sender.close()  # or the end of the child would not end recv
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
    if isinstance(outcome, ProcessResult):
        return outcome
    if outcome is not None:
        raise RuntimeError(f"{target.__qualname__} failed in its own process:\n{outcome}")
    if process.exitcode == -9:
        return ProcessResult(error=OUT_OF_MEMORY)
    raise RuntimeError(f"{target.__qualname__}: its process ended with exit code {process.exitcode} and no result")


def _child(
    sender: Connection,
    source: tuple[str, str | None, str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: tuple[int, str],
) -> None:
    try:
        threads, precision = settings
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        call = _load(*source)(*args, **kwargs)
        meter = _DeviceMeter() if torch.cuda.is_initialized() else _ResidentMeter()
        begin = time.perf_counter()
        value = call()
        _synchronize()
        seconds = time.perf_counter() - begin
        sender.send(ProcessResult(value, meter.peak_extra_bytes(), None, seconds))
    except Exception as error:
        sender.send(ProcessResult(error=OUT_OF_MEMORY) if is_out_of_memory(error) else traceback.format_exc())


def _load(module_name: str, file: str | None, qualname: str) -> Callable[..., Any]:
    """Returns the target by its module's name, or by its file if no module of that name can be imported.

    pytest's importlib mode gives its test modules such names.
    """
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if file is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    for name in qualname.split("."):
        found = getattr(found, name)
    return found


class _DeviceMeter:
    """Meters the bytes that torch's CUDA allocator hands out, at their peak."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak_extra_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before


def device_peak(call: Callable[[], object]) -> int | None:
    """Runs a call, and returns its peak of the GPU's memory in bytes over what was there; None where CUDA is unused.

    What the allocator keeps of earlier calls does not count, so that this needs no process of its own.
    """
    if not torch.cuda.is_initialized():
        call()
        return None
    meter = _DeviceMeter()
    call()
    return meter.peak_extra_bytes()


class _ResidentMeter:
    """Meters the peak resident memory of this process from when the meter was made.

    Linux: the kernel's own high-water mark, reset through /proc/self/clear_refs; where that is not writable, a thread
    samples the resident size each millisecond. Elsewhere: the growth of getrusage's high-water mark, which cannot be
    reset, so that a peak below an earlier one reads 0; None on systems without getrusage.
    """

    def __init__(self) -> None:
        # Freed memory that the allocator still holds would be used again unseen.
        gc.collect()
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None
        self._highest = 0
        self._before: int | None
        if sys.platform != "linux":
            self._before = _rusage_peak()
            return
        self._before = _status_bytes("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()

    def _sample(self) -> None:
        while not self._stop.wait(1e-3):
            self._highest = max(self._highest, _status_bytes("VmRSS"))

    def peak_extra_bytes(self) -> int | None:
        peak: int | None
        if self._sampler is not None:
            self._stop.set()
            self._sampler.join()
            peak = max(self._highest, _status_bytes("VmRSS"))
        elif sys.platform == "linux":
            peak = _status_bytes("VmHWM")
        else:
            peak = _rusage_peak()
        return None if peak is None or self._before is None else peak - self._before


def _status_bytes(field: str) -> int:
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(f"{field}:"):
            return int(text.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field}")


def _rusage_peak() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the BSDs KiB
