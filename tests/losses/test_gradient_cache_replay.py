"""The cached losses encode every batch twice: dropout, batch norm and autocast are the same in both passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor, nn

from sbert_kernels import GradCache, contrastive_loss, losses
from support.cached_losses import (
    GUIDED,
    OBJECTIVES,
    WORDS,
    around,
    batch,
    gradients,
    value_of,
)
from support.contrastive import autocast_types
from support.numbers import assert_close

packings = pytest.mark.parametrize("packing", ["length", "none"])


def with_dropout(model: nn.Module, p: float = 0.1) -> nn.Module:
    """Of hidden states and of attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return model.train()


@pytest.mark.parametrize("budget", [None, 200_000, 2**40])
@pytest.mark.parametrize("name", ["ranking", "symmetric", "guided"])
def test_without_packing_dropout_draws_what_stock_s_does(bert: Any, name: str, budget: int | None) -> None:
    """From one seed the same loss and gradients, and the generator ends in the same state; a guide draws too."""
    results, states = [], []
    for module in (stock, losses):
        model, guide = with_dropout(bert()), with_dropout(bert())
        options = {"mini_batch_size": 3}
        if module is losses:
            options |= {"packing": "none", "activation_budget": budget}
        if name == "guided":
            loss = module.CachedGISTEmbedLoss(model, guide, **GUIDED, **options)
        elif name == "symmetric":
            loss = module.CachedMultipleNegativesSymmetricRankingLoss(model, **options)
        else:
            loss = module.CachedMultipleNegativesRankingLoss(model, **options)
        features = batch(model, 8)
        torch.manual_seed(11)
        results.append(gradients(loss, lambda loss=loss, features=features: value_of(loss, features)))
        states.append(torch.get_rng_state())
    assert_close(*results, replayed=True)
    assert torch.equal(*states)


class Normalised(nn.Sequential):
    """An encoder whose rows depend on each other, and that remembers what it has seen."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Embedding(50, 8, padding_idx=0), nn.BatchNorm1d(8))
        self.double()

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        embeddings = self[0](features["input_ids"]).sum(1)
        return {"sentence_embedding": self[1](embeddings)}


def test_an_encoder_whose_rows_depend_on_each_other() -> None:
    """Without packing and without kept activations: the loss, gradients and running statistics of stock."""
    ids = torch.randint(1, 50, (2, 8, 4), generator=torch.Generator().manual_seed(0))
    columns = [{"input_ids": column, "attention_mask": torch.ones_like(column)} for column in ids]
    results = []
    for module, options in ((losses, {"packing": "none", "activation_budget": 0}), (stock, {})):
        model = Normalised()
        loss = module.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4, **options)
        results.append([*gradients(loss, lambda loss=loss: value_of(loss, columns)), *model[1].buffers()])
    assert_close(*results, replayed=True)


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[tuple[bytes, Tensor, bool, torch.dtype]]]:
    """What a model was given, what it made of it, whether with a graph, and the type that its layers computed in."""
    calls: list[tuple[bytes, Tensor, bool, torch.dtype]] = []
    types: list[torch.dtype] = []

    def record(_: Any, inputs: Any, output: dict[str, Tensor]) -> None:
        embeddings = output["sentence_embedding"]
        content = output["input_ids"].numpy().tobytes()
        calls.append((content, embeddings.detach().clone(), embeddings.requires_grad, types[-1]))

    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    handles = [
        layer.register_forward_hook(lambda _, __, output: types.append(output.dtype)),
        model.register_forward_hook(record),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@packings
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("budget", [0, 200_000])
@pytest.mark.parametrize("name", ["ranking", "guided", "objective"])
def test_the_replay_embeds_as_the_first_pass_did_to_the_bit(
    bert: Any, name: str, packing: str, autocast: bool, budget: int
) -> None:
    """With dropout, under autocast too, and with the backward pass outside of it."""
    model, guide = with_dropout(bert(torch.float32)), with_dropout(bert(torch.float32)) if name == "guided" else None
    loss = around(name, "none", model, guide, mini_batch_size=3, packing=packing, activation_budget=budget)
    features = [
        model.preprocess([f"{word} {WORDS[i]} {column}" for i, word in enumerate(WORDS[:9])]) for column in "ab"
    ]
    with recorded(model) as calls:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            value = value_of(loss, features)
        torch.rand(3)
        value.backward()
    first = {content: output for content, output, *_ in calls[: len({content for content, *_ in calls})]}
    replayed = calls[len(first) :]
    assert replayed or budget
    if not budget:
        assert len(replayed) == len(first)
    for content, output, graph, _ in replayed:
        assert graph
        assert torch.equal(output, first[content])
    assert {dtype for *_, dtype in calls} == {torch.bfloat16 if autocast else torch.float32}
    assert all(p.grad is not None for n, p in model.named_parameters() if "pooler" not in n)


@pytest.mark.parametrize("wrapper", ["none", "matryoshka"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_stage_multiplies_as_the_forward_pass_says(
    bert: Any, monkeypatch: pytest.MonkeyPatch, name: str, wrapper: str
) -> None:
    """In autocast's type where that is on, though the backward pass is outside of it; over the cache and without."""
    types = autocast_types(monkeypatch)
    model, guide = bert(torch.float32), bert(torch.float32) if name == "guided" else None
    features = batch(model, 5)
    for options in ({}, {"mini_batch_size": 3}):
        loss = around(name, wrapper, model, guide, **options)
        for dtype in (torch.bfloat16, None):
            types.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                value = value_of(loss, features)
            value.backward()
            # Rankings have no products, and stock's guided loss has none.
            assert set(types) == {"cosent": set(), "angle": set(), "guided": {None}}.get(name, {dtype})


def test_a_gradient_cache_of_one_s_own_computes_its_loss_in_the_caller_s_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    types = autocast_types(monkeypatch)
    encoder = nn.Linear(4, 4)
    cache = GradCache(encoder, lambda columns: contrastive_loss(*columns), mini_batch_size=2)
    rows = [torch.randn(5, 4), torch.randn(5, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        value = cache(rows)
    value.backward()
    cache(rows).backward()
    assert types == [torch.bfloat16, None]
