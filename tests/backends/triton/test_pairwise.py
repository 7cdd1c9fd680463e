"""The kernels of scored pairs in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbert_kernels import pairwise_similarity

pytestmark = pytest.mark.usefixtures("interpreted")

NAMES = ("cos", "dot", "angle")


def run(
    x: Tensor, columns: list[Tensor], names: tuple[str, ...], flowing: list[Tensor], dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """In float64, computed in ``dtype``: scores and gradients."""
    leaves = [v.detach().to(dtype).requires_grad_() for v in (x, *columns)]
    scores = pairwise_similarity(leaves[0], leaves[1:], names, backend=backend)
    total = sum((score.double() * weight).sum() for score, weight in zip(scores, flowing, strict=True))
    return [v.detach().double() for v in (*scores, *torch.autograd.grad(total, leaves))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=8, derandomize=True)
@given(data=st.data())
def test_equals_float64(dtype: torch.dtype, data: st.DataObject) -> None:
    # Cosines of fewer entries have gradients that nearly cancel.
    n, dim = data.draw(st.integers(0, 9)), data.draw(st.integers(8, 70))
    names = tuple(sorted(data.draw(st.sets(st.sampled_from(NAMES), min_size=1))))
    if "angle" in names:
        dim += dim % 2
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))

    def vectors() -> Tensor:
        return torch.randn(n, dim, generator=generator).bfloat16().float()

    x, columns = vectors(), [vectors() for _ in range(data.draw(st.integers(1, 3)))]
    if n and dtype != torch.float16:  # which cannot hold a gradient over eps
        x[0] = 0.0
    flowing = [torch.randn(n * len(columns), dtype=torch.float64, generator=generator) for _ in names]
    ours = run(x, columns, names, flowing, dtype, "triton")
    eager = run(x, columns, names, flowing, torch.float32, "reference")
    exact = run(x, columns, names, flowing, torch.float64, "reference")
    # Scores are float32's; gradients are rounded to the embeddings' type.
    units = [2.0**-22] * len(names) + [torch.finfo(dtype).eps + 2.0**-22] * (1 + len(columns))
    for value, other, wanted, unit in zip(ours, eager, exact, units, strict=True):
        # Of a gradient that cancels (a cosine of one number), what cancelled sets the rounding.
        assert (value - wanted).norm() <= 2 * (other - wanted).norm() + unit * max(wanted.norm().item(), 1e-2 * n)


def test_inputs_in_any_layout() -> None:
    x, y = torch.randn(30, 20), torch.randn(20, 30)
    ours = pairwise_similarity(x[::2, 1:19], y.T[::2, 2:], NAMES, backend="triton")
    exact = pairwise_similarity(x[::2, 1:19].double(), y.T[::2, 2:].double(), NAMES, backend="reference")
    for value, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
