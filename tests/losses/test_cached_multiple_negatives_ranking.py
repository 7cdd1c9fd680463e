"""CachedMultipleNegativesRankingLoss equals stock and the plain loss, and keeps what others reach into."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn

from sbert_kernels import losses
from support.contrastive import ALL_DIRECTIONS
from support.embedded import Embedded
from support.gradients import step
from support.numbers import assert_close
from support.texts import text_features


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("mini_batch_size", [1, 3, 32])
def test_equals_stock_and_the_plain_loss(
    bert: Callable[..., Any],
    columns: int,
    mini_batch_size: int,
) -> None:
    model = bert()
    features = text_features(model, columns=columns)
    options = {"directions": ALL_DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 2.0}
    ours = step(losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size, **options), features)
    assert_close(
        ours,
        step(stock.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size, **options), features),
        replayed=True,
    )
    assert_close(ours, step(losses.MultipleNegativesRankingLoss(model, **options), features), replayed=True)


def test_symmetric_equals_stock(bert: Callable[..., Any]) -> None:
    model = bert()
    ours = losses.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=3)
    assert isinstance(
        ours, (stock.CachedMultipleNegativesSymmetricRankingLoss, losses.CachedMultipleNegativesRankingLoss)
    )
    theirs = stock.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=3)
    assert_close(step(ours, text_features(model)), step(theirs, text_features(model)), replayed=True)
    assert ours.get_config_dict() == theirs.get_config_dict()
    masked = losses.CachedMultipleNegativesSymmetricRankingLoss(model, duplicates="mask")
    assert masked.get_config_dict() == {**theirs.get_config_dict(), "mini_batch_size": 32, "duplicates": "mask"}


def leaves(columns: int = 2) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(columns)]
    return [[part.clone().requires_grad_() for part in column.split(3)] for column in whole]


def test_loss_stage_alone_leaves_gradients_on_every_mini_batch() -> None:
    """As stock does: detached value, gradients accumulated over calls; without backward, a value with its graph."""
    results = []
    for module in (stock, losses):
        loss = module.CachedMultipleNegativesRankingLoss(Embedded(), mini_batch_size=3)
        reps = leaves(3)
        value = loss.calculate_loss(reps, None, with_backward=True)
        assert not value.requires_grad
        loss.calculate_loss(reps, with_backward=True)
        results.append([value, *(part.grad for column in reps for part in column)])
        assert loss.calculate_loss(reps).requires_grad
    assert_close(*results)


def test_loss_stage_reaches_what_stock_reaches() -> None:
    """A mini-batch without a gradient is skipped; one that is no leaf passes its gradient on."""
    results = []
    for module in (stock, losses):
        loss = module.CachedMultipleNegativesRankingLoss(Embedded(), mini_batch_size=32)
        reps = leaves(3)
        reps[1][0].requires_grad_(False)
        source = reps[0][1]
        reps[0][1] = source * 2
        loss.calculate_loss(reps, with_backward=True)
        assert reps[1][0].grad is None
        results.append([source.grad, reps[0][0].grad, reps[2][0].grad])
    assert_close(*results)


def test_a_replaced_inner_loss_is_computed_by_stock(caplog: pytest.LogCaptureFixture) -> None:
    results = []
    for module in (stock, losses):
        loss = module.CachedMultipleNegativesRankingLoss(Embedded(), mini_batch_size=3)
        loss.loss = stock.MultipleNegativesRankingLoss(Embedded(), scale=3.0)
        results.append([loss.calculate_loss(leaves(), with_backward=True)])
        loss.get_config_dict()
    assert_close(*results)
    assert "its inner loss was replaced" in caplog.text


def test_a_learnable_scale_needs_the_fused_loss_stage() -> None:
    """Stock's would ignore whatever multiplies the loss."""
    scale = nn.Parameter(torch.tensor(3.0))
    loss = losses.CachedMultipleNegativesRankingLoss(Embedded(), scale, lambda a, b: -torch.cdist(a, b))
    with pytest.raises(ValueError, match="cannot combine scale='learnable' with a stock computation"):
        loss.calculate_loss(leaves(), with_backward=True)


def test_hyperparameters_live_on_the_inner_loss() -> None:
    loss = losses.CachedMultipleNegativesRankingLoss(Embedded(), duplicates="mask")
    assert isinstance(loss.loss, losses.MultipleNegativesRankingLoss)
    loss.scale, loss.similarity_fct, loss.duplicates = 5.0, nn.CosineSimilarity(), "keep"
    assert (loss.loss.scale, loss.loss.duplicates) == (5.0, "keep")
    assert isinstance(loss.loss.similarity_fct, nn.CosineSimilarity)
    assert set(loss._modules) == {"model", "loss"}
    assert loss.uses_gradient_cache
    theirs = stock.CachedMultipleNegativesRankingLoss(Embedded(), scale=5.0, similarity_fct=nn.CosineSimilarity())
    assert loss.get_config_dict() == theirs.get_config_dict()
    assert loss.citation == theirs.citation


def test_other_similarities_are_computed_by_stock(caplog: pytest.LogCaptureFixture) -> None:
    values = []
    for module in (stock, losses):
        loss = module.CachedMultipleNegativesRankingLoss(
            Embedded(), scale=1.0, similarity_fct=lambda a, b: -torch.cdist(a, b), mini_batch_size=3
        )
        values.append(loss.calculate_loss(leaves(), with_backward=True))
    assert torch.equal(*values)
    assert "is computed by sentence-transformers" in caplog.text


