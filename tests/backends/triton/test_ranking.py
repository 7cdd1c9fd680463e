"""The ranking kernels in the interpreter, in one launch and in phases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sbert_kernels import ranking_loss

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture(params=["one launch", "phases"])
def phases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, interpreted: None) -> str:
    from sbert_kernels.backends.triton import ranking

    if request.param == "phases":
        monkeypatch.setattr(ranking, "MOST_IN_ONE_LAUNCH", -1)
    # Several chunks of few pairs.
    monkeypatch.setattr(ranking, "CHUNK_OF_ONE", 32)
    monkeypatch.setattr(ranking, "CHUNK_OF_MANY", 16)
    return request.param


def run(
    scores: Tensor, labels: Tensor, weights: Tensor | None, scale: float, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """In float64, computed in ``dtype``: the loss, and the gradients of scores, scale and weights."""
    leaves = [scores.to(dtype), torch.tensor(scale, dtype=dtype), *([] if weights is None else [weights.to(dtype)])]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    options: dict[str, Any] = {} if weights is None else {"weights": leaves[2]}
    loss = ranking_loss(leaves[0], labels, scale=leaves[1], backend=backend, **options)
    return [x.detach().double() for x in (loss, *torch.autograd.grad(loss, leaves))]


LABELS = {
    "all different": lambda n, g: torch.rand(n, generator=g),
    "ties": lambda n, g: torch.randint(-2, 2, (n,), generator=g).float(),
    "zeros of both signs": lambda n, g: torch.randint(-1, 2, (n,), generator=g) * torch.tensor([0.0, -0.0, 1.0])[0:1],
    "int64": lambda n, g: torch.randint(-(2**62), 2**62, (n,), generator=g) // 2**60,
    "float64": lambda n, g: 1 + 1e-12 * torch.randint(0, 3, (n,), generator=g).double(),
    "all equal": lambda n, g: torch.ones(n),
}


@pytest.mark.usefixtures("phases")
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("n", [0, 1, 2, 33, 110])
def test_equals_float64(n: int, labels: str) -> None:
    """Within twice eager float32's error, at most, of what torch ops give in float64."""
    generator = torch.Generator().manual_seed(n)
    scores = 2 * torch.rand(n, generator=generator) - 1
    given = LABELS[labels](n, generator)
    cases = [(None, 20.0), (torch.randint(0, 3, (n,), generator=generator).float(), 100.0)]
    if n > 100:  # which takes a while: by turns
        cases = [cases[list(LABELS).index(labels) % 2]]
    for weights, scale in cases:
        ours = run(scores, given, weights, scale, torch.float32, "triton")
        eager = run(scores, given, weights, scale, torch.float32, "reference")
        exact = run(scores, given, weights, scale, torch.float64, "blockwise")
        for value, other, wanted in zip(ours, eager, exact, strict=True):
            finite = wanted.abs() < 1e30  # a pair of no weight may have any gradient
            value, other, wanted = (x[finite] for x in (value, other, wanted))
            assert (value - wanted).norm() <= 2 * (other - wanted).norm() + 2.0**-21 * wanted.norm()


@pytest.mark.usefixtures("phases")
def test_equal_labels_compare_with_nothing() -> None:
    loss, gradient, *_ = run(torch.rand(40), torch.ones(40), None, 20.0, torch.float32, "triton")
    assert loss == 0.0
    assert not gradient.any()


@pytest.mark.usefixtures("phases")
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_tiny_and_huge_losses_keep_their_digits(spread: float) -> None:
    """Scores in the order of the labels, and against it."""
    labels = torch.arange(50.0)
    for scores in (spread * labels, -spread * labels):
        ours = run(scores, labels, None, 20.0, torch.float32, "triton")
        exact = run(scores, labels, None, 20.0, torch.float64, "blockwise")
        for value, wanted in zip(ours[:2], exact[:2], strict=True):
            assert (value - wanted).norm() <= 1e-5 * wanted.norm() + 1e-37


@pytest.mark.usefixtures("phases")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(value: float) -> None:
    scores, labels = torch.rand(40), torch.rand(40)
    scores[3] = value
    ours = ranking_loss(scores, labels, backend="triton")
    torch.testing.assert_close(ours, ranking_loss(scores, labels, backend="blockwise"), equal_nan=True)


@pytest.mark.usefixtures("phases")
def test_labels_that_are_no_numbers_give_a_loss_that_is_none() -> None:
    """On a GPU nobody looks for them beforehand: that would have to wait."""
    from sbert_kernels.backends.triton import ranking
    from sbert_kernels.problems.ranking import Needs, RankingProblem
    from sbert_kernels.problems.scale import Scale

    labels = torch.rand(40)
    labels[7] = math.nan
    result = ranking.ranking(RankingProblem(torch.rand(40), labels, Scale(20.0)), Needs(True, False, False))
    assert result.loss.isnan()
    assert result.scores.isnan().all()


@pytest.mark.usefixtures("phases")
@pytest.mark.parametrize("weight", [-1.0, math.nan])
def test_weights_that_are_none_give_a_loss_that_is_none(weight: float) -> None:
    from sbert_kernels.backends.triton import ranking
    from sbert_kernels.problems.ranking import Needs, RankingProblem
    from sbert_kernels.problems.scale import Scale

    for place in (0, 3):
        weights = torch.ones(4)
        weights[place] = weight
        problem = RankingProblem(torch.rand(4), torch.arange(4.0), Scale(20.0), weights)
        assert ranking.ranking(problem, Needs(True, False, True)).loss.isnan()


@pytest.mark.usefixtures("phases")
def test_the_same_bits_each_time() -> None:
    scores, labels = torch.rand(90), torch.rand(90)
    first, second = (run(scores, labels, None, 20.0, torch.float32, "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))
