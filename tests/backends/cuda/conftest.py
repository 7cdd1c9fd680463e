"""The CUDA backend on a CPU: its library's operator on the host, Triton's kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sbert_kernels.backends import cuda
from support import cuda_operator


@pytest.fixture
def emulated(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has ``backend="cuda"`` serve tensors on the CPU."""
    from sbert_kernels.backends.cuda import contrastive

    monkeypatch.setattr(cuda, "why_not_on", lambda device, by_name: None if by_name else "it is asked for by name")
    monkeypatch.setattr(cuda, "_why_not_library", lambda: None)
    contrastive._programs.clear()
    with cuda_operator.registered():
        yield
    contrastive._programs.clear()
