"""The shapes of ``bench kernels``, and the options of its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sbert_kernels.bench import arguments

SOURCES = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Products:
    """Describes a call of the contrastive operation: N queries, each with its document and so many negatives."""

    rows: int
    dim: int
    dtype: str = "float32"
    negatives: int = 0
    scale: float = 20.0
    precision: str = "highest"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """Returns the number of documents."""
        return self.rows * (1 + self.negatives)

    @property
    def name(self) -> str:
        """Returns the shape and the options in one line."""
        options = ["", *([f"scale {self.scale:g}"] if self.scale != 20 else [])]
        options += [f"{key} {value}" for key, value in self.options.items()]
        return f"{self.rows} x {self.columns} x {self.dim}{', '.join(options)}"

    @property
    def kind(self) -> str:
        """Returns the type, and for float32 how it is multiplied."""
        return f"float32 {self.precision}" if self.dtype == "float32" else self.dtype


@dataclass(frozen=True)
class Pairs:
    """Describes a call of an operation on pairs; without a dimension it is the ranking of scores that exist already."""

    rows: int
    dim: int | None = None
    similarity: str = "cos"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Returns the shape in one line."""
        return f"{self.rows} x {self.dim}, {self.similarity}" if self.dim else f"{self.rows} pairs"


PREFIXES = (512, 256, 128, 64, 32)
Case = Products | Pairs
CPU: tuple[Case, ...] = (
    *(Products(rows, 384) for rows in (512, 2048, 8192)),
    Products(4096, 768),
    Products(8192, 384, scale=100.0),
    Products(4096, 512, options={"matryoshka_dims": PREFIXES}),
    Products(4096, 384, "bfloat16"),
    *(Pairs(rows) for rows in (1024, 65536, 1_000_000)),
    *(Pairs(rows, 384, similarity) for rows in (1024, 65536) for similarity in ("cos", "angle")),
)
# 4096 x 65536 is a chunk of a batch of 65,536.
TRITON: tuple[Case, ...] = (
    *(Products(4096, dim, "bfloat16", negatives=15) for dim in (768, 384)),
    *(Products(rows, 768, "bfloat16") for rows in (1024, 16384)),
    Products(16384, 768, "bfloat16", scale=100.0),
    Products(16384, 768, "float16"),
    *(Products(16384, 768, precision=precision) for precision in ("highest", "high")),
    Products(16384, 768, "bfloat16", options={"matryoshka_dims": (768, 512, 256, 128, 64)}),
    *(Pairs(rows) for rows in (1024, 8192, 65536)),
    *(Pairs(rows, 768, similarity, "bfloat16") for rows in (1024, 65536) for similarity in ("cos", "angle")),
)
# Half precision alone. 384 and 256 show what a shorter product leaves of the time of its epilogue.
CUDA: tuple[Products, ...] = (
    *(Products(4096, dim, "bfloat16", negatives=15) for dim in (768, 384)),
    Products(16384, 768, "bfloat16"),
    Products(4096, 256, "bfloat16", negatives=15),
    Products(4096, 768, "float16", negatives=15),
    Products(1024, 768, "bfloat16"),
)
QUICK_ROWS = 256


def chosen(cases: Sequence[Case], quick: bool) -> list[Case]:
    """Returns the cases of a run; those of a quick one have few rows, and none comes twice."""
    found: list[Case] = []
    for case in cases:
        smaller = replace(case, rows=min(case.rows, QUICK_ROWS)) if quick else case
        found += [] if smaller in found else [smaller]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    parser.add_argument("--source", choices=SOURCES, help="whose kernels; default: all that run here on a GPU, or cpu")
    parser.add_argument(
        "--seconds", type=float, default=200.0, help="then no further kernel begins (default: %(default)s)"
    )
    arguments.add_arguments(parser, quick=f"{QUICK_ROWS} rows at most", repeats=9)
