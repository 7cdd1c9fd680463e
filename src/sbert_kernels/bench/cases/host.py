"""The cases of ``bench host``, and the options of its command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sbert_kernels.bench import arguments

IN_BATCH, COSENT, ANGLE = "MultipleNegativesRankingLoss", "CoSENTLoss", "AnglELoss"
QUICK = ("in-batch-64", "cosent-1024")


@dataclass(frozen=True)
class Case:
    """Describes one line of the report: a loss class, its inputs, and what is asked of the operation itself."""

    loss: str
    rows: int
    dim: int = 768
    columns: int = 2  # of embeddings
    dtype: str = "bfloat16"
    options: Mapping[str, Any] = field(default_factory=dict)  # of the class
    learns_scale: bool = False
    guide_dim: int | None = None  # a guide of this width: computed by contrastive_loss, without the class
    dims: tuple[int, ...] = ()  # Matryoshka's: computed by contrastive_loss, too


SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
CASES = {
    **{f"in-batch-{rows}": Case(IN_BATCH, rows) for rows in (64, 256, 1024, 4096)},
    "negatives-1024": Case(IN_BATCH, 1024, columns=5),
    "symmetric-1024": Case(IN_BATCH, 1024, options=SYMMETRIC),
    "learned-scale-1024": Case(IN_BATCH, 1024, learns_scale=True),
    "temperature-0.01-1024": Case(IN_BATCH, 1024, options={"scale": 100.0}),
    "float32-1024": Case(IN_BATCH, 1024, dtype="float32"),
    "guide-1024": Case(IN_BATCH, 1024, guide_dim=384),
    "matryoshka-1024": Case(IN_BATCH, 1024, dims=(768, 512, 256, 128, 64)),
    "cosent-1024": Case(COSENT, 1024),
    "angle-1024": Case(ANGLE, 1024),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    parser.add_argument("--profile", action="store_true", help="print where the time of each case goes")
    quick = f"{' and '.join(QUICK)} only"
    arguments.add_arguments(parser, quick=quick, repeats=300, cases=CASES)
