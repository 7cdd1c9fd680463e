"""The Triton kernels as items of `bench kernels`: each launch of a call, started again by itself.

A call of an operation lists its launches (`launching.recording`) on real tensors, and each is then started as often as
is wanted, without a word about its parameters in here: all launches once in their order, so that each finds what those
before it wrote. What a kernel has to read and write are the tensors that it is given, except as `KERNELS` says.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sbert_kernels import machine, pairwise_similarity, ranking_loss, settings
from sbert_kernels.backends.triton import launching, why_not_on
from sbert_kernels.backends.triton.targets import BY_NAME, Gpu
from sbert_kernels.bench.cases.kernels import TRITON, Case, Pairs, Products, chosen
from sbert_kernels.bench.kernels import Item, Shape
from sbert_kernels.bench.kernels_cpu import call_of, embeddings

CACHE_BYTES = 256 * machine.MIB  # written before each start, so that nothing is in the card's cache
WARMUP = 2


# What a kernel multiplies, by the names of its parameters: [m, k] and [k, n] or [n, k]; the first pair that it has.
OPERANDS = (("rows.vectors", "columns.vectors"), ("a", "b"))


@dataclass(frozen=True)
class Kernel:
    """Says of a kernel what its tensors do not, by names of parameters ("rows.vectors" of a tuple).

    Attributes:
        multiplies: It has a matrix product, of `OPERANDS`.
        updated: What is read and written in place; restored before each start.
        updated_if: The constant that has to be true for that.
        untouched: What it is given and does not read, or only where rows have to be done again.
    """

    multiplies: bool = False
    updated: tuple[str, ...] = ()
    updated_if: str | None = None
    untouched: tuple[str, ...] = ()


KERNELS = {
    "sweep": Kernel(multiplies=True),
    "weigh": Kernel(updated=("dots",), untouched=("rows.vectors", "columns.vectors")),
    "redo": Kernel(untouched=("rows", "columns", "guide", "known", "weights")),
    "matrix_product": Kernel(multiplies=True, updated=("out",), updated_if="ADD"),
    "norms_backward": Kernel(updated=("gradient",)),
    "add_rows": Kernel(updated=("gradient",)),
    "pair_gradients": Kernel(updated=("x_gradient",), updated_if="ADD"),
}


class TritonKernels:
    """Hands out the launches, of ``ways`` of making weights; raises RuntimeError where Triton cannot run.

    For tests a device may be named.
    """

    def __init__(
        self, device: str = "cuda", cases: Sequence[Case] = TRITON, ways: Sequence[str] = settings.WEIGHTS
    ) -> None:
        why_not = (
            why_not_on(device, by_name=True) if device != "cuda" or torch.cuda.is_available() else "torch sees none"
        )
        if why_not is not None:
            raise RuntimeError(f"the Triton kernels need a GPU: {why_not}")
        self.device, self.cases, self.ways = device, cases, ways
        self.target = launching.target_of(torch.device(device))

    def items(self, quick: bool) -> Iterator[Item]:
        """Yields each launch of each case, one after the other; what both ways of making weights share comes once."""
        for case in chosen(self.cases, quick):
            if isinstance(case, Pairs):
                yield from self._launches(case, _of_pairs(case, self.device), set())
                continue
            call, vectors = call_of(case, self.device)
            seen: set[Any] = set()
            for way in self.ways:
                yield from self._launches(case, _with_gradients(call, vectors), seen, way)
            if self.device.startswith("cuda"):
                yield from _vendor_products(case, self.device)

    def _launches(
        self, case: Case, call: Callable[[], object], seen: set[Any], way: str | None = None
    ) -> Iterator[Item]:
        """Yields the launches of a call, those that take the same time once, and none of those that were seen."""
        precision = getattr(case, "precision", "highest")
        chosen = {} if way is None else {"weights": way}
        with (
            machine.matmul_precision(precision),
            settings.override(backend="triton", **chosen),
            launching.recording(self.target) as launches,
            torch.autograd.set_multithreading_enabled(False),  # other threads would not know that launches are listed
        ):
            call()
        found: dict[Any, list[launching.Launch]] = {}
        for launch in launches:
            found.setdefault(_likeness(launch), []).append(launch)
        kept = {key: _Restorer(alike[0]) for key, alike in found.items()}
        for launch in launches:
            start(launch)
        shape = case.name if way is None else f"{case.name}, {way}"
        firsts = [alike[0] for alike in found.values()]
        for key, alike in found.items():
            if key in seen:
                continue
            seen.add(key)
            yield _item(alike[0], label(alike[0], firsts), shape, case, len(alike), kept[key])

    def seconds(self, item: Item, repeats: int) -> float:
        """Returns the median seconds of a start, with nothing in the card's cache."""
        if not self.device.startswith("cuda"):
            return machine.measure({"item": item.call}, repeats=repeats)["item"].median_s
        cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=self.device)
        samples = []
        for _ in range(WARMUP + repeats):
            if item.before is not None:
                item.before()
            cache.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            item.call()
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(samples[WARMUP:])

    def peaks(self) -> dict[str, float]:
        """Returns the peaks of the card, or of the one in the table that is most like it."""
        name = torch.cuda.get_device_name() if self.device.startswith("cuda") else ""
        named = [gpu for gpu in BY_NAME.values() if gpu.name in name]
        gpu: Gpu = max(named, key=lambda found: len(found.name)) if named else self.target.gpu
        return {"half": gpu.half, "tf32": gpu.tf32, "fp32": gpu.fp32, "bandwidth": gpu.bandwidth}


