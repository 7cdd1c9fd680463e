"""The cases of ``bench contrastive``, and the options of its command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sbert_kernels.bench import arguments
from sbert_kernels.workloads.recipes import OURS, STOCK

QUICK_BATCH = 256
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """Describes one line of the report: a loss class of both libraries, its options and the size of its inputs."""

    loss: str
    batch: int
    cuda_batch: int
    dim: int = 384
    negatives: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 20.0  # what the options make of it; the inputs are drawn for it
    terms: int = 1
    dims: tuple[int, ...] = ()  # in a MatryoshkaLoss with these prefixes
    dtype: str | None = None  # of the embeddings, where it is not --dtype
    precision: str = "highest"  # of float32 products, as torch.set_float32_matmul_precision has it
    autocast: str | None = None  # the type of torch.autocast, in which the forward pass then runs
    alone: bool = False  # stock cannot run it: parity is that of a small batch, and only ours is timed
    rounds: int = 1  # how many for each of --repeats: short calls need more samples
    uncompiled: str | None = None  # why torch.compile is no peer here
    timed: bool = True
    memory: tuple[str, ...] = (STOCK, OURS)

    @property
    def guided(self) -> bool:
        """True if a guide decides which negatives count."""
        return "GIST" in self.loss

    @property
    def cached(self) -> bool:
        """True if the loss runs through the gradient cache."""
        return self.loss.startswith("Cached")


MNR = "MultipleNegativesRankingLoss"
FOUR_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
UNTRACEABLE = "the loss stage runs a backward for each of its mini-batches, which torch.compile can't trace"
CASES = {
    "mnr": Case(MNR, 8192, 32768),
    "mnr-high": Case(MNR, 8192, 32768, precision="high"),
    "mnr-medium": Case(MNR, 8192, 32768, precision="medium"),
    "mnr-bfloat16": Case(MNR, 8192, 32768, dtype="bfloat16"),
    "mnr-autocast": Case(MNR, 8192, 32768, dtype="float32", autocast="bfloat16"),
    "negatives": Case(MNR, 2048, 8192, dim=768, negatives=3),
    "mnr-512": Case(MNR, 512, 4096, rounds=4),
    "mnr-64": Case(MNR, 64, 512, rounds=20),
    "directions": Case(MNR, 4096, 16384, options={"directions": FOUR_DIRECTIONS}, terms=4, precision="high"),
    "symmetric": Case(MNR, 4096, 16384, options=SYMMETRIC, terms=2),
    "gist": Case("GISTEmbedLoss", 512, 2048, scale=100.0, terms=3),
    "gist-large": Case("GISTEmbedLoss", 8192, 32768, scale=100.0, terms=3, alone=True, memory=(OURS,)),
    "matryoshka": Case(MNR, 8192, 32768, dim=512, dims=(512, 256, 128, 64, 32), precision="high"),
    "matryoshka-bfloat16": Case(MNR, 8192, 32768, dim=512, dims=(512, 256, 128, 64, 32), dtype="bfloat16"),
    "cached": Case(
        f"Cached{MNR}",
        8192,
        32768,
        dim=768,
        options={"mini_batch_size": 64},
        precision="high",
        uncompiled=UNTRACEABLE,
    ),
    "memory": Case(MNR, 16384, 65536, timed=False),
    "memory-large": Case(MNR, 65536, 262144, dim=768, timed=False, memory=(OURS,)),
}
LARGE = ("memory-large",)
PEERS = ("stock", "stock float32", "compiled", "ours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch can use it")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on CUDA")
    quick = f"batches of {QUICK_BATCH} at most, no compiled peer"
    takes = "three minutes on two cores"
    arguments.add_arguments(parser, quick=quick, repeats=5, cases=CASES, large=LARGE, large_takes=takes)
