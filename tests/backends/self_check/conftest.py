"""A library that can be sabotaged stands for one of a GPU; it takes the CPU for its device."""

from __future__ import annotations

from pathlib import Path

import pytest

from sbert_kernels.backends.self_check import cases
from support.self_checked import Library, Process


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Process:
    monkeypatch.setenv("SBERT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SBERT_KERNELS_COMPILE", "0")  # nor does anything compile into that folder
    monkeypatch.setattr(cases, "ROWS", 32)
    monkeypatch.setattr(cases, "USUAL_SIZE", {"contrastive": 64, "ranking": 32, "pairwise": 64})
    monkeypatch.setattr(cases, "LEAST_PAIRS", 32)
    monkeypatch.setattr(cases, "large_rows", lambda multiprocessors: 32)
    started = Process(monkeypatch)
    started.start(Library())
    return started
