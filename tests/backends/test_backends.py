"""Which backend serves a call."""

from __future__ import annotations

import pytest

from sbert_kernels import use_backend
from sbert_kernels.backends import BACKENDS, OPERATIONS, choose
from sbert_kernels.backends.cpu import contrastive as cpu


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_backend_has_the_operations_that_it_declares(operation: str) -> None:
    for backend in BACKENDS:
        if operation in backend.operations:
            assert callable(getattr(backend.module(operation), operation))


def test_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unsupported", lambda problem: None)
    assert choose("contrastive").backend.name == "cpu"
    monkeypatch.setattr(cpu, "unsupported", lambda problem: "there is no compiler")
    choice = choose("contrastive")
    assert choice.backend.name == "blockwise"
    assert "preference" in choice.reason
    assert "not cpu: there is no compiler" in choice.reason
    with pytest.raises(ValueError, match="backend='cpu' cannot serve this call: there is no compiler"):
        choose("contrastive", "cpu")
    monkeypatch.setenv("SBERT_KERNELS_BACKEND", "reference")
    assert choose("contrastive").backend.name == "reference"
    assert "SBERT_KERNELS_BACKEND" in choose("contrastive").reason
    with use_backend("blockwise"):
        assert choose("contrastive").backend.name == "blockwise"
        with use_backend(None):
            assert "preference" in choose("contrastive").reason
        assert choose("contrastive", "reference").backend.name == "reference"


def test_unknown_names_are_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"name='tritn' is not a backend: expected one of \['cpu', 'blockwise'"),
        use_backend("tritn"),
    ):
        pass
    with pytest.raises(ValueError, match="operation='ranking_loss' is unknown"):
        choose("ranking_loss")