def start(launch: launching.Launch) -> None:
    """Starts a listed kernel."""
    tiles = dict(launch.config.tiles)
    constants = {name: value for name, value in launch.constants.items() if name not in tiles}
    launching.launch(launch.kernel, launch.grid, config=launch.config, **launch.arguments, **constants)


# -- what a launch reads, writes and multiplies -----------------------------------------------------------------------


def tensors(launch: launching.Launch) -> dict[str, Tensor]:
    """Returns the tensors that a launch is given, by the names of parameters; those in tuples as "rows.vectors"."""
    found: dict[str, Tensor] = {}
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, tuple):
            names = getattr(value, "_fields", range(len(value)))
            parts = zip(names, value, strict=True)
            found |= {f"{name}.{part}": x for part, x in parts if isinstance(x, Tensor)}
    return found


def _kernel(launch: launching.Launch) -> Kernel:
    kernel = KERNELS.get(launch.kernel.__name__, Kernel())
    if kernel.updated_if is not None and not launch.constants.get(kernel.updated_if):
        return replace(kernel, updated=())
    return kernel


def moved_bytes(launch: launching.Launch) -> float:
    """Returns the bytes that a launch has to read and write: each tensor once, what is updated in place twice."""
    kernel, total = _kernel(launch), 0
    for name, tensor in tensors(launch).items():
        if name in kernel.untouched or name.partition(".")[0] in kernel.untouched:
            continue
        # `weigh` writes its weights over the dot products; both are parameters, and count once each.
        total += tensor.numel() * tensor.itemsize * (2 if name in kernel.updated and name != "dots" else 1)
    return float(total)


def operands(launch: launching.Launch) -> tuple[Tensor, Tensor] | None:
    """Returns what a launch multiplies, or None."""
    if not _kernel(launch).multiplies:
        return None
    given = tensors(launch)
    a, b = next(pair for pair in OPERANDS if pair[0] in given)
    return given[a], given[b]


def product_of(launch: launching.Launch) -> Shape | None:
    """Returns the matrix product of a launch, as (m, n, k); None if it has none."""
    pair = operands(launch)
    if pair is None:
        return None
    m, k = pair[0].shape
    return m, pair[1].numel() // k, k


