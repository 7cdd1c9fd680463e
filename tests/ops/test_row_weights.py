"""Rows that do not count: no loss and no gradients where there are no others, whoever computes it."""

from __future__ import annotations

import pytest
import torch

from sbert_kernels import contrastive_loss


@pytest.mark.parametrize("backend", ["reference", "blockwise", "cpu"])
@pytest.mark.parametrize("dims", [None, (5, 3)])
def test_all_zero_weights_are_a_loss_of_zero(backend: str, dims: tuple[int, ...] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(6, 5, generator=generator).requires_grad_() for _ in range(2))
    scale, weights = torch.tensor(20.0, requires_grad=True), torch.zeros(6, requires_grad=True)
    loss = contrastive_loss(queries, documents, scale=scale, weights=weights, matryoshka_dims=dims, backend=backend)
    loss.backward()
    assert loss == 0
    for tensor in (queries, documents, scale):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    assert weights.grad.isfinite().all()
