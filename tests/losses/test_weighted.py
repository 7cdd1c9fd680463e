"""WeightedLoss equals the weighted sum of its losses run one by one, plain, cached, wrapped and in the Trainer."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor, nn

from sbert_kernels import losses
from sbert_kernels.losses import WeightedLoss
from sbert_kernels.losses.weighted import component_names
from support.gradients import model_gradients, total
from support.numbers import assert_close
from support.texts import text_features
from support.trainer import train

LABELS = torch.tensor([0.1, 0.9, 0.4, 0.4, 0.7, 0.0, 1.0], dtype=torch.float64)
CACHED = [{}, {"mini_batch_size": 3}, {"mini_batch_num_tokens": 20}]
replayed = pytest.mark.parametrize("options", CACHED, ids=["plain", "cached", "cached-tokens"])


def mixed(model: Any, weights: tuple[Any, ...] = (1.0, 0.25, -2, 0.5), scale: Any = 20.0) -> dict[str, Any]:
    return {
        "ranking": (losses.MultipleNegativesRankingLoss(model, scale=scale), weights[0]),
        "stock_ranking": (
            stock.MultipleNegativesRankingLoss(model, directions=("query_to_doc", "doc_to_doc")),
            weights[1],
        ),
        "cosine": (stock.CosineSimilarityLoss(model), weights[2]),
        "spread": (stock.GlobalOrthogonalRegularizationLoss(model), weights[3]),
    }


def gradients(loss: nn.Module, features: Any, others: list[Tensor] = (), factor: float = 1.0) -> list[Tensor]:
    """Returns the value of a loss for the first LABELS, and the gradients of its model and of other tensors."""
    return model_gradients(loss, features, LABELS[: len(features[0]["input_ids"])], others, factor)


def one_by_one(entries: dict[str, Any], features: Any, others: list[Tensor] = ()) -> list[Tensor]:
    runs = [
        (float(torch.as_tensor(weight).detach()), gradients(loss, features, others))
        for loss, weight in entries.values()
    ]
    return [sum(weight * run[index] for weight, run in runs) for index in range(len(runs[0][1]))]


@pytest.mark.parametrize("columns", [2, 3])
@replayed
def test_equals_the_weighted_sum_of_separate_runs(bert: Any, columns: int, options: dict[str, Any]) -> None:
    model = bert()
    features = text_features(model, columns=columns)
    entries = mixed(model)
    if columns == 3:
        entries = {
            **entries,
            "cosine": (stock.TripletLoss(model, triplet_margin=30.0), 0.125),
        }
    assert_close(
        gradients(WeightedLoss(model, entries, **options), features), one_by_one(entries, features), bool(options)
    )


def test_the_batch_is_encoded_once(bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    calls, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    gradients(WeightedLoss(model, mixed(model)), text_features(model))
    assert len(calls) == 2  # a column each
    calls.clear()
    gradients(
        WeightedLoss(model, mixed(model), mini_batch_size=4, packing="none", activation_budget=0), text_features(model)
    )
    assert len(calls) == 2 * 2 * 2  # columns, mini-batches, passes


def test_the_result_is_each_weighted_value_by_name(bert: Any) -> None:
    model = bert()
    entries = mixed(model)
    result = WeightedLoss(model, entries)(text_features(model), LABELS)
    assert list(result) == list(entries)
    for name, (loss, weight) in entries.items():
        value = total(loss(text_features(model), LABELS))
        assert torch.allclose(result[name], weight * value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", CACHED, ids=["plain", "cached", "cached-tokens"])
def test_without_gradients_the_same_terms_and_no_cache(
    bert: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    model = bert()
    loss = WeightedLoss(model, mixed(model), **options)
    expected = WeightedLoss(model, mixed(model))(text_features(model), LABELS)
    with torch.no_grad():
        result = loss(text_features(model), LABELS)
    assert list(result) == list(expected)
    for name, value in result.items():
        assert not value.requires_grad
        assert torch.allclose(value, expected[name], rtol=1e-12, atol=0)


@replayed
def test_learnable_weights_and_scale(bert: Any, options: dict[str, Any]) -> None:
    """d/dweight is the value itself, d/dscale comes weighted; the loss owns all of them; any factor reaches them."""
    model = bert()
    features = text_features(model)
    scale = nn.Parameter(torch.tensor(7.0, dtype=torch.float64))
    weights = [nn.Parameter(torch.tensor([w], dtype=torch.float64)) for w in (1.5, 0.25, -0.5)]
    entries = mixed(model, (*weights, torch.tensor(2)), scale)
    loss = WeightedLoss(model, entries, **options)
    learned = [scale, *weights]
    assert {id(x) for x in learned} <= {id(x) for x in loss.parameters() if x.requires_grad}
    expected = one_by_one(entries, features, [scale])
    values = [total(inner(features, LABELS)).detach().reshape(1) for inner, _ in list(entries.values())[:3]]
    value, *grads = gradients(loss, features, learned, factor=3.0)
    assert_close([value, *grads], [expected[0], *(3 * x for x in (*expected[1:], *values))], bool(options))


def test_gradients_accumulate_over_steps(bert: Any) -> None:
    """Two forward passes before the first backward pass, as their sum."""
    model = bert()
    weight, scale = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (0.5, 7.0))
    results = []
    for options in CACHED[:2]:
        loss = WeightedLoss(model, mixed(model, (weight, 1, 1, 1), scale), **options)
        loss.zero_grad()
        steps = [loss(text_features(model, rows), LABELS[:rows]) for rows in (7, 4)]
        for step in steps:
            (total(step) / 2).backward()
        results.append([p.grad.clone() for p in loss.parameters() if p.grad is not None])
    assert_close(*results, replayed=True)


@replayed
def test_a_gradient_scaler_reaches_everything(bert: Any, options: dict[str, Any]) -> None:
    model = bert()
    weight, scale = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (0.5, 7.0))
    loss = WeightedLoss(model, mixed(model, (weight, 1, 1, 1), scale), **options)
    expected = gradients(loss, text_features(model), [weight, scale])[1:]
    loss.zero_grad()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(total(loss(text_features(model), LABELS))).backward()
    assert scale.grad.item() == pytest.approx(1024 * expected[-1].item(), rel=1e-5)
    scaler.unscale_(optimizer)
    assert_close(
        [torch.zeros_like(x) if x.grad is None else x.grad for x in (*model.parameters(), weight, scale)],
        expected,
        True,
    )


def test_a_learnable_tensor_that_is_no_parameter_gets_its_gradient(bert: Any) -> None:
    model = bert()
    found = []
    for options in CACHED[:2]:
        scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
        gradients(WeightedLoss(model, mixed(model, scale=scale), **options), text_features(model))
        found.append(scale.grad.item())
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_a_cache_serves_one_common_factor_only(bert: Any) -> None:
    model = bert()
    loss = WeightedLoss(model, mixed(model), mini_batch_size=3)
    terms = loss(text_features(model), LABELS)
    with pytest.raises(RuntimeError, match="one factor has to multiply them all"):
        (terms["ranking"] + 2 * terms["cosine"] + terms["spread"] + terms["stock_ranking"]).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


WRAPPERS: dict[str, Callable[[Any, nn.Module], nn.Module]] = {
    "ours": lambda model, loss: losses.MatryoshkaLoss(model, loss, [32, 8, 16], [1.0, 0.5, 2]),
    "stock": lambda model, loss: stock.MatryoshkaLoss(model, loss, [32, 8, 16], [1.0, 0.5, 2]),
    "ours, drawn": lambda model, loss: losses.MatryoshkaLoss(model, loss, [32, 8, 16], n_dims_per_step=2),
    "layers": lambda model, loss: stock.AdaptiveLayerLoss(model, loss, -1, 1.5, 0.5, 0.75),
    "2d": lambda model, loss: stock.Matryoshka2dLoss(model, loss, [32, 8]),
}


class Sum(nn.Module):
    """The weighted sum of losses in one tensor, one encoding each: what wrappers are made for."""

    def __init__(self, model: Any, entries: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.entries = model, entries

    def forward(self, features: Any, labels: Any) -> Tensor:
        embeddings = [self.model(column)["sentence_embedding"] for column in features]
        return sum(
            weight * total(loss.compute_loss_from_embeddings(embeddings, labels))
            for loss, weight in self.entries.values()
        )


@pytest.mark.parametrize("wrapper", WRAPPERS)
@replayed
def test_under_wrappers(bert: Any, wrapper: str, options: dict[str, Any]) -> None:
    model = bert()
    if options and wrapper in ("layers", "2d"):
        with pytest.warns(UserWarning, match="AdaptiveLayerLoss is not compatible"):
            WRAPPERS[wrapper](model, WeightedLoss(model, mixed(model), **options))
        return
    scale, weight = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (7.0, 0.5))
    entries = mixed(model, (weight, 0.25, -2, 0.5), scale)
    results = []
    for inner in (WeightedLoss(model, entries, **options), Sum(model, entries)):
        random.seed(3)
        results.append(gradients(WRAPPERS[wrapper](model, inner), text_features(model), [scale, weight], factor=0.5))
    assert_close(*results, replayed=bool(options))
    loss = WRAPPERS[wrapper](model, WeightedLoss(model, entries, **options))
    assert component_names(loss) == list(loss(text_features(model), LABELS))


@replayed
def test_duplicates_of_several_losses_see_the_texts(bert: Any, options: dict[str, Any]) -> None:
    model = bert()
    features = [
        {key: value[[0, 1, 2, 2, 1]] if isinstance(value, Tensor) else value for key, value in column.items()}
        for column in text_features(model)
    ]
    entries = {
        name: (losses.MultipleNegativesRankingLoss(model, duplicates=name), weight)
        for name, weight in (("mask", 1.0), ("positive", 0.5), ("keep", 0.25))
    }
    assert_close(
        gradients(WeightedLoss(model, entries, **options), features), one_by_one(entries, features), bool(options)
    )


def test_nested(bert: Any) -> None:
    """A WeightedLoss is itself a loss that has compute_loss_from_embeddings, with duplicates in it, too."""
    model = bert()
    entries = {**mixed(model), "mask": (losses.MultipleNegativesRankingLoss(model, duplicates="mask"), 1.0)}
    outer = WeightedLoss(model, {"inner": (WeightedLoss(model, entries), 2.0)}, mini_batch_size=3)
    assert_close(
        gradients(outer, text_features(model)),
        [2 * x for x in one_by_one(entries, text_features(model))],
        replayed=True,
    )


def test_a_subclass_may_compute_several_at_once_and_leave_some_out(bert: Any) -> None:
    class Mine(WeightedLoss):
        def components(self, embeddings: list[Tensor], labels: Any) -> dict[str, Tensor]:
            return {"cosine": embeddings[0].sum(), "ranking": embeddings[1].sum()}

    model = bert()
    for options in CACHED[:2]:
        result = Mine(model, mixed(model), **options)(text_features(model), None)
        expected = {"cosine": -2 * model(text_features(model)[0])["sentence_embedding"].sum()}
        assert {name: bool(value) for name, value in result.items()} == {
            "ranking": True,
            "cosine": True,
            "stock_ranking": False,
            "spread": False,
        }
        assert torch.allclose(result["cosine"], expected["cosine"])


def test_a_loss_that_lacks_labels_says_so_itself(bert: Any) -> None:
    model = bert()
    with pytest.raises(ValueError, match="AnglELoss requires labels"):
        WeightedLoss(model, {"angle": (stock.AnglELoss(model), 1.0)})(text_features(model), None)


def test_a_value_that_is_no_scalar_is_refused(bert: Any) -> None:
    model = bert()
    loss = WeightedLoss(model, {"cos": (stock.CosineSimilarityLoss(model, nn.MSELoss(reduction="none")), 1.0)})
    with pytest.raises(ValueError, match=r"losses\['cos'\] must give a scalar.*\[7\]"):
        loss(text_features(model), LABELS)


class NeedsMore(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def compute_loss_from_embeddings(self, embeddings: Any, labels: Any, texts: Any) -> Any: ...


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cached": (
        lambda m: losses.CachedMultipleNegativesRankingLoss(m),
        "cache of its own: give MultipleNegativesRankingLoss, .* mini_batch_size=",
    ),
    "weighted, cached": (lambda m: WeightedLoss(m, mixed(m), mini_batch_size=2), "leave its mini_batch_size"),
    "wrapper": (lambda m: losses.MatryoshkaLoss(m, losses.MultipleNegativesRankingLoss(m), [32]), "put it around"),
    "guide": (lambda m: losses.GISTEmbedLoss(m, copy.deepcopy(m)), r"second model \(guide\)"),
    "own guide": (lambda m: stock.GISTEmbedLoss(m, m), r"texts twice \(model, guide\)"),
    "more": (NeedsMore, r"takes \(embeddings, labels, texts\)"),
    "no model": (lambda m: nn.Linear(2, 2), "neither compute_loss_from_embeddings.* nor the model"),
    "another model": (lambda m: stock.CoSENTLoss(copy.deepcopy(m)), "of another model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_losses_that_cannot_share_embeddings_are_refused(bert: Any, case: str) -> None:
    model = bert()
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=rf"losses\['name'\] is a \w+,? .*{message}"):
        WeightedLoss(model, {"ok": (stock.CoSENTLoss(model), 1), "name": (make(model), 1.0)})


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({}, ValueError, "at least one"),
        ([1.0], ValueError, "must be a dictionary"),
        ({"x": 1.0}, TypeError, r"must be \(loss, weight\)"),
        ({"x": (torch.sum, 1.0)}, TypeError, "an nn.Module"),
        *(
            ({name: None}, ValueError, match)
            for name, match in (
                ("", "not empty"),
                ("a.b", "no '.'"),
                (3, "strings"),
                ("steps", "a meaning to the Trainer"),
            )
        ),
        ({"keys": None}, ValueError, "a meaning"),
    ],
)
def test_bad_entries(bert: Any, entries: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WeightedLoss(bert(), entries)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (float("nan"), ValueError, "must be finite, got nan"),
        (torch.tensor(torch.inf), ValueError, "must be finite, got inf"),
        ("1", TypeError, "must be a number"),
        (None, TypeError, "must be a number"),
        (torch.ones(2), TypeError, r"\[2\]"),
        (torch.tensor(1.0, requires_grad=True), ValueError, "no nn.Parameter"),
    ],
)
def test_bad_weights(bert: Any, weight: Any, error: type[Exception], message: str) -> None:
    model = bert()
    with pytest.raises(error, match=message):
        WeightedLoss(model, {"x": (stock.CosineSimilarityLoss(model), weight)})
    if isinstance(weight, float):
        loss = WeightedLoss(model, {"x": (stock.CosineSimilarityLoss(model), 1.0)})
        loss.weights["x"] = weight
        with pytest.raises(error, match=message):
            loss(text_features(model), LABELS)


@pytest.mark.parametrize("options", [{"mini_batch_size": 0}, {"mini_batch_size": 2.5}, {"mini_batch_num_tokens": 0}])
def test_bad_mini_batches(bert: Any, options: dict[str, Any]) -> None:
    model = bert()
    with pytest.raises(ValueError, match="must be a positive integer, got"):
        WeightedLoss(model, mixed(model), **options)


@replayed
def test_copies_and_pickles_compute_the_same(bert: Any, options: dict[str, Any]) -> None:
    model = bert()
    weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    loss = WeightedLoss(model, mixed(model, (weight, 1, 1, 1)), **options)
    expected = gradients(loss, text_features(model), [weight])
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.weights["ranking"] is not weight
        assert other.losses["cosine"].model is other.model
        assert_close(gradients(other, text_features(model), [other.weights["ranking"]]), expected)


def test_configuration_and_citations(bert: Any) -> None:
    model = bert()
    weight = nn.Parameter(torch.tensor(0.5))
    loss = WeightedLoss(model, mixed(model, (weight, 1.0, 2, torch.tensor([3]))), mini_batch_size=3)
    config = json.loads(json.dumps(loss.get_config_dict()))
    assert config["mini_batch_size"] == 3
    assert list(config["losses"]) == list(loss.losses)
    ranking = config["losses"]["ranking"]
    assert (ranking["class"], ranking["weight"], ranking["scale"]) == ("MultipleNegativesRankingLoss", 0.5, 20.0)
    assert config["losses"]["spread"]["weight"] == 3
    assert loss.citation.count("@misc") == 2  # MultipleNegativesRankingLoss twice, GOR
    assert not hasattr(WeightedLoss(model, {"cos": (stock.CosineSimilarityLoss(model), 1.0)}), "citation")


@pytest.mark.parametrize("options", CACHED[:2], ids=["plain", "cached"])
def test_in_the_trainer(bert: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    """Each term is logged, their sum is the loss, weights and scale are learned, a new model reaches every loss."""
    from datasets import Dataset

    model = bert(torch.float32)
    weight, scale = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(7.0))
    loss = WeightedLoss(model, mixed(model, (weight, 1.0, 1.0, 1.0), scale), **options)
    pairs = {
        "a": [f"question number {i}" for i in range(32)],
        "b": [f"answer number {i}" for i in range(32)],
        "score": [i / 32 for i in range(32)],
    }
    data = Dataset.from_dict(pairs)
    trainer = train(
        model,
        loss,
        tmp_path,
        data,
        data,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
    )
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert sum(entry[name] for name in loss.losses) == pytest.approx(entry["loss"], abs=2e-3)
    assert {f"eval_{name}" for name in loss.losses} <= set().union(*trainer.state.log_history)
    assert weight.item() != 0.5
    assert scale.item() != 7.0
    wrapped = nn.Module()
    overridden = trainer.override_model_in_loss(loss, wrapped)
    assert overridden is loss
    assert all(inner.model is wrapped for inner in (loss, *loss.losses.values()))
