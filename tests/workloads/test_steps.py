"""The stopwatch of a training step: its parts add up to it, and what takes time is found in the part it belongs to."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses
from torch import Tensor, nn

from sbert_kernels.workloads import steps
from sbert_kernels.workloads.models import static_model
from sbert_kernels.workloads.steps import PARTS, Recording, StepRecorder, difference, median_step, whole
from sbert_kernels.workloads.training import Settings, prepare

PAIRS = [(f"what is the number {i}", f"the number {i} comes after {i - 1}") for i in range(128)]
PAUSE = 1.0


class Clock:
    """What the stopwatch reads: seconds pass where a test lets them, however busy the machine is."""

    now = 0.0
    tick = 0.0  # between two readings

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


clock = Clock()


@pytest.fixture(autouse=True)
def _the_stopwatch_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock.now = clock.tick = 0.0
    monkeypatch.setattr(steps, "time", clock)


@pytest.fixture
def model() -> SentenceTransformer:
    return static_model(dim=8, seed=0)


def train(model: SentenceTransformer, loss: nn.Module, output: Path, workers: int = 0) -> Recording:
    return prepare(model, loss, PAIRS, Settings(32, 3, 1e-2, 0, output, workers))()


def test_the_parts_add_up_to_the_step(model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ends = []
    step_ends = StepRecorder.on_step_end

    def read_the_clock_too(*args: object, **kwargs: object) -> None:
        step_ends(*args, **kwargs)
        ends.append(clock.now)

    clock.tick = 1.0
    monkeypatch.setattr(StepRecorder, "on_step_end", read_the_clock_too)
    recording = train(model, losses.MultipleNegativesRankingLoss(model), tmp_path)
    assert len(recording.losses) == len(recording.steps) == len(ends) == 3
    for step, begin, end in zip(recording.warm_steps, ends, ends[1:], strict=False):
        assert list(step) == list(PARTS)
        assert all(seconds > 0 for seconds in step.values())
        assert whole(step) == end - begin


def slow(call: Callable) -> Callable:
    def paused(*args: object, **kwargs: object) -> object:
        clock.sleep(PAUSE)
        return call(*args, **kwargs)

    return paused


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        clock.sleep(PAUSE)
        return gradient


def slow_down(part: str, model: SentenceTransformer, loss: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause in that part of the step and in no other."""
    if part == "tokenize":
        model.preprocess = slow(model.preprocess)
    elif part == "encode":
        model[0].forward = slow(model[0].forward)
    elif part == "loss":
        loss.forward = slow(loss.forward)
    elif part == "loss backward":
        forward = loss.forward
        loss.forward = lambda *args: SlowBackward.apply(forward(*args))
    elif part == "encoder backward":
        encode = model[0].forward

        def encode_and_go_back_slowly(features: dict[str, Tensor]) -> dict[str, Tensor]:
            output = encode(features)
            return output | {"sentence_embedding": SlowBackward.apply(output["sentence_embedding"])}

        model[0].forward = encode_and_go_back_slowly
    elif part == "optimizer":
        monkeypatch.setattr(torch.optim.AdamW, "step", slow(torch.optim.AdamW.step))
    else:
        monkeypatch.setattr(SentenceTransformerTrainer, "log", slow(SentenceTransformerTrainer.log))


@pytest.mark.parametrize("part", PARTS)
def test_time_is_found_in_its_part(
    model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
):
    loss = losses.MultipleNegativesRankingLoss(model)
    slow_down(part, model, loss, monkeypatch)
    step = median_step(train(model, loss, tmp_path).warm_steps)
    assert [name for name, seconds in step.items() if seconds] == [part]


def test_a_loss_of_several_terms(model: SentenceTransformer, tmp_path: Path):
    mnr = losses.MultipleNegativesRankingLoss(model)

    class Terms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mnr = mnr

        def forward(self, features: list[dict[str, Tensor]], labels: Tensor | None) -> dict[str, Tensor]:
            value = self.mnr(features, labels)
            return {"a": SlowBackward.apply(0.75 * value), "b": 0.25 * value, "nothing": torch.zeros(())}

    recording = train(model, Terms(), tmp_path)
    assert [list(terms) for terms in recording.terms] == [["a", "b", "nothing"]] * 3
    assert [sum(terms.values()) for terms in recording.terms] == pytest.approx(recording.losses, rel=4 * 2**-23)
    step = median_step(recording.warm_steps)
    assert [name for name, seconds in step.items() if seconds] == ["loss backward"]
    alone = train(static := static_model(dim=8, seed=0), losses.MultipleNegativesRankingLoss(static), tmp_path)
    assert alone.terms == []
    assert recording.losses[0] == pytest.approx(alone.losses[0], rel=4 * 2**-23)


def test_a_gradient_cache_encodes_twice(bert: Callable[..., SentenceTransformer], tmp_path: Path):
    model = bert(torch.float32)
    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=16)
    model[0].forward = slow(model[0].forward)
    step = median_step(train(model, loss, tmp_path).warm_steps)
    # Two columns of two mini-batches, before the loss and again in its backward.
    assert step["encode"] == 2 * 2 * 2 * PAUSE
    assert whole(step) == step["encode"]


def test_a_worker_changes_no_loss_and_takes_the_tokenizing_away(model: SentenceTransformer, tmp_path: Path):
    model.preprocess = slow(model.preprocess)
    alone = train(model, losses.MultipleNegativesRankingLoss(model), tmp_path)
    model = static_model(dim=8, seed=0)
    model.preprocess = slow(model.preprocess)  # in the worker, whose clock is not this one
    beside = train(model, losses.MultipleNegativesRankingLoss(model), tmp_path, workers=1)
    assert beside.losses == alone.losses
    assert median_step(beside.warm_steps)["tokenize"] == 0 < PAUSE <= median_step(alone.warm_steps)["tokenize"]


def test_hooks_go_to_a_worker_that_is_spawned_and_end_with_the_training(model: SentenceTransformer):
    loss = losses.MultipleNegativesRankingLoss(model)
    recorder = StepRecorder(model, loss)
    recorder.on_train_begin(None, None, None)
    preprocess = pickle.loads(pickle.dumps(model.preprocess))
    assert preprocess(["some text"])["input_ids"].tolist() == model.preprocess(["some text"])["input_ids"].tolist()
    recorder.on_train_end(None, None, None)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loss.modules())


def step_of(seconds: float) -> dict[str, float]:
    return dict.fromkeys(PARTS, seconds / len(PARTS))


@pytest.mark.parametrize(("seconds", "median"), [([3, 1, 2], 2), ([4, 1, 3, 2], 2), ([5], 5)])
def test_median_step(seconds: list[float], median: float):
    assert whole(median_step([step_of(x) for x in seconds])) == pytest.approx(median)


def test_difference_of_loss_curves():
    assert difference(Recording([3.0, 2.0, 1.0], []), Recording([3.0, 2.5, 1.125], [])) == 0.25
    assert math.isnan(difference(Recording([float("nan"), 1.0], []), Recording([3.0, 2.0], [])))
