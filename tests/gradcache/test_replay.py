"""The second pass over the encoder is the first one again: masks of dropout, autocast, modes; and nothing leaks out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbert_kernels import GradCache

Calls = list[tuple[bytes, Tensor, bool]]
BFLOAT16 = {"device_type": "cpu", "dtype": torch.bfloat16}


class Recorder(nn.Module):
    """An encoder with dropout that keeps what it was given, what it returned, and whether that has a graph."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 6)).to(dtype)
        self.calls: Calls = []
        self.fail_at: int | None = None

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        output = self.layers(features["x"])
        self.calls.append((features["x"].numpy().tobytes(), output.detach().clone(), output.requires_grad))
        if len(self.calls) == self.fail_at:
            raise RuntimeError("the encoder failed")
        return output


def columns(rows: int = 7, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Without a mask, rows are taken in their order; with one, in that of their lengths."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(rows, 6, generator=generator, dtype=dtype) for _ in range(2)]
    masks = [torch.arange(4).expand(rows, 4) < torch.randint(1, 5, (rows, 1), generator=generator) for _ in range(2)]
    return [{"x": x, "attention_mask": mask.to(torch.int64)} for x, mask in zip(values, masks, strict=True)]


def contrast(embeddings: Sequence[Tensor]) -> Tensor:
    """In fp32 at least, and so under autocast too."""
    with torch.autocast("cpu", enabled=False):
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in embeddings)
        return F.cross_entropy(3 * a @ b.T, torch.arange(len(a)))


def passes(encoder: Recorder) -> tuple[dict[bytes, Tensor], dict[bytes, Tensor]]:
    """What each mini-batch came to in the first pass, and in the replay, by its content."""
    first = {content: output for content, output, graph in encoder.calls if not graph}
    second = {content: output for content, output, graph in encoder.calls if graph}
    assert len(first) + len(second) == len(encoder.calls)
    return first, second


packings = pytest.mark.parametrize("packing", ["length", "none"])


@packings
@pytest.mark.parametrize("autocast", [False, True])
def test_the_replay_returns_what_the_first_pass_did_to_the_bit(packing: str, autocast: bool) -> None:
    """With dropout, whatever was drawn in between, and with the backward pass outside of autocast."""
    encoder = Recorder()
    cache = GradCache(encoder, contrast, mini_batch_size=2, packing=packing, activation_budget=0)
    with torch.autocast(**BFLOAT16) if autocast else nullcontext():
        loss = cache(columns())
    torch.rand(17)
    random.random()
    loss.backward()
    first, second = passes(encoder)
    assert first.keys() == second.keys()
    for content, output in first.items():
        assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert torch.equal(output, second[content])
        assert output.dtype == second[content].dtype
    assert not torch.equal(*_two_draws(encoder)), "the dropout is active"


def _two_draws(encoder: Recorder) -> tuple[Tensor, Tensor]:
    (features, _) = columns()
    return encoder(dict(features)), encoder(dict(features))


@packings
@pytest.mark.parametrize("budget", [None, 500, 10**9])
def test_gradients_are_those_of_the_embeddings_that_the_loss_saw(packing: str, budget: int | None) -> None:
    """In fp64, and with the masks of the first pass: the plain loss over the same mini-batches, each from the state of
    the generator that it found."""
    encoder, states = Recorder(torch.float64), []
    encoder.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    batch = columns(dtype=torch.float64)
    loss = GradCache(encoder, contrast, mini_batch_size=2, packing=packing, activation_budget=budget)(batch)
    count = len(encoder.calls)
    loss.backward()
    ours = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    # The rows of each mini-batch, found by their content in the columns.
    rows = {row.numpy().tobytes(): (c, r) for c, column in enumerate(batch) for r, row in enumerate(column["x"])}
    embeddings: list[dict[int, Tensor]] = [{}, {}]
    for (content, *_), state in zip(encoder.calls[:count], states[:count], strict=True):
        x = torch.frombuffer(bytearray(content), dtype=torch.float64).reshape(-1, 6)
        torch.set_rng_state(state)
        for row, output in zip(x, encoder.layers(x), strict=True):
            c, r = rows[row.numpy().tobytes()]
            embeddings[c][r] = output
    contrast([torch.stack([own[r] for r in range(7)]) for own in embeddings]).backward()
    for grad, p in zip(ours, encoder.parameters(), strict=True):
        assert (grad - p.grad).abs().max() <= 1e-9 * p.grad.abs().max()


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside autocast", "backward inside autocast"])
@pytest.mark.parametrize("budget", [None, 10**9])
def test_no_weight_loses_its_gradient_to_autocast(inside: bool, budget: int | None) -> None:
    """The first pass must not leave weights without a graph in autocast's cache for the second."""
    encoder = Recorder().eval()
    batch = columns()
    with torch.autocast(**BFLOAT16):
        loss = GradCache(encoder, contrast, mini_batch_size=2, activation_budget=budget)(batch)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    ours = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    with torch.autocast(**BFLOAT16):
        contrast([encoder(dict(column)) for column in batch]).backward()
    # Both sum products of bfloat16, in another order, with gradients that are rounded to bfloat16 on the way.
    for grad, p in zip(ours, encoder.parameters(), strict=True):
        assert (grad - p.grad).norm() <= 4 * torch.finfo(torch.bfloat16).eps * p.grad.norm()


