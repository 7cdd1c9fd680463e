"""The kinds of jobs of ``bench gpu``, and the options of its command line."""

from __future__ import annotations

import argparse

from sbert_kernels.bench import arguments

KINDS = {
    "parity": "errors beside eager's, both against float64",
    "contrastive": "time of the in-batch loss",
    "memory": "peak extra memory of the in-batch loss",
    "losses": "time of the ranking losses and of Matryoshka",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    parser.add_argument("--minutes", type=float, default=8.5, help="then no further job begins (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which jobs (default: all)")
    arguments.add_arguments(parser, quick="parity and two sizes of the in-batch loss", repeats=12)
