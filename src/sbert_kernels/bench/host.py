"""Benchmark: what a step of a loss costs the host, that is Python, before and between the kernels. It needs no GPU.

Small batches take a GPU less time than the host takes to tell it what to do. Here the host does all that it does for a
loss and its backward pass on a GPU, and nothing is computed: embeddings are on the device "meta", where torch's
operations have shapes and no data, and Triton's kernels are left out as they are handed to the driver
(`launching.idling`).

Torch's operations take another time there than on a GPU: some are written in Python. So the time of each alone is
measured again, and ``ours us`` is the step without them, autograd's engine included. A GPU adds some 2 to 5 us for each
kernel and for each operation of torch that computes something. All times are the best of many steps of the same shapes,
because other work on the machine only makes them longer.

    python -m sbert_kernels bench host [--quick] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sbert_kernels import backends, machine, values
from sbert_kernels.backends.triton import TritonBackend
from sbert_kernels.bench import harness
from sbert_kernels.bench.cases.host import CASES, QUICK, Case
from sbert_kernels.bench.report import Report
from sbert_kernels.ops import contrastive, pairwise, ranking

CARD = "H200"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul")
# Operations of torch that hand out memory or another look at it, and start no kernel.
_FREE = (
    "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "view", "_unsafe_view",
    "reshape", "slice", "select", "split", "split_with_sizes", "narrow", "t", "transpose", "permute", "expand",
    "unsqueeze", "squeeze", "unbind", "as_strided", "view_as", "lift_fresh",
)  # fmt: skip
_WARM, _ALONE = 20, 20
_mul = torch.mul


class _AsOnAGpu(TritonBackend):
    """Serves what lies on "meta" as if that were a GPU."""

    def why_not_on(self, device: str, by_name: bool) -> str | None:
        return None if device == "meta" else f"the inputs are on {device}"


@contextmanager
def without_a_gpu() -> Iterator[list[str]]:
    """Lets tensors on "meta" pass for tensors on a GPU whose kernels are left out; gives the list of their names."""
    from sbert_kernels.backends.triton import launching
    from sbert_kernels.backends.triton.targets import BY_NAME

    def readable(*found: Any) -> bool:  # takes its time, as it does for tensors with values
        return values.readable(*found) or True

    def mul(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Takes as long as an operation of C++ where torch's own is written in Python on "meta"."""
        return _mul(a, b) if out is None else out.copy_(a)

    gpu = BY_NAME[CARD]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "BACKENDS", (_AsOnAGpu(),)))
        for operation in (contrastive, ranking, pairwise):
            stack.enter_context(mock.patch.object(operation, "readable", readable))
        stack.enter_context(mock.patch.object(torch, "mul", mul))
        target = launching.Target(gpu.backend, gpu.arch, gpu.multiprocessors)
        yield stack.enter_context(launching.idling(target))


def make_step(case: Case) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Returns a function that computes the loss of a case, and the tensors that get a gradient."""
    from sbert_kernels import contrastive_loss, losses

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dtype = getattr(torch, case.dtype)
    columns = [meta(case.rows, case.dim, dtype=dtype).requires_grad_() for _ in range(case.columns)]
    if case.guide_dim is not None:
        guides = [meta(case.rows, case.guide_dim, dtype=dtype) for _ in columns]
        guide: dict[str, Any] = {"guide_queries": guides[0], "guide_documents": guides[1:]}
        return lambda: contrastive_loss(columns[0], columns[1:], **guide), columns
    if case.dims:
        return lambda: contrastive_loss(columns[0], columns[1:], matryoshka_dims=case.dims), columns
    options = dict(case.options)
    if case.learns_scale:
        options["scale"] = nn.Parameter(torch.tensor(20.0))
    loss = getattr(losses, case.loss)(nn.Identity(), **options)
    if case.learns_scale:
        loss.scale = nn.Parameter(meta())
    labels = meta(case.rows)
    return lambda: loss.compute_loss_from_embeddings(columns, labels), [*columns, *loss.parameters()]


def times_of(step: Callable[[], Tensor], tensors: list[Tensor], repeats: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of each forward and of each backward pass."""
    forward, backward = [], []
    for repeat in range(repeats + _WARM):
        begin = time.perf_counter()
        loss = step()
        middle = time.perf_counter()
        torch.autograd.grad(loss, tensors)
        end = time.perf_counter()
        if repeat >= _WARM:
            forward.append(middle - begin)
            backward.append(end - middle)
    return forward, backward


