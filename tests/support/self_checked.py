"""Stand-ins for the self-check: a library that can be sabotaged, and processes that choose it or torch operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sbert_kernels import backends
from sbert_kernels.backends import self_check
from sbert_kernels.backends._backend import Operations
from sbert_kernels.backends.blockwise import BlockwiseBackend

CPU = torch.device("cpu")
Sabotage = Callable[[Any], Any]


class Library(BlockwiseBackend):
    """Computes pairwise gradients as ``sabotage`` changes them."""

    name = "library"
    summary = "a library"
    device = "cpu"
    self_checked = "quickly"

    def __init__(self, sabotage: Sabotage = lambda gradient: gradient) -> None:
        self.sabotage, self.calls = sabotage, 0

    def load(self) -> Operations:
        right = super().load()

        def gradients(problem: Any, *rest: Any) -> Any:
            self.calls += 1
            found = right.pairwise.pairwise_gradients(problem, *rest)
            return found._replace(x=self.sabotage(found.x))

        return right._replace(pairwise=SimpleNamespace(pairwise=right.pairwise.pairwise, pairwise_gradients=gradients))

    def kernel_files(self) -> tuple[Path, ...]:
        return (Path(__file__),)


class Process:
    """Starts processes that choose between a library and torch operations; each has forgotten what the others found."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def start(self, library: Library) -> Library:
        for name, empty in (("_right", set()), ("_unchecked", set()), ("_wrong", {}), ("_raised", {})):
            self._monkeypatch.setattr(self_check, name, empty)
        self._monkeypatch.setattr(backends, "BACKENDS", (library, BlockwiseBackend()))
        return library


def chosen(operation: str = "pairwise", **values: Any) -> str:
    x = torch.ones(2, 4)
    parts: dict[str, Any] = {"x": x, "queries": x, "scores": x[0], "autocast": None, "device": CPU, **values}
    return backends.choose(operation, problem=SimpleNamespace(**parts)).backend.name


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.json"))


def scaled(gradient: Tensor) -> Tensor:
    return gradient * 1.01


def one_wrong_row(gradient: Tensor) -> Tensor:
    gradient[7] = gradient[8]
    return gradient


def one_nan(gradient: Tensor) -> Tensor:
    gradient[3, 5] = float("nan")
    return gradient


def raising(error: BaseException) -> Sabotage:
    def sabotage(gradient: Tensor) -> Tensor:
        raise error

    return sabotage
