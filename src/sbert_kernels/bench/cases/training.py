"""The cases of ``bench training``, and the options of its command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sbert_kernels.bench import arguments
from sbert_kernels.workloads.recipes import MATRYOSHKA_DIMS, STATIC_DIM

QUICK_BATCH, QUICK_DIM, QUICK_PACKAGES = 256, 64, ("numpy",)


@dataclass(frozen=True)
class Case:
    """Describes two rows of the report, one for each side."""

    matryoshka: tuple[int, ...] = ()
    workers: int = 0
    batch: int = 8192
    dim: int = STATIC_DIM


CASES = {
    "mnr": Case(),
    "mnr-overlapped": Case(workers=1),
    "matryoshka": Case(MATRYOSHKA_DIMS),
    "matryoshka-overlapped": Case(MATRYOSHKA_DIMS, workers=1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    parser.add_argument(
        "--steps", type=int, default=4, help="steps of each training; the first warms up (default: %(default)s)"
    )
    quick = f"batches of {QUICK_BATCH}, {QUICK_DIM} dimensions, docstrings of {', '.join(QUICK_PACKAGES)} alone"
    arguments.add_arguments(parser, quick=quick, repeats=3, cases=CASES)
