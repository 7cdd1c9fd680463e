"""ranking_loss, cosent_loss and angle_loss: values and gradients, whichever backend serves them."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sbert_kernels import angle_loss, cosent_loss, pairwise_similarity, ranking_loss
from sbert_kernels.backends import BACKENDS

NAMES = [backend.name for backend in BACKENDS if backend.device in (None, "cpu")]
INF, NAN = math.inf, math.nan
LABELS = {
    "continuous": lambda n, g: torch.rand(n, generator=g, dtype=torch.float64),
    "few": lambda n, g: torch.randint(0, 4, (n,), generator=g),
    "two": lambda n, g: torch.randint(0, 2, (n,), generator=g).bool(),
    "tied": lambda n, g: torch.full((n,), 0.3),
    "halves": lambda n, g: torch.randn(n, generator=g).to(torch.float16),
    "large integers": lambda n, g: 2**60 + torch.randint(0, 3, (n,), generator=g),
    "bytes": lambda n, g: torch.randint(0, 256, (n,), generator=g, dtype=torch.uint8),
    "zeros of both signs": lambda n, g: torch.randint(-1, 2, (n,), generator=g) * torch.tensor(0.0),
}


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    return request.param


def flow(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The loss, and its gradients in the inputs."""
    return [loss.detach(), *torch.autograd.grad(loss, inputs, retain_graph=True)]


def definition(scores: Tensor, labels: Tensor, scale: Any, weights: Tensor | None = None) -> Tensor:
    """log(1 + the sum over all pairs of pairs), term by term."""
    if len(scores) < 2:
        return 0 * scores.sum()
    ranked = labels[:, None] < labels[None, :]
    terms = scale * (scores[:, None] - scores[None, :])
    if weights is not None:
        terms = terms + weights.log()[:, None] + weights.log()[None, :]
    terms = terms[ranked]
    return torch.logsumexp(torch.cat([terms, terms.new_zeros(1)]), dim=0) + 0 * scores.sum()


def error_of(value: Tensor, exact: Tensor) -> Tensor:
    return (value.double() - exact).norm() / exact.norm()


def assert_close(ours: list[Tensor], exact: list[Tensor], rtol: float = 1e-9) -> None:
    for value, other in zip(ours, exact, strict=True):
        largest = other.abs().max() if other.numel() else torch.tensor(0.0)
        torch.testing.assert_close(value, other, rtol=rtol, atol=float(rtol * largest + 1e-12), check_dtype=False)


