"""Benchmarks, run as from the command line."""

from __future__ import annotations

import argparse
from typing import Any

from sbert_kernels.bench import command


def run_command(subject: str, *arguments: str) -> Any:
    """Runs ``python -m sbert_kernels bench`` with this subject and these arguments; returns what it returned."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parsed = parser.parse_args([subject, *arguments])
    return parsed.run(parsed)
