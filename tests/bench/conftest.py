"""What keeps a benchmark short enough to be tested: few texts, and no processes that import everything again."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from sbert_kernels.bench import harness
from sbert_kernels.demo import data


@pytest.fixture
def number_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 pairs of texts in the place of all docstrings."""
    pairs = data.Pairs([(f"what is {i}", f"the number {i} comes after {i - 1}") for i in range(100)], "numbers")
    monkeypatch.setattr(data, "docstring_pairs", lambda *packages: pairs)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_in_process` in this one, with 3 MiB as its peak and 2 s as its time."""

    def run_here(target: Callable[..., Callable[[], Any]], *args: object) -> harness.ProcessResult:
        target, args = pickle.loads(pickle.dumps((target, args)))
        return harness.ProcessResult(target(*args)(), peak_extra_bytes=3 * 2**20, seconds=2.0)

    monkeypatch.setattr(harness, "run_in_process", run_here)