@settings(max_examples=80, derandomize=True)
@given(
    n=st.integers(0, 200),
    kind=st.sampled_from(sorted(LABELS)),
    scale=st.sampled_from([1e-3, 1.0, 20.0, 300.0, 1e4, 0.0, -5.0]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_definition(
    compiled: None, name: str, n: int, kind: str, scale: float, weighted: bool, seed: int
) -> None:
    """Values, and gradients of scores, scale and weights."""
    generator = torch.Generator().manual_seed(seed)
    labels = LABELS[kind](n, generator)
    scores = torch.randn(n, generator=generator, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(n, generator=generator, dtype=torch.float64).requires_grad_() if weighted else None
    inputs = [scores, factor] + ([weights] if weighted else [])
    got = ranking_loss(scores, labels, scale=factor, weights=weights, backend=name)
    exact = definition(scores, labels, factor, weights) + 0 * factor + (0 * weights.sum() if weighted else 0)
    assert_close(flow(got, *inputs), flow(exact, *inputs))


@settings(max_examples=40, derandomize=True)
@given(
    n=st.integers(0, 200),
    dim=st.integers(2, 70),
    kind=st.sampled_from(sorted(LABELS)),
    scale=st.sampled_from([1.0, 20.0, 1e4]),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("name", NAMES)
def test_equals_stock(compiled: None, name: str, n: int, dim: int, kind: str, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = LABELS[kind](n, generator)
    x, y = (torch.randn(n, dim, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for ours, theirs in ((cosent_loss, stock.CoSENTLoss), (angle_loss, stock.AnglELoss)):
        exact = theirs(None, scale=scale).compute_loss_from_embeddings([x, y], labels)
        assert_close(flow(ours(x, y, labels, scale=scale, backend=name), x, y), flow(exact, x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [20.0, 100.0, 1000.0, 1e4])
@pytest.mark.parametrize("noise", [1.0, 0.1])
def test_error_is_at_most_twice_that_of_stock(backend: str, dtype: torch.dtype, scale: float, noise: float) -> None:
    """Against fp64 on the inputs as rounded to the dtype, in the mean over some batches; the more alike the pairs are,
    the more cancels."""
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in ((cosent_loss, stock.CoSENTLoss), (angle_loss, stock.AnglELoss)):
        loss = theirs(None, scale=scale)
        errors = []  # of (loss, gradients): ours, stock's, and what a rounding of the result may cost
        for _ in range(8):
            x = torch.randn(128, 96, generator=generator)
            y = x + noise * torch.randn(128, 96, generator=generator)
            labels = torch.randint(0, 20, (128,), generator=generator)
            low = [v.to(dtype).requires_grad_() for v in (x, y)]
            exact = [v.detach().double().requires_grad_() for v in low]
            truth = flow(loss.compute_loss_from_embeddings(exact, labels), *exact)
            stocks = flow(loss.compute_loss_from_embeddings(low, labels), *low)
            mine = flow(ours(*low, labels, scale=scale, backend=backend), *low)
            errors.append(
                [
                    [
                        *((v.double() - known).norm() / known.norm() for v in (value, other)),
                        torch.finfo(value.dtype).eps,
                    ]
                    for value, other, known in zip(mine, stocks, truth, strict=True)
                ]
            )
        for error, allowed, rounding in torch.tensor(errors).mean(dim=0):
            assert error <= 2 * allowed + rounding


@pytest.mark.parametrize("kind", LABELS)
def test_fewer_than_two_labels_give_exactly_zero(backend: str, kind: str) -> None:
    for n in (0, 1):
        scores = torch.full((n,), 7.0, requires_grad=True)
        value, gradient = flow(ranking_loss(scores, LABELS[kind](n, None), backend=backend), scores)
        assert value == 0
        assert torch.equal(gradient, torch.zeros(n))
    scores = torch.randn(9, requires_grad=True)
    value, gradient = flow(ranking_loss(scores, torch.full((9,), -0.5), backend=backend), scores)
    assert value == 0
    assert torch.equal(gradient, torch.zeros(9))


def test_a_tiny_loss_keeps_its_digits(backend: str) -> None:
    """log(1 + 2e-30) is 2e-30, which a sum with 1 would lose."""
    scores = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    scale = 30 * math.log(10)
    value, gradient = flow(ranking_loss(scores, torch.tensor([0, 1, 0]), scale=scale, backend=backend), scores)
    if backend == "reference":  # the definition in doubles
        assert value < 1e-15
        return
    assert value.item() == pytest.approx(2e-30, rel=1e-9, abs=0)
    assert gradient.tolist() == pytest.approx([scale * 1e-30, -2e-30 * scale, scale * 1e-30], rel=1e-9, abs=0)


def test_scores_of_any_size(backend: str) -> None:
    """Differences of 1e20 and of 1 in one batch."""
    scores = torch.tensor([1e20, -1e20, 3.0, 2.0], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, 0, 1, 2])
    value, gradient = flow(ranking_loss(scores, labels, scale=1.0, backend=backend), scores)
    assert value.item() == pytest.approx(math.log(1 + math.e))
    p = math.e / (1 + math.e)
    assert gradient.tolist() == pytest.approx([0, 0, p, -p])
    value, _ = flow(ranking_loss(scores, torch.tensor([0, 3, 1, 2]), scale=1.0, backend=backend), scores)
    assert value.item() == pytest.approx(2e20)


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ([0.0, INF], [0, 1], 0.0),
        ([0.0, -INF], [0, 1], INF),
        ([INF, 0.0], [0, 1], INF),
        ([-INF, 0.0], [0, 1], 0.0),
        ([INF, 1.0], [1, 1], 0.0),
        ([INF, INF], [0, 1], NAN),
        ([-INF, 0.0, 1.0], [0, 1, 2], math.log(1 + math.exp(-1))),
        ([NAN, 0.0], [0, 1], NAN),
        ([0.0, NAN], [0, 1], NAN),
    ],
)
@pytest.mark.parametrize("name", ["cpu", "blockwise"])
def test_infinite_scores_count_as_such(
    compiled: None, name: str, scores: list[float], labels: list[int], expected: float
) -> None:
    """As in the sum over pairs; a score that is not a number makes the loss not a number."""
    value = torch.tensor(scores, requires_grad=True)
    loss, gradient = flow(ranking_loss(value, torch.tensor(labels), scale=1.0, backend=name), value)
    torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
    if math.isfinite(expected):
        assert gradient.isfinite().all()


@settings(max_examples=80, derandomize=True)
@given(
    n=st.integers(0, 12),
    levels=st.integers(1, 4),
    infinite=st.sampled_from([0.1, 0.3, 0.7]),
    scale=st.sampled_from([1.0, -5.0, 300.0]),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("name", NAMES)
def test_infinite_scores_anywhere_count_as_in_the_definition(
    compiled: None, name: str, n: int, levels: int, infinite: float, scale: float, seed: int
) -> None:
    """Where that is a number: two of the same infinity have no difference. A finite loss has finite gradients."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, levels, (n,), generator=generator)
    scores = torch.randn(n, generator=generator, dtype=torch.float64)
    scores[torch.rand(n, generator=generator) < infinite] *= INF
    ranked = labels[:, None] < labels[None, :]
    terms = (scale * (scores[:, None] - scores[None, :]))[ranked]
    exact = torch.logsumexp(torch.cat([terms, terms.new_zeros(1)]), dim=0)
    value, gradient = flow(ranking_loss(scores.requires_grad_(), labels, scale=scale, backend=name), scores)
    if not exact.isnan():
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-12)
    if exact.isfinite():
        assert gradient.isfinite().all()


def test_a_score_that_is_not_a_number_spoils_a_batch_without_order_too(compiled: None) -> None:
    for name in NAMES:
        assert ranking_loss(torch.tensor([NAN, 1.0]), torch.tensor([1, 1]), backend=name).isnan()
        weights = torch.tensor([0.0, 1.0, 1.0])
        assert ranking_loss(torch.tensor([NAN, 1.0, 2.0]), torch.arange(3), weights=weights, backend=name).isnan()


def test_negative_integers_are_below_zero(backend: str) -> None:
    loss = ranking_loss(torch.tensor([1.0, 0.0]), torch.tensor([-1, 0]), scale=1.0, backend=backend)
    assert loss.item() == pytest.approx(math.log(1 + math.e))


def test_function_transforms_are_refused(backend: str) -> None:
    """Inside of them a tensor does not tell that its gradient is wanted, which would be lost."""
    scores = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"ranking_loss does not support torch\.func"):
        torch.vmap(lambda s: ranking_loss(s, torch.arange(5), backend=backend))(scores)
    with pytest.raises(RuntimeError, match=r"pairwise_similarity does not support torch\.func"):
        torch.func.grad(lambda s: pairwise_similarity(s, s.detach(), "cos", backend=backend)[0].sum())(scores)


def test_a_whole_weight_is_a_pair_that_stands_so_often_in_the_batch(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (12,), generator=generator)
    times = torch.randint(0, 4, (12,), generator=generator)
    weighted = ranking_loss(scores, labels, weights=times.double(), backend=backend)
    repeated = ranking_loss(scores.repeat_interleave(times), labels.repeat_interleave(times), backend=backend)
    assert_close(flow(weighted, scores), flow(repeated, scores))


@pytest.mark.parametrize("name", ["cpu", "blockwise"])
def test_a_pair_without_weight_counts_nothing_whatever_its_score(compiled: None, name: str) -> None:
    scores = torch.tensor([1.0, -INF, 0.5], requires_grad=True)
    weights = torch.tensor([1.0, 0.0, 1.0])
    labels = torch.tensor([0, 1, 2])
    value, gradient = flow(ranking_loss(scores, labels, weights=weights, scale=1.0, backend=name), scores)
    assert value.item() == pytest.approx(math.log(1 + math.exp(0.5)))
    assert gradient[1] == 0
    assert gradient.isfinite().all()


def test_labels_of_a_column_equal_those_of_a_vector(backend: str) -> None:
    scores, labels = torch.randn(9), torch.randn(9)
    assert torch.equal(
        ranking_loss(scores, labels[:, None], backend=backend), ranking_loss(scores, labels, backend=backend)
    )


def test_large_integers_are_not_rounded_into_ties(backend: str) -> None:
    scores = torch.tensor([1.0, 0.0])
    loss = ranking_loss(scores, torch.tensor([2**53, 2**53 + 1]), scale=1.0, backend=backend)
    assert loss.item() == pytest.approx(math.log(1 + math.e))


def test_backward_may_run_twice_and_takes_a_factor(backend: str) -> None:
    scores, labels = torch.randn(9, requires_grad=True), torch.randn(9)
    loss = ranking_loss(scores, labels, backend=backend)
    loss.backward(retain_graph=True)
    once = scores.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(scores.grad, 4 * once)


def test_a_second_derivative_raises(backend: str) -> None:
    x, y = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    (gradient,) = torch.autograd.grad(cosent_loss(x, y, torch.randn(5), backend=backend), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()
    scores = torch.randn(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(ranking_loss(scores, torch.randn(5), backend=backend), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="ranking_loss is differentiable once"):
        gradient.sum().backward()


def test_only_what_requires_grad_gets_one(backend: str) -> None:
    scores, scale = torch.randn(5), torch.tensor(3.0, requires_grad=True)
    loss = ranking_loss(scores, torch.randn(5), scale=scale, backend=backend)
    loss.backward()
    assert scale.grad is not None
    with torch.no_grad():
        assert not ranking_loss(scores, torch.randn(5), scale=scale, backend=backend).requires_grad


def test_a_weight_of_zero_has_the_gradient_of_what_it_leaves_out(backend: str) -> None:
    """The definition as a polynomial of the weights, which has a derivative at zero."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (9,), generator=generator)
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    terms = weights[:, None] * weights[None, :] * torch.exp(3 * (scores[:, None] - scores[None, :]))
    exact = torch.log1p(terms[labels[:, None] < labels[None, :]].sum())
    got = ranking_loss(scores, labels, scale=3.0, weights=weights, backend=backend)
    assert_close(flow(got, scores, weights), flow(exact, scores, weights))


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("operation", [cosent_loss, angle_loss])
def test_columns_are_one_batch(backend: str, operation: Any, columns: int) -> None:
    """Column after column: a row of x stands once for each of its partners."""
    generator = torch.Generator().manual_seed(columns)
    x, *ys = (
        torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(1 + columns)
    )
    labels = torch.randint(0, 3, (6 * columns,), generator=generator)
    got = operation(x, ys, labels, backend=backend)
    exact = operation(x.repeat(columns, 1), torch.cat(ys), labels, backend=backend)
    assert_close(flow(got, x, *ys), flow(exact, x, *ys))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_scores_are_widened_and_gradients_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """So a gradient scaler's factor, which comes before the rounding, saves what the type could not hold."""
    scores, labels = torch.randn(9).to(dtype).requires_grad_(), torch.arange(9) % 4
    wide = scores.detach().float().requires_grad_()
    loss, exact = (ranking_loss(s, labels, backend=backend) for s in (scores, wide))
    assert torch.equal(loss, exact)
    for factor in (1.0, 2.0**-20):
        (gradient,), (known,) = (
            torch.autograd.grad(factor * v, s, retain_graph=True) for v, s in ((loss, scores), (exact, wide))
        )
        assert torch.equal(gradient, known.to(dtype))


def test_scores_labels_and_weights_lie_anywhere(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels, weights = (torch.rand(9, generator=generator, dtype=torch.float64) for _ in range(3))
    scores.requires_grad_()
    exact = flow(ranking_loss(scores, labels, weights=weights, backend=backend), scores)
    spread = [v.repeat_interleave(3)[1::3] for v in (scores, labels, weights)]
    assert not any(v.is_contiguous() for v in spread)
    assert_close(flow(ranking_loss(spread[0], spread[1], weights=spread[2], backend=backend), scores), exact)
    one = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = ranking_loss(one.expand(9), labels, weights=torch.ones(1).expand(9), backend=backend)
    assert loss.item() == pytest.approx(math.log(1 + 9 * 8 / 2))  # equal scores, different labels
    assert torch.autograd.grad(loss, one)[0].abs() < 1e-12


def test_autocast_changes_nothing(backend: str) -> None:
    x, y, labels = torch.randn(9, 8), torch.randn(9, 8), torch.rand(9)
    expected = angle_loss(x, y, labels, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(angle_loss(x, y, labels, backend=backend), expected)


def test_the_last_backward_equals_the_ones_before_it(backend: str) -> None:
    """It may use the memory of what was saved, which no other backward may."""
    scores, scale = torch.randn(9, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    weights = torch.rand(9, requires_grad=True)
    inputs = [scores, scale, weights]
    loss = ranking_loss(scores, torch.arange(9) % 4, scale=scale, weights=weights, backend=backend) * 3
    before = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs, create_graph=True)
    last = torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, before, again))
    assert all(map(torch.equal, before, last))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_forward_mode_derivative_raises(backend: str) -> None:
    with torch.autograd.forward_ad.dual_level():
        scores = torch.autograd.forward_ad.make_dual(torch.randn(5), torch.ones(5))
        with pytest.raises(RuntimeError, match="ranking_loss has no forward-mode derivative"):
            ranking_loss(scores, torch.arange(5), backend=backend)
        x = torch.autograd.forward_ad.make_dual(torch.randn(5, 4), torch.ones(5, 4))
        with pytest.raises(RuntimeError, match="pairwise_similarity has no forward-mode derivative"):
            cosent_loss(torch.randn(5, 4), x, torch.arange(5), backend=backend)


@pytest.mark.parametrize("name", ["cpu", "blockwise"])
def test_a_compiled_caller_is_compiled_twice_at_most_whatever_the_number_of_pairs(compiled: None, name: str) -> None:
    """Once for the first batch, once for any number of pairs; torch gives up after eight."""
    torch.manual_seed(0)  # some draws have gradients so small that they are nothing but rounding
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda x, labels: angle_loss(x, [x, x.flip(0)], labels, backend=name), backend=counter, fullgraph=True
    )
    for n in range(3, 13):
        x, labels = torch.randn(n, 5, requires_grad=True), torch.randint(0, 3, (2 * n,))
        loss = step(x, labels)
        assert_close([loss, *torch.autograd.grad(loss, x)], flow(angle_loss(x, [x, x.flip(0)], labels), x), rtol=1e-4)
    assert counter.frame_count <= 2


def test_a_compiled_caller_is_told_of_a_backend_that_needs_autograd() -> None:
    compiled_loss = torch.compile(
        lambda x, y, labels: cosent_loss(x, y, labels, backend="reference"), backend="aot_eager", fullgraph=True
    )
    x, y = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="'reference' differentiates by autograd, which is off"):
        compiled_loss(x, y, torch.rand(5)).backward()
    step = torch.compile(
        lambda x, y: pairwise_similarity(x, y, "cos", backend="reference")[0].sum(), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(RuntimeError, match="'reference' differentiates by autograd, which is off"):
        step(x, y).backward()


@pytest.mark.parametrize("name", ["cpu", "blockwise"])
@pytest.mark.parametrize("operation", [cosent_loss, angle_loss])
def test_a_compiled_caller_gets_the_same_gradients(compiled: None, name: str, operation: Any) -> None:
    """In one graph, whatever the number of pairs."""
    step = torch.compile(
        lambda x, y, labels, scale: operation(x * 2, y, labels, scale=scale, backend=name),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for n in (6, 9):
        inputs = [torch.randn(n, 4, requires_grad=True) for _ in range(2)]
        labels, scale = torch.randint(0, 3, (n,)), torch.tensor(5.0, requires_grad=True)
        expected = flow(operation(inputs[0] * 2, inputs[1], labels, scale=scale), *inputs, scale)
        loss = step(*inputs, labels, scale)
        assert_close([loss, *torch.autograd.grad(loss, [*inputs, scale])], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="labels must be numbers that can be ordered"):
        step(*inputs, torch.full((9,), NAN), scale)
