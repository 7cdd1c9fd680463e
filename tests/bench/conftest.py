"""What keeps a benchmark short enough to be tested: few texts, and no processes that import everything again."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from sbert_kernels import machine
from sbert_kernels.workloads import texts


@pytest.fixture
def number_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 pairs of texts in the place of all docstrings."""
    pairs = texts.Pairs([(f"what is {i}", f"the number {i} comes after {i - 1}") for i in range(100)], "numbers")
    monkeypatch.setattr(texts, "docstring_pairs", lambda *packages: pairs)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_in_process` in this one, with 3 MiB as its peak and 2 s as its time."""

    def run_here(target: Callable[..., Callable[[], Any]], *args: object) -> machine.ProcessResult:
        target, args = pickle.loads(pickle.dumps((target, args)))
        return machine.ProcessResult(target(*args)(), peak_extra_bytes=3 * 2**20, seconds=2.0)

    monkeypatch.setattr(machine, "run_in_process", run_here)
