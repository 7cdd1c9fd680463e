"""Benchmarks, run as from the command line."""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import Any


def run_command(module: ModuleType, *arguments: str) -> Any:
    """Runs a module that has ``add_arguments`` and ``run`` with these arguments; returns what its ``run`` returned."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments))
