"""Benchmark: each kernel of a backend alone, by shape, beside the vendor's product or a copy of the same bytes.

A backend is a source of items: a call, how many operations of matrix products it has to do, and how many bytes it has
to read and write. Each is timed alone; so are the same products by the vendor's library (`torch.mm`), or a copy that
reads and writes as many bytes. "% of peak" is the time that the products at the peak rate, or the bytes at the peak
bandwidth, would take, whichever is more, in percent of the measured time. A GPU's peaks are those of its maker's data
sheet, a CPU's are measured: a large product, and a large copy.

    python -m sbert_kernels bench kernels [--quick] [--source cpu]

`kernels_cpu`, `kernels_cuda` and `kernels_triton` are the sources. Another one is a class with the same methods, in
`SOURCES`. On a GPU all of its sources run, one after the other; of one that cannot, a line says why.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tqdm import tqdm

from sbert_kernels import machine
from sbert_kernels.bench import harness
from sbert_kernels.bench.report import Chart, Report

Shape = tuple[int, int, int]  # [m, k] @ [k, n] as (m, n, k)


@dataclass(frozen=True)
class Item:
    """Describes a kernel with its arguments.

    Attributes:
        kernel: Its name.
        shape: The shape that it is given, in words.
        dtype: What the report calls the type.
        call: Runs it once.
        moved: The bytes that it has to read and write.
        products: Its matrix products.
        product_dtype: The type that the vendor's products are measured in.
        rate: Which of the peak rates holds for them: "half", "tf32" or "fp32".
        starts: How often a call of the operation starts it.
        before: Restores what the call overwrites; None: nothing has to be.
    """

    kernel: str
    shape: str
    dtype: str
    call: Callable[[], object]
    moved: float
    products: tuple[Shape, ...] = ()
    product_dtype: torch.dtype = torch.float32
    rate: str = "fp32"
    starts: int = 1
    before: Callable[[], object] | None = None

    @property
    def operations(self) -> float:
        """Returns the operations of its matrix products."""
        return sum(2.0 * m * n * k for m, n, k in self.products)


class Source(Protocol):
    """Hands out the kernels of one backend."""

    device: str

    def items(self, quick: bool) -> Iterator[Item]:
        """Yields the kernels, those first that say most."""

    def seconds(self, item: Item, repeats: int) -> float:
        """Returns the median seconds of a kernel alone."""

    def peaks(self) -> dict[str, float]:
        """Returns the peak operations a second by rate, and the bytes a second as "bandwidth"."""


SOURCES = {"cpu": "CpuKernels", "cuda": "CudaKernels", "triton": "TritonKernels"}
ON_A_GPU = ("cuda", "triton")


def source(name: str) -> Source:
    """Returns the source of a name."""
    module = importlib.import_module(f"sbert_kernels.bench.kernels_{name}")
    found: Source = getattr(module, SOURCES[name])()
    return found


class Yardsticks:
    """Times the vendor's products and copies of so many bytes, each once."""

    def __init__(self, source: Source, repeats: int) -> None:
        self._source, self._repeats = source, repeats
        self._products: dict[tuple[Shape, torch.dtype], float] = {}
        self._copies: dict[int, float] = {}

    def products(self, item: Item) -> float:
        """Returns the seconds of the same products by the vendor's library."""
        return sum(self._product(shape, item.product_dtype) for shape in item.products)

    def _product(self, shape: Shape, dtype: torch.dtype) -> float:
        if (shape, dtype) not in self._products:
            m, n, k = shape
            a, b = (torch.randn(size, device=self._source.device).to(dtype) for size in ((m, k), (k, n)))
            out = torch.empty(m, n, device=self._source.device, dtype=dtype)
            call = Item("product", "", "", lambda: torch.mm(a, b, out=out), 0.0)
            self._products[shape, dtype] = self._source.seconds(call, self._repeats)
        return self._products[shape, dtype]

    def copy(self, item: Item) -> float:
        """Returns the seconds of a copy that reads and writes as many bytes, half of them each."""
        size = max(1, int(item.moved) // 2)
        if size not in self._copies:
            read = torch.zeros(size, dtype=torch.uint8, device=self._source.device)
            written = torch.zeros_like(read)
            call = Item("copy", "", "", lambda: written.copy_(read), 0.0)
            self._copies[size] = self._source.seconds(call, self._repeats)
        return self._copies[size]


def row_of(item: Item, source: Source, yardsticks: Yardsticks, peaks: dict[str, float], repeats: int) -> dict[str, Any]:
    """Returns the row of an item."""
    row: dict[str, Any] = {"kernel": item.kernel, "shape": item.shape, "dtype": item.dtype, "starts": item.starts}
    try:
        seconds = source.seconds(item, repeats)
        if item.products:
            other, limit = "vendor", max(item.operations / peaks[item.rate], item.moved / peaks["bandwidth"])
            other_seconds = yardsticks.products(item)
            row |= {"ms": 1e3 * seconds, "GFLOP": item.operations / 1e9}
            row["TFLOP/s"] = item.operations / seconds / 1e12
        else:
            other, limit = "copy", item.moved / peaks["bandwidth"]
            other_seconds = yardsticks.copy(item)
            row["ms"] = 1e3 * seconds
    except Exception as error:
        lines = str(error).strip().splitlines()
        return row | {"note": f"{type(error).__name__}: {lines[0]}" if lines else repr(error)}
    row |= {"MB": item.moved / 1e6, "GB/s": item.moved / seconds / 1e9, f"{other} ms": 1e3 * other_seconds}
    return row | {"this / other": seconds / other_seconds, "% of peak": 100 * limit / seconds}


def run(args: argparse.Namespace) -> None:
    """Measures the kernels of the sources, prints the table, writes the report; exits non-zero if one could not run."""
    harness.begin(args)
    names = (args.source,) if args.source else ON_A_GPU if torch.cuda.is_available() else ("cpu",)
    if not args.source and not torch.cuda.is_available():
        print("bench kernels: there is no GPU that torch can use, so these are the CPU kernels.", file=sys.stderr)
    found: dict[str, Source] = {}
    for name in names:
        try:
            found[name] = source(name)
        except RuntimeError as error:
            print(f"bench kernels: {error}", file=sys.stderr)
    if not found:
        raise SystemExit(2)
    ran = ", ".join(found)
    peaks = next(iter(found.values())).peaks()  # of one device
    report = Report(
        f"Kernels alone: {ran}{', quick run' if args.quick else ''}",
        "kernels",
        machine.facts() | {"source": ran, "peaks": peaks},
        f"{machine.line()}; source {ran}",
        charts=(Chart("ms (times ours)", {"ours": "ms", "vendor's product": "vendor ms", "copy": "copy ms"}),),
    )
    print(report.machine_line)
    first_not_run = _measure(found.values(), args, peaks, report)
    failed = [f"{row['kernel']} {row['shape']}: {row['note']}" for row in report.rows if "note" in row]
    if first_not_run:
        print(f"not run: there was no time for {first_not_run}, and what comes after it")
    harness.finish(report, args.output, failed, what="kernels that could not run")


def _measure(
    sources: Iterable[Source], args: argparse.Namespace, peaks: dict[str, float], report: Report
) -> str | None:
    """Adds a row for each kernel that there is time for; returns the first that there is none for, or None."""
    end = time.monotonic() + args.seconds
    for found in sources:
        yardsticks = Yardsticks(found, args.repeats)
        with tqdm(found.items(args.quick), file=sys.stderr) as progress:
            for item in progress:
                progress.set_description(f"{item.kernel} {item.shape}")
                if time.monotonic() > end:  # to list the rest, their kernels would have to be compiled
                    return f"{item.kernel} {item.shape} {item.dtype}"
                report.rows.append(row_of(item, found, yardsticks, peaks, args.repeats))
    return None