class _Operations(TorchDispatchMode):
    """Keeps the operations of torch with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.found.append((function, arguments, options or {}))
        return function(*arguments, **(options or {}))

    def names(self) -> Counter[str]:
        """Returns how often each was called."""
        return Counter(str(f).removeprefix("aten.").partition(".")[0].removesuffix("_") for f, _, _ in self.found)

    def seconds(self) -> float:
        """Returns the time of all operations, each alone."""

        def timed(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> float:
            begin = time.perf_counter()
            function(*arguments, **options)
            return time.perf_counter() - begin

        with torch.no_grad():
            return sum(min(timed(*operation) for _ in range(_ALONE)) for operation in self.found)


def calls_of(run: Callable[[], Any]) -> int:
    """Returns how many functions of this package a function calls, and resumes where they are generators."""
    package, calls = str(Path(backends.__file__).parents[1]), 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(package)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


def counts_of(run: Callable[[], Any], launches: list[str]) -> dict[str, float]:
    """Returns what a function does, which it runs twice; ``launches``: the list that :func:`without_a_gpu` gave."""
    calls = calls_of(run)
    launches.clear()
    with _Operations() as operations:
        run()
    names = operations.names()
    products, free = (sum(names[name] for name in group) for group in (PRODUCTS, _FREE))
    return {
        "launches": len(launches),
        "products": products,
        "other kernels": names.total() - products - free,
        "torch operations": names.total(),
        "calls": calls,
        "torch us": 1e6 * operations.seconds(),
    }


def measured(case: Case, repeats: int) -> dict[str, Any]:
    """Returns the row of a case: microseconds of the host, and counts, of the forward and of the backward pass."""
    with without_a_gpu() as launches:
        step, tensors = make_step(case)
        forward, backward = times_of(step, tensors, repeats)
        found = {"forward": counts_of(step, launches)}
        losses = [step(), step()]
        found["backward"] = counts_of(lambda: torch.autograd.grad(losses.pop(), tensors), launches)
    steps = [sum(both) for both in zip(forward, backward, strict=True)]
    ours = 1e6 * min(steps) - sum(part["torch us"] for part in found.values())
    row: dict[str, Any] = {"ours us": ours, "step us": 1e6 * min(steps), "median us": 1e6 * statistics.median(steps)}
    for name, seconds in (("forward", forward), ("backward", backward)):
        row[f"{name} us"] = 1e6 * min(seconds)
        row |= {f"{name}: {what}": count for what, count in found[name].items()}
    return row


def profile_of(case: Case, repeats: int, lines: int = 30) -> str:
    """Returns the functions that most of a case's time is spent in, as Python's profiler prints them."""
    with without_a_gpu():
        step, tensors = make_step(case)
        times_of(step, tensors, 1)
        profiler = cProfile.Profile()
        profiler.runcall(times_of, step, tensors, repeats)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(lines)
    return text.getvalue()


def run(args: argparse.Namespace) -> None:
    """Runs the cases, prints the table, writes the report."""
    cases = harness.begin(args, CASES)
    if args.quick and not args.cases:
        cases = {name: cases[name] for name in QUICK}
    report = Report(
        "The host's share of a step, without a GPU",
        "host",
        machine.facts(),
        f"{machine.line()}; what it would do for an {CARD}",
    )
    print(report.machine_line)
    for name, case in cases.items():
        report.add(case=name, **measured(case, args.repeats))
        if args.profile:
            print(f"{name}\n{profile_of(case, args.repeats)}")
    harness.finish(report, args.output, [])
