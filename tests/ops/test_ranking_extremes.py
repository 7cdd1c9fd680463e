"""Scales, weights, labels and numbers of pairs at the ends of what the ranking and pairwise operations accept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sbert_kernels import cosent_loss, pairwise_similarity, ranking_loss

BACKENDS = ("blockwise", "cpu")
EPS = torch.finfo(torch.float64).eps
SCORES = torch.tensor([0.1, 0.5, 0.3, -0.2], dtype=torch.float64)
LABELS = torch.tensor([2, 1, 0, 0])


def _gradients(backend: str, *, scale: float = 20.0, weights: Tensor | None = None) -> tuple[Tensor, ...]:
    scores, factor = SCORES.clone().requires_grad_(), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    loss = ranking_loss(scores, LABELS, scale=factor, weights=weights, backend=backend)
    return loss.detach(), *torch.autograd.grad(loss, (scores, factor))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e15, 1e18, 1e20, -1e25, 1e300])
def test_a_scale_of_any_size_leaves_the_hardest_comparison(backend: str, scale: float) -> None:
    # The largest difference outgrows all others: the loss is scale * (s_i - s_j), with the gradients of that.
    differences = torch.sign(torch.tensor(scale)) * (SCORES[:, None] - SCORES[None, :])
    differences = differences.masked_fill(LABELS[:, None] >= LABELS[None, :], -torch.inf)
    lower, higher = divmod(int(differences.argmax()), len(SCORES))
    expected = torch.zeros(len(SCORES), dtype=torch.float64)
    expected[lower], expected[higher] = scale, -scale
    loss, scores, factor = _gradients(backend, scale=scale)
    difference = float(SCORES[lower] - SCORES[higher])
    assert loss == pytest.approx(scale * difference, rel=8 * EPS)
    assert torch.allclose(scores, expected, rtol=8 * EPS, atol=0)
    assert factor == pytest.approx(difference, rel=8 * EPS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2e15, 4e15])
def test_large_scores_keep_differences_that_doubles_can_tell(backend: str, size: float) -> None:
    # The zero, of the lowest label, makes the range of the scores as large as they are.
    scores = torch.tensor([size + 1, size, 0.0], dtype=torch.float64)
    loss = ranking_loss(scores, torch.tensor([1, 2, 0]), scale=1.0, backend=backend)
    assert loss == pytest.approx(math.log1p(math.e), rel=8 * EPS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-200, 1e170, 1e300])
def test_the_product_of_two_weights_need_not_be_a_double(backend: str, size: float) -> None:
    # log(1 + c^2 S) = 2 log c + log S for large c, whose gradient is that of log S; c^2 S for tiny c, which is 0.
    loss, scores, _ = _gradients(backend, weights=torch.full((4,), size, dtype=torch.float64))
    unscaled = SCORES.clone().requires_grad_()
    ranked = LABELS[:, None] < LABELS[None, :]
    log_sum = (20.0 * (unscaled[:, None] - unscaled[None, :]))[ranked].logsumexp(0)
    expected = torch.autograd.grad(log_sum, unscaled)[0] if size > 1 else torch.zeros(4, dtype=torch.float64)
    expected_loss = max(0.0, 2 * math.log(size) + log_sum.item())
    assert loss == pytest.approx(expected_loss, rel=8 * EPS)
    # exp() of a difference of two numbers of the size of the loss.
    assert torch.allclose(scores, expected, rtol=8 * EPS * max(1.0, float(loss)), atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_uint64_keep_their_order(backend: str) -> None:
    labels = torch.tensor([2**63 + 5, 3, 2**64 - 1, 2**63 + 4], dtype=torch.uint64)
    expected = ranking_loss(SCORES, torch.tensor([2, 0, 3, 1]), backend=backend)
    assert torch.equal(ranking_loss(SCORES, labels, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_may_have_any_strides(backend: str) -> None:
    x, y = (torch.randn(3, 8)[:0, ::2].requires_grad_() for _ in range(2))
    loss = cosent_loss(x, [y, y], torch.zeros(0), backend=backend)
    loss.backward()
    assert loss == 0
    assert x.grad.shape == y.grad.shape == (0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarities", [("dot",), ("cos", "dot", "angle")])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_gradients_of_a_dot_product_do_not_see_their_own_row(
    backend: str, similarities: tuple[str, ...], value: float
) -> None:
    x = torch.tensor([[value, 1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    y = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], requires_grad=True)
    pairwise_similarity(x, y, similarities, backend=backend)[similarities.index("dot")].sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(y.grad.nan_to_num(), x.detach().nan_to_num())


def test_an_exported_program_serves_any_number_of_pairs() -> None:
    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
            return cosent_loss(x, y, labels)

    def batch(rows: int) -> tuple[Tensor, ...]:
        return torch.randn(rows, 5), torch.randn(rows, 5), torch.arange(rows) % 3

    rows = torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(Loss(), batch(6), dynamic_shapes=({0: rows},) * 3).module()
    inputs = batch(11)
    assert torch.equal(program(*inputs), Loss()(*inputs))