def test_instance_overrides_of_embed_minibatch_are_used(bert: Callable[..., Any]) -> None:
    """And the caller's features are as they were after both passes."""
    model = bert()
    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    original, calls = loss.embed_minibatch, []

    def counted(**kwargs: Any) -> Any:
        calls.append(kwargs["with_grad"])
        return original(**kwargs)

    loss.embed_minibatch = counted
    features = text_features(model)
    before = copy.deepcopy(features)
    loss(features, None).backward()
    assert calls == [False] * 6 + [True] * 6
    torch.testing.assert_close(
        [{k: v for k, v in column.items() if isinstance(v, Tensor)} for column in features],
        [{k: v for k, v in column.items() if isinstance(v, Tensor)} for column in before],
    )
    assert [list(column) for column in features] == [list(column) for column in before]


def test_evaluation_has_no_graph(bert: Callable[..., Any]) -> None:
    model = bert()
    cached, plain = losses.CachedMultipleNegativesRankingLoss(model), losses.MultipleNegativesRankingLoss(model)
    with torch.no_grad():
        value = cached(text_features(model), None)
        torch.testing.assert_close(value, plain(text_features(model), None))
    assert not value.requires_grad


def test_two_forwards_then_two_backwards(bert: Callable[..., Any]) -> None:
    model = bert()
    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    first, second = text_features(model, rows=4), text_features(model, rows=7)
    expected = [a + b for a, b in zip(step(loss, first), step(loss, second), strict=True)]
    loss.zero_grad()
    values = [loss(first, None), loss(second, None)]
    for value in values:
        value.backward()
    assert_close(
        [sum(values).detach(), *(p.grad for p in loss.parameters() if p.grad is not None)], expected, replayed=True
    )


class Scaled(nn.Module):
    """A loss, wrapped or not, with a scale."""

    def __init__(self, wrapper: str, model: Any, cached: bool, scale: Any) -> None:
        super().__init__()
        cls = losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss
        options = {"mini_batch_size": 3} if cached else {}
        self.loss = cls(model, scale=scale, directions=ALL_DIRECTIONS, **options)
        if wrapper != "none":
            module = stock if wrapper == "stock matryoshka" else losses
            self.loss = module.MatryoshkaLoss(model, self.loss, [32, 16, 8], [1.0, 0.5, 2.0])

    def forward(self, *arguments: Any) -> Tensor:
        return self.loss(*arguments)


@pytest.mark.parametrize("wrapper", ["none", "matryoshka", "stock matryoshka"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.25, 65536.0])
def test_learnable_scale_sees_every_factor_of_the_loss(
    bert: Callable[..., Any],
    wrapper: str,
    cached: bool,
    factor: float,
) -> None:
    """Central differences in fp64: through the gradient cache, Matryoshka weights, accumulation and a grad scaler."""
    model = bert()
    features = text_features(model)
    scale = nn.Parameter(torch.tensor(12.0, dtype=torch.float64))
    loss = Scaled(wrapper, model, cached, scale)
    step(loss, features, factor=factor)
    values = []
    for shifted in (12.0 + 1e-4, 12.0 - 1e-4):
        with torch.no_grad():
            values.append(Scaled(wrapper, model, cached, shifted)([dict(column) for column in features], None))
    expected = factor * (values[0] - values[1]) / 2e-4
    assert scale.grad.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("per_step", [-1, 1])
def test_matryoshka_around_it_gives_stock_s_result(
    bert: Callable[..., Any],
    cached: bool,
    per_step: int,
) -> None:
    import random

    model, results = bert(), []
    for module in (stock, losses):
        inner = (
            module.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
            if cached
            else module.MultipleNegativesRankingLoss(model)
        )
        random.seed(1)
        results.append(step(stock.MatryoshkaLoss(model, inner, [32, 16, 8], [1, 2, 3], per_step), text_features(model)))
    assert_close(*results, replayed=cached)


def test_adaptive_layers_around_the_plain_loss_give_stock_s_result(bert: Callable[..., Any]) -> None:
    model, results = bert(), []
    for module in (stock, losses):
        inner = module.MultipleNegativesRankingLoss(model)
        results.append(
            step(stock.AdaptiveLayerLoss(model, inner, n_layers_per_step=-1), text_features(model, columns=3))
        )
    assert_close(*results)


def test_duplicates_equal_the_plain_loss(bert: Callable[..., Any]) -> None:
    model = bert()
    features = [model.preprocess(["a", "b", "c", "a"]), model.preprocess(["same", "other", "same", "last one"])]
    options = {"directions": ALL_DIRECTIONS, "duplicates": "positive"}
    results = [
        step(losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3, **options), features),
        step(losses.MultipleNegativesRankingLoss(model, **options), features),
    ]
    assert_close(*results, replayed=True)
    kept = step(losses.MultipleNegativesRankingLoss(model, directions=ALL_DIRECTIONS), features)
    assert not torch.allclose(kept[0], results[0][0])


def test_gathering_in_one_process_changes_nothing() -> None:
    results = []
    for gather in (False, True):
        for similarity in (cos_sim, dot_score):
            loss = losses.CachedMultipleNegativesRankingLoss(
                Embedded(), similarity_fct=similarity, gather_across_devices=gather, directions=ALL_DIRECTIONS
            )
            reps = leaves()
            value = loss.calculate_loss(reps, with_backward=True)
            results.append([value, *(part.grad for column in reps for part in column)])
    assert_close(results[0], results[2])
    assert_close(results[1], results[3])
