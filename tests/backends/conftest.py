"""The compiled kernels, for the tests that are about them."""

from __future__ import annotations

import pytest

from sbert_kernels import extension


@pytest.fixture
def compiled() -> None:
    """Skips where they can't be compiled for want of a compiler; fails where they should load and don't."""
    reason = extension.load()
    if reason is not None and extension.obstacle() is not None:
        pytest.skip(f"no compiled kernels: {reason}")
    assert reason is None, reason
