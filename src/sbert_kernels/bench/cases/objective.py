"""The cases of ``bench objective``, and the options of its command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sbert_kernels.bench import arguments
from sbert_kernels.bench.cases.training import QUICK_DIM, QUICK_PACKAGES
from sbert_kernels.workloads.recipes import STATIC_DIM

QUICK_BATCH = 16


@dataclass(frozen=True)
class Case:
    """Describes one line of the report."""

    model: str
    batch: int
    dim: int | None = None  # of the static model; the other has its own


CASES = {"static": Case("static", 4096, STATIC_DIM), "minilm": Case("minilm", 64)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    quick = f"batches of {QUICK_BATCH}, {QUICK_DIM} static dimensions, docstrings of {', '.join(QUICK_PACKAGES)} alone"
    arguments.add_arguments(parser, quick=quick, repeats=5, cases=CASES)
