"""The memory of the ranking losses, metered in a process of its own, which imports this file and little else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sbert_kernels import angle_loss, machine
from sbert_kernels.settings import MIB


def step_of(name: str, n: int, dim: int) -> Any:
    """Target of the memory meter: warm up on a small batch, then one step of the wanted size."""
    torch.manual_seed(0)
    x, y = (torch.randn(n, dim, requires_grad=True) for _ in range(2))
    labels = torch.rand(n)
    angle_loss(x[:64], y[:64], labels[:64], backend=name).backward()
    x.grad = y.grad = None

    def step() -> bool:
        angle_loss(x, y, labels, backend=name).backward()
        return math.isfinite(x.grad.sum().item())

    return step


@pytest.mark.parametrize(("name", "mebibytes"), [("cpu", 16), ("blockwise", 32)])
def test_memory_is_the_gradients_and_some_numbers_a_pair(compiled: None, name: str, mebibytes: int) -> None:
    n, dim = 65_536, 128
    result = machine.run_in_process(step_of, name, n, dim)
    assert result.value is True
    assert result.peak_extra_bytes < 2 * n * dim * 4 + mebibytes * MIB
