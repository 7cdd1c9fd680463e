"""The C++ operations as items of `bench kernels`: whole operations, from embeddings to gradients.

The compiled library starts an operation as a whole, so that an item is an operation. Loss and gradients of the
contrastive operation come from one call: similarities, and one product for each side's gradients. Without gradients it
is the similarities alone. A Matryoshka loss needs the products of its widest prefix only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sbert_kernels import contrastive_loss, machine, native, pairwise_similarity, ranking_loss, settings
from sbert_kernels.backends.cpu.contrastive import bfloat16_instructions
from sbert_kernels.bench.cases.kernels import CPU, Pairs, Products, chosen
from sbert_kernels.bench.kernels import Item, Shape

PEAK_SIZE = 2048  # of the square product whose rate is the peak
SECONDS = 2.0  # no further round of a call starts after them


class CpuKernels:
    """Hands out the C++ operations; raises RuntimeError where they cannot be loaded."""

    device = "cpu"

    def __init__(self) -> None:
        why_not = native.cpu.load()
        if why_not is not None:
            raise RuntimeError(f"the compiled CPU kernels are not there: {why_not}")

    def items(self, quick: bool) -> Iterator[Item]:
        """Yields the operations, with and without gradients."""
        for case in chosen(CPU, quick):
            yield from _of_products(case) if isinstance(case, Products) else _of_pairs(case)

    def seconds(self, item: Item, repeats: int) -> float:
        """Returns the median seconds of an operation."""
        with settings.override(backend="cpu"):
            return machine.measure({"item": item.call}, repeats=repeats, budget_s=SECONDS)["item"].median_s

    def peaks(self) -> dict[str, float]:
        """Returns the rates of a large product and of a large copy, as measured here and now."""
        types = {"fp32": torch.float32} | ({"half": torch.bfloat16} if bfloat16_instructions() else {})
        rates = {
            name: 2.0 * PEAK_SIZE**3 / machine.gemm_seconds(PEAK_SIZE, PEAK_SIZE, PEAK_SIZE, dtype)
            for name, dtype in types.items()
        }
        return rates | {"bandwidth": machine.copy_bandwidth()}


def embeddings(rows: int, dim: int, dtype: str, seed: int, device: str = "cpu") -> Tensor:
    """Returns random embeddings (rows, dim) that need a gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, dim, device=device, generator=generator).to(getattr(torch, dtype)).requires_grad_()


def call_of(case: Products, device: str = "cpu") -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Returns a call of the contrastive operation, whose gradients come with the loss, and its embeddings."""
    queries = embeddings(case.rows, case.dim, case.dtype, 0, device)
    documents = embeddings(case.columns, case.dim, case.dtype, 1, device)
    with torch.no_grad():  # a query knows something about its document
        documents[: case.rows] += queries
    return lambda: contrastive_loss(queries, documents, scale=case.scale, **case.options), [queries, documents]


def _of_products(case: Products) -> Iterator[Item]:
    call, vectors = call_of(case)
    n, m, dim = case.rows, case.columns, case.dim
    read = float(sum(x.numel() * x.itemsize for x in vectors))
    gradients: tuple[Shape, ...] = ((n, dim, m), (m, dim, n))  # [n, m] @ [m, D] and [m, n] @ [n, D]

    def without_gradients() -> Tensor:
        with torch.no_grad():
            return call()

    for name, run, products, moved in (
        ("contrastive", call, ((n, m, dim), *gradients), 2 * read),
        ("contrastive, loss alone", without_gradients, ((n, m, dim),), read),
    ):
        # Without instructions for it, bfloat16 is multiplied in float32.
        half = case.dtype == "bfloat16" and bfloat16_instructions() is not None
        dtype, rate = (torch.bfloat16, "half") if half else (torch.float32, "fp32")
        yield Item(name, case.name, case.kind, run, moved, products, dtype, rate)


def _of_pairs(case: Pairs) -> Iterator[Item]:
    if case.dim is None:
        generator = torch.Generator().manual_seed(0)
        scores, labels = (torch.rand(case.rows, generator=generator) for _ in range(2))
        scores.requires_grad_()
        yield Item("ranking", case.name, case.dtype, lambda: ranking_loss(scores, labels), 3.0 * 4 * case.rows)
        return
    x, y = (embeddings(case.rows, case.dim, case.dtype, seed) for seed in (0, 1))
    read = float(2 * x.numel() * x.itemsize)

    def forward() -> Tensor:
        return pairwise_similarity(x, y, (case.similarity,))[0]

    with settings.override(backend="cpu"):
        scores = forward()
    given = torch.ones_like(scores)
    yield Item("pairwise", case.name, case.dtype, forward, read)
    yield Item(
        "pairwise, gradients",
        case.name,
        case.dtype,
        lambda: torch.autograd.grad(scores, (x, y), given, retain_graph=True),
        2 * read,
    )
