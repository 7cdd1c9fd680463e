"""The options that every benchmark has. This module imports no torch, so that a command line is read quickly."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    quick: str,
    repeats: int,
    cases: Iterable[str] = (),
    large: Sequence[str] = (),
    large_takes: str = "",
) -> None:
    """Adds the options that every benchmark has to a parser.

    Args:
        parser: of the benchmark's own command line.
        quick: what a quick run leaves out.
        repeats: how many rounds of each case are timed by default.
        cases: the names of the benchmark's cases, if it has several to choose from.
        large: those of the cases that run only when they are asked for.
        large_takes: how long the large cases take.
    """
    if cases:
        parser.add_argument(
            "--cases", nargs="+", choices=list(cases), metavar="CASE", help=f"which cases: {', '.join(cases)}"
        )
    if large:
        parser.add_argument("--large", action="store_true", help=f"add {', '.join(large)} ({large_takes})")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--threads", type=int, help="torch threads; default: as torch chooses")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds of each case (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("sbert-kernels-bench"), help="folder (default: %(default)s)"
    )