def label(launch: launching.Launch, others: Sequence[launching.Launch]) -> str:
    """Returns a kernel's name, and what tells the launch from others of the same kernel: outputs and constants."""
    alike = [tensors(other) | other.constants for other in others if other.kernel is launch.kernel]
    here = tensors(launch) | launch.constants
    parts = [name for name in tensors(launch) if not all(name in other for other in alike)]
    parts += [
        f"{name}={value}"
        for name, value in launch.constants.items()
        if name not in dict(launch.config.tiles) and any(str(other.get(name)) != str(here[name]) for other in alike)
    ]
    return launch.kernel.__name__ + (f" ({', '.join(parts)})" if parts else "")


def _item(launch: launching.Launch, name: str, shape: str, case: Case, starts: int, kept: _Restorer) -> Item:
    product, pair = product_of(launch), operands(launch)
    dtype = torch.float32 if pair is None else pair[0].dtype
    narrow = dtype in (torch.bfloat16, torch.float16)
    return Item(
        kernel=name,
        shape=shape,
        dtype=case.kind if isinstance(case, Products) else case.dtype,
        call=lambda: start(launch),
        moved=moved_bytes(launch),
        products=() if product is None else (product,),
        product_dtype=dtype,
        rate="half" if narrow else ("tf32" if getattr(case, "precision", "highest") == "high" else "fp32"),
        starts=starts,
        before=kept.restore if kept.saved else None,
    )


class _Restorer:
    """Keeps a copy of what a launch updates in place, as it was before the launch."""

    def __init__(self, launch: launching.Launch) -> None:
        given = tensors(launch)
        self.saved = [(given[name], given[name].clone()) for name in _kernel(launch).updated if name in given]

    def restore(self) -> None:
        """Puts it back."""
        for tensor, copy in self.saved:
            tensor.copy_(copy)


def _likeness(launch: launching.Launch) -> tuple[Any, ...]:
    """Returns what launches have in common that take the same time: kernel, grid, constants, shapes and types."""
    shapes = [(name, tuple(x.shape), x.stride(), x.dtype) for name, x in tensors(launch).items()]
    constants = [(name, str(value)) for name, value in launch.constants.items()]
    return (launch.kernel.__name__, launch.grid, *shapes, *constants, launch.config)


# -- calls ------------------------------------------------------------------------------------------------------------


def _with_gradients(call: Callable[[], Tensor], vectors: Sequence[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call(), list(vectors))


def _of_pairs(case: Pairs, device: str) -> Callable[[], object]:
    """Returns a call of ranking or pairwise similarities, with its gradients."""
    if case.dim is None:
        generator = torch.Generator(device).manual_seed(0)
        scores, labels = (torch.rand(case.rows, device=device, generator=generator) for _ in range(2))
        scores.requires_grad_()
        return _with_gradients(lambda: ranking_loss(scores, labels), [scores])
    x, y = (embeddings(case.rows, case.dim, case.dtype, seed, device) for seed in (0, 1))
    return _with_gradients(lambda: pairwise_similarity(x, y, (case.similarity,))[0].sum(), [x, y])


def _vendor_products(case: Products, device: str) -> Iterator[Item]:
    """Yields the vendor's products of a chunk with float32 results, as the operation calls them."""
    n, m, dim, dtype = case.rows, case.columns, case.dim, getattr(torch, case.dtype)
    half = dtype != torch.float32
    rate = "half" if half else ("fp32" if case.precision == "highest" else "tf32")
    for name, shape in (("logits", (n, m, dim)), ("rows' gradient", (n, dim, m)), ("columns' gradient", (m, dim, n))):
        rows, columns, inner = shape
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(inner, columns, device=device).to(dtype)
        out = torch.empty(rows, columns, device=device)

        def call(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> Tensor:
            with machine.matmul_precision(case.precision):
                return torch.mm(a, b, out_dtype=torch.float32, out=out) if half else torch.mm(a, b, out=out)

        moved = float(a.numel() * a.itemsize + b.numel() * b.itemsize + out.numel() * out.itemsize)
        yield Item(f"vendor: {name}", case.name, case.kind, call, moved, (shape,), dtype, rate)
