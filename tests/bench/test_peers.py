"""What the benchmarks of losses compare gradients with."""

from __future__ import annotations

import pytest
import torch

from sbert_kernels.bench.peers import gradient_difference


def test_a_gradient_of_roundings_is_compared_on_the_scale_of_the_whole():
    large, small = torch.tensor([1.0, 0.0]), torch.tensor([1e-9])
    assert gradient_difference([large, small], [large, -small]) < 1e-5
    assert gradient_difference([large, small], [large, small + 0.1]) > 1
    assert gradient_difference([large, 1e-2 * large], [large, 1.1e-2 * large]) == pytest.approx(0.1, rel=1e-5)
