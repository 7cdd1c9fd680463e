"""What all benchmarks do before and after they measure: threads and cases, then the printed and written report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from sbert_kernels.bench.report import Report

Case = TypeVar("Case")


def begin(
    args: argparse.Namespace, cases: Mapping[str, Case] | None = None, large: Sequence[str] = ()
) -> dict[str, Case]:
    """Sets the threads that the command line names, and returns the cases that it asks for.

    Without names these are all but the large ones. A benchmark that has no cases gets an empty dictionary.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not cases:
        return {}
    names = args.cases or [name for name in cases if name not in large]
    return {name: cases[name] for name in [*names, *(large if large and args.large else ())]}


def device_of(args: argparse.Namespace) -> str:
    """Returns the device that the command line names; without one "cuda" where torch can use it, else "cpu"."""
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def finish(report: Report, output: Path, failed: Sequence[str], what: str = "parity failed") -> None:
    """Prints the report's table, writes its files and says where; exits non-zero if cases failed, and says ``what``."""
    print(report.markdown())
    print("\n".join(str(path) for path in report.write(output)))
    if failed:
        raise SystemExit(f"{what}: {', '.join(failed)}")


def command_line(
    description: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], None],
) -> None:
    """Runs a study that is a file of its own; `description` is the docstring of its module."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    add_arguments(parser)
    run(parser.parse_args())