class Island(nn.Module):
    """A layer that leaves autocast, as parts of models that need fp32 do (rotary angles, router logits)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(self.layer(features["x"]))


@pytest.mark.parametrize("budget", [None, 10**9])
def test_backward_passes_run_outside_autocast(budget: int | None) -> None:
    """As the caller's does: inside, products that the model has computed in fp32 get their gradients in bfloat16."""
    encoder, batch = Island(), columns()
    with torch.autocast(**BFLOAT16):
        loss = contrast([encoder(column) for column in batch])
    loss.backward()
    expected = encoder.layer.weight.grad.clone()
    encoder.zero_grad()
    with torch.autocast(**BFLOAT16):
        loss = GradCache(encoder, contrast, mini_batch_size=3, activation_budget=budget)(batch)
    loss.backward()
    # 7 rows of 2 columns are summed in another order, each time with an error of one fp32 rounding of the largest.
    error = 14 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (encoder.layer.weight.grad - expected).abs().max() <= error


@pytest.mark.parametrize("budget", [None, 10**9])
def test_the_generator_goes_on_as_if_there_had_been_one_pass(budget: int | None) -> None:
    """The forward advances it as embedding without a cache does; the backward leaves it where it is."""
    encoder = Recorder()
    torch.manual_seed(3)
    loss = GradCache(encoder, contrast, mini_batch_size=2, packing="none", activation_budget=budget)(columns())
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for column in columns():
        for part in column["x"].split(2):
            encoder({"x": part})
    assert torch.equal(torch.get_rng_state(), after)
    torch.rand(5)
    outside = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), outside)


def state_of(encoder: nn.Module) -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().numpy().tobytes(),
        [module.training for module in encoder.modules()],
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("budget", [None, 500])
def test_an_exception_in_the_replay_leaves_everything_as_it_was(autocast: bool, budget: int | None) -> None:
    """The backward can then be done again, and gives what it would have."""
    encoder = Recorder()
    with torch.autocast(**BFLOAT16) if autocast else nullcontext():
        loss = GradCache(encoder, contrast, mini_batch_size=2, activation_budget=budget)(columns())
    encoder.eval()
    before = state_of(encoder)
    encoder.fail_at = len(encoder.calls) + 2
    with pytest.raises(RuntimeError, match="the encoder failed"):
        loss.backward(retain_graph=True)
    assert state_of(encoder) == before


@packings
def test_an_exception_in_the_first_pass_leaves_everything_as_it_was(packing: str) -> None:
    """The batch can then be done again, with the same masks."""
    encoder = Recorder()
    cache = GradCache(encoder, contrast, mini_batch_size=2, packing=packing)
    before = state_of(encoder)
    encoder.fail_at = 3
    with pytest.raises(RuntimeError, match="the encoder failed"):
        cache(columns())
    assert state_of(encoder) == before
    first = [output for _, output, _ in encoder.calls]
    cache(columns()).backward()
    for output, (_, again, _) in zip(first, encoder.calls[3:], strict=False):
        assert torch.equal(output, again)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_modes_of_the_first_pass_are_replayed_and_then_put_back(deterministic: bool) -> None:
    """A model switched to evaluation before the backward pass (as a callback does) is replayed in training mode, and
    with the determinism of the first pass."""
    encoder = Recorder()
    seen: list[tuple[bool, bool]] = []
    encoder.register_forward_pre_hook(
        lambda module, _: seen.append((module.layers[2].training, torch.are_deterministic_algorithms_enabled()))
    )
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        loss = GradCache(encoder, contrast, mini_batch_size=2)(columns())
    finally:
        torch.use_deterministic_algorithms(before)
    encoder.eval()
    loss.backward()
    assert set(seen) == {(True, deterministic)}
    assert not any(module.training for module in encoder.modules())
    assert torch.are_deterministic_algorithms_enabled() == before
    first, second = passes(encoder)
    assert all(torch.equal(output, second[content]) for content, output in first.items())


def test_a_part_in_evaluation_mode_stays_so_in_the_replay() -> None:
    """Modes are those of each module, not of the model: a frozen part without dropout is replayed without."""
    encoder = Recorder()
    encoder.layers[2].eval()
    loss = GradCache(encoder, contrast, mini_batch_size=2)(columns())
    encoder.train()
    loss.backward()
    assert encoder.layers[2].training
    first, second = passes(encoder)
    assert all(torch.equal(output, second[content]) for content, output in first.items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("budget", [None, 10**9])
def test_without_gradients_no_snapshots(mode: Callable[[], Any], budget: int | None, monkeypatch: Any) -> None:
    """Nor a second pass, and the same value."""
    encoder = Recorder().eval()
    cache = GradCache(encoder, contrast, mini_batch_size=2, activation_budget=budget)
    expected = cache(columns())
    snapshots, get = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: snapshots.append(1) or get())
    monkeypatch.setattr(torch.random, "get_rng_state", lambda: snapshots.append(1) or get())
    encoder.calls.clear()
    with mode():
        value = cache(columns())
    assert not snapshots
    assert not value.requires_grad
    assert not any(graph for *_, graph in encoder.calls)
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=0)
    cache(columns())
    assert snapshots or budget, "a training step makes them, and they are counted"


def test_unique_rows_that_dropout_would_tell_apart_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Recorder()
    with caplog.at_level("INFO", logger="sbert_kernels"):
        GradCache(encoder.eval(), contrast, unique_rows=True)(columns())
        assert "dropout" not in caplog.text
        GradCache(encoder.train(), contrast, unique_rows=True)(columns())
    assert caplog.text.count("dropout") == 1
