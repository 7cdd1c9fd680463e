"""CoSENTLoss and AnglELoss, plain, cached and sparse, equal stock: loss and the gradient of every parameter."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments, util
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.sparse_encoder import losses as sparse
from torch import Tensor, nn

import sbert_kernels
from sbert_kernels import losses, use_backend
from support.gradients import step
from support.numbers import assert_close
from support.texts import text_features

LABELS = torch.tensor([0.2, 0.9, 0.5, 0.5, 0.0, 1.0, 0.9], dtype=torch.float64)


def embeddings(columns: int = 2, rows: int = 7, dim: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(columns)
    return [torch.randn(rows, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(columns)]


def gradients(loss: nn.Module, columns: list[Tensor], labels: Tensor | None) -> list[Tensor | None]:
    """Returns the value of a loss that has no model, and its gradients, None for columns that it ignores."""
    leaves = [column.clone().requires_grad_() for column in columns]
    value = loss.compute_loss_from_embeddings(leaves, labels)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def cosine_plus_one(x: Tensor, y: Tensor) -> Tensor:
    return 1 + torch.cosine_similarity(x, y)


@dataclass
class Scaled:
    """A similarity that compares by value and so has no hash."""

    factor: float

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.factor * util.pairwise_cos_sim(x, y)


@pytest.mark.parametrize("name", ["CoSENTLoss", "AnglELoss"])
def test_equals_stock_on_a_model(bert: Any, name: str) -> None:
    model = bert()
    features = text_features(model)
    expected = step(getattr(stock, name)(model), features, LABELS)
    assert_close(step(getattr(losses, name)(model), features, LABELS), expected)


@pytest.mark.parametrize("labels", [None, LABELS, LABELS[:, None]], ids=["ones", "vector", "column"])
@pytest.mark.parametrize("columns", [3, 5])
def test_angle_of_tuples_equals_stock(columns: int, labels: Tensor | None) -> None:
    vector = None if labels is None else labels.flatten()  # stock before 6.2 takes no column
    expected = gradients(stock.AnglELoss(None), embeddings(columns), vector)
    assert_close(gradients(losses.AnglELoss(None), embeddings(columns), labels), expected)


@pytest.mark.parametrize(
    "similarity_fct",
    [
        util.pairwise_cos_sim,
        util.pairwise_dot_score,
        util.pairwise_angle_sim,
        util.pairwise_manhattan_sim,
        util.pairwise_euclidean_sim,
        cosine_plus_one,
    ],
)
def test_every_similarity_is_ranked(caplog: pytest.LogCaptureFixture, similarity_fct: Any) -> None:
    """By the operation; scores of a function that it does not know come from that function, which is logged."""
    caplog.set_level(logging.INFO)
    ours = losses.CoSENTLoss(None, scale=3.0, similarity_fct=similarity_fct)
    assert_close(
        gradients(ours, embeddings(), LABELS),
        gradients(stock.CoSENTLoss(None, scale=3.0, similarity_fct=similarity_fct), embeddings(), LABELS),
    )
    known = similarity_fct in (util.pairwise_cos_sim, util.pairwise_dot_score, util.pairwise_angle_sim)
    assert any(similarity_fct.__name__ in line for line in caplog.messages) != known


@pytest.mark.parametrize(("name", "function"), [("cosine", "pairwise_cos_sim"), ("dot", "pairwise_dot_score")])
def test_the_models_own_similarity_is_known(
    bert: Any, caplog: pytest.LogCaptureFixture, name: str, function: str
) -> None:
    """As it is when the loss is computed."""
    caplog.set_level(logging.INFO)
    model = bert()
    loss = losses.CoSENTLoss(model, 3.0, model.similarity_pairwise)
    model.similarity_fn_name = name
    expected = gradients(stock.CoSENTLoss(None, 3.0, getattr(util, function)), embeddings(), LABELS)
    assert_close(gradients(loss, embeddings(), LABELS), expected)
    assert "not known" not in caplog.text


def test_a_similarity_without_a_hash_is_ranked() -> None:
    ours, theirs = (module.CoSENTLoss(None, similarity_fct=Scaled(0.5)) for module in (losses, stock))
    assert_close(gradients(ours, embeddings(), LABELS), gradients(theirs, embeddings(), LABELS))


@pytest.mark.parametrize(
    "labels",
    [LABELS > 0.4, *((LABELS * 10).to(t) for t in (torch.int32, torch.uint8, torch.float16, torch.bfloat16))],
    ids=lambda labels: str(labels.dtype),
)
def test_labels_of_every_type(labels: Tensor) -> None:
    assert_close(
        gradients(losses.CoSENTLoss(None), embeddings(), labels),
        gradients(stock.CoSENTLoss(None), embeddings(), labels.double()),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss(dtype: torch.dtype) -> None:
    for name in ("CoSENTLoss", "AnglELoss"):
        value, *flow = gradients(getattr(losses, name)(None), embeddings(dtype=dtype), LABELS)
        assert value.dtype == torch.float32
        assert all(gradient.dtype == dtype for gradient in flow)


def test_the_loss_is_float32_under_autocast(bert: Any) -> None:
    model = bert(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = losses.CoSENTLoss(model)(text_features(model), LABELS)
    assert value.dtype == torch.float32


@pytest.mark.parametrize("name", ["CoSENTLoss", "AnglELoss", "SparseCoSENTLoss", "SparseAnglELoss"])
def test_constructor_and_configuration_are_stocks(name: str) -> None:
    ours, theirs = getattr(losses, name), getattr(stock, name, None) or getattr(sparse, name)
    known = inspect.signature(theirs.__init__).parameters
    mine = inspect.signature(ours.__init__).parameters
    assert list(known) == [p for p in mine if p in known]
    assert all(mine[p].kind is inspect.Parameter.KEYWORD_ONLY for p in mine if p not in known)
    assert all(mine[p].default == known[p].default for p in known)
    model = nn.Identity()
    mine, known = ours(model, scale=7.0), theirs(model, scale=7.0)
    assert isinstance(mine, theirs)
    assert mine.get_config_dict() == known.get_config_dict()
    assert mine.citation == known.citation
    copied = pickle.loads(pickle.dumps(copy.deepcopy(mine)))
    assert (copied.scale, copied.similarity_fct) == (7.0, mine.similarity_fct)


def test_new_options_show_in_the_configuration() -> None:
    assert losses.CoSENTLoss(None, gather_across_devices=True).get_config_dict()["gather_across_devices"] is True
    config = losses.CachedAnglELoss(None, torch.tensor(3.0), 5).get_config_dict()
    assert config == {
        "scale": 3.0,
        "similarity_fct": "pairwise_angle_sim",
        "mini_batch_size": 5,
        "mini_batch_num_tokens": None,
    }


def test_attributes_may_be_set_later() -> None:
    ours, theirs = losses.CoSENTLoss(None), stock.CoSENTLoss(None, 5, util.pairwise_dot_score)
    ours.scale, ours.similarity_fct = 5, util.pairwise_dot_score
    assert_close(gradients(ours, embeddings(), LABELS), gradients(theirs, embeddings(), LABELS))


@pytest.mark.parametrize("cls", [losses.CoSENTLoss, losses.AnglELoss, losses.CachedCoSENTLoss, losses.CachedAnglELoss])
def test_wrong_labels_are_refused(cls: type[nn.Module]) -> None:
    name = cls.__name__
    with pytest.raises(ValueError, match=rf"{name} expects 7 labels \(one per example\), but got 6 labels"):
        cls(None).compute_loss_from_embeddings(embeddings(), LABELS[:6])
    with pytest.raises(ValueError, match=f"{name} requires labels for datasets with pairs|requires labels"):
        cls(None).compute_loss_from_embeddings(embeddings(), None)
    with pytest.raises(TypeError, match=rf"{name} expects labels as a tensor, got \["):
        cls(None).compute_loss_from_embeddings(embeddings(), LABELS.tolist())
    with pytest.raises(ValueError, match="labels must be numbers that can be ordered, got 1 NaN among 7"):
        cls(None).compute_loss_from_embeddings(embeddings(), torch.where(LABELS == 1.0, torch.nan, LABELS))


def test_columns_that_stock_ignores_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    value, *flow = gradients(losses.CoSENTLoss(None), embeddings(3), LABELS)
    expected, *known = gradients(stock.CoSENTLoss(None), embeddings(3), LABELS)
    assert flow[2] is None
    assert known[2] is None
    assert_close([value, *flow[:2]], [expected, *known[:2]])
    assert "the first 2 columns of 3" in caplog.text


def test_disabled_is_stock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SBERT_KERNELS_DISABLE", "1")
    monkeypatch.setattr("sbert_kernels.losses.cosent.ranking_loss", None)
    caplog.set_level(logging.INFO)
    for name in ("CoSENTLoss", "AnglELoss"):
        for columns in (2, 3):
            got, expected = (
                getattr(module, name)(None).compute_loss_from_embeddings(embeddings(columns), LABELS)
                for module in (losses, stock)
            )
            assert torch.equal(got, expected)
    losses.CoSENTLoss(None, gather_across_devices=True).compute_loss_from_embeddings(embeddings(), LABELS)
    assert "gather_across_devices" in caplog.text


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_an_explicit_backend_serves(backend: str) -> None:
    with use_backend(backend):
        got = gradients(losses.AnglELoss(None), embeddings(3), LABELS)
    assert_close(got, gradients(stock.AnglELoss(None), embeddings(3), LABELS))


@pytest.mark.parametrize("cls", [losses.CoSENTLoss, losses.CachedCoSENTLoss, losses.AnglELoss, losses.CachedAnglELoss])
def test_a_learnable_scale_gets_its_gradient(bert: Any, cls: type[nn.Module]) -> None:
    """Through whatever multiplies the loss, cached or not, as finite differences have it."""
    model = bert()
    features = text_features(model)

    def value(number: float) -> Tensor:
        with torch.no_grad():
            return cls(model, scale=number)(features, LABELS)

    loss = cls(model, scale=nn.Parameter(torch.tensor(9.0, dtype=torch.float64)))
    (65536 * loss([dict(column) for column in features], LABELS)).backward()
    difference = 65536 * (value(9.001) - value(8.999)) / 0.002
    assert loss.scale.grad.item() == pytest.approx(difference.item(), rel=1e-6)


@pytest.mark.parametrize("wrapper", [stock.MatryoshkaLoss, losses.MatryoshkaLoss])
@pytest.mark.parametrize("cls", [losses.AnglELoss, losses.CachedAnglELoss])
def test_a_learnable_scale_inside_matryoshka(bert: Any, wrapper: Any, cls: type[nn.Module]) -> None:
    """Gets the gradients of all the prefixes, each with its weight, through whatever multiplies the loss."""
    model = bert()
    features = text_features(model, columns=3)

    def value(number: float) -> Tensor:
        inner = losses.AnglELoss(model, scale=number)
        with torch.no_grad():
            return stock.MatryoshkaLoss(model, inner, [32, 12], [1.0, 0.3])(features, None)

    inner = cls(model, scale=nn.Parameter(torch.tensor(9.0, dtype=torch.float64)))
    (3 * wrapper(model, inner, [32, 12], [1.0, 0.3])([dict(column) for column in features], None)).backward()
    difference = 3 * (value(9.001) - value(8.999)) / 0.002
    assert inner.scale.grad.item() == pytest.approx(difference.item(), rel=1e-6)


@pytest.mark.parametrize("mini_batch_size", [1, 3, 100])
@pytest.mark.parametrize(
    ("cached", "plain", "columns"),
    [("CachedCoSENTLoss", "CoSENTLoss", 2), ("CachedAnglELoss", "AnglELoss", 2), ("CachedAnglELoss", "AnglELoss", 3)],
)
def test_cached_equals_plain(bert: Any, cached: str, plain: str, columns: int, mini_batch_size: int) -> None:
    model = bert()
    features = text_features(model, columns=columns)
    expected = step(getattr(stock, plain)(model), features, LABELS)
    loss = getattr(losses, cached)(model, mini_batch_size=mini_batch_size)
    assert_close(step(loss, features, LABELS), expected, replayed=True)
    with torch.no_grad():
        torch.testing.assert_close(loss(features, LABELS), expected[0])


def test_cached_gradients_take_a_factor_and_add_up(bert: Any) -> None:
    """A gradient scaler multiplies the loss, accumulation adds backward passes."""
    model = bert()
    features = text_features(model)
    once = step(losses.CachedCoSENTLoss(model, mini_batch_size=3), features, LABELS)
    loss = losses.CachedCoSENTLoss(model, mini_batch_size=3)
    loss.zero_grad()
    for factor in (1024.0, 0.5):
        (factor * loss([dict(column) for column in features], LABELS)).backward()
    assert_close(
        [p.grad for p in loss.parameters() if p.grad is not None],
        [1024.5 * gradient for gradient in once[1:]],
        replayed=True,
    )


@pytest.mark.parametrize("name", ["CoSENTLoss", "AnglELoss"])
@pytest.mark.parametrize("cached", [False, True])
def test_matryoshka_around(bert: Any, name: str, cached: bool) -> None:
    model = bert()
    features = text_features(model)
    expected = step(stock.MatryoshkaLoss(model, getattr(stock, name)(model), [32, 12], [1.0, 0.3]), features, LABELS)
    for module in (stock, losses):
        inner = getattr(losses, f"Cached{name}" if cached else name)(model)
        assert_close(
            step(module.MatryoshkaLoss(model, inner, [32, 12], [1.0, 0.3]), features, LABELS), expected, replayed=cached
        )


@pytest.mark.parametrize(("name", "columns"), [("CoSENTLoss", 2), ("AnglELoss", 2), ("AnglELoss", 3)])
@pytest.mark.parametrize(
    ("wrapper", "options"),
    [("AdaptiveLayerLoss", {"n_layers_per_step": -1}), ("Matryoshka2dLoss", {"matryoshka_dims": [32, 12]})],
)
@pytest.mark.parametrize("patched", [False, True])
def test_layer_wrappers_around(
    bert: Any, wrapper: str, options: dict[str, Any], name: str, columns: int, patched: bool
) -> None:
    """They run the loss once a layer, on what they put into the features; patched, they and the loss are looked up."""
    model = bert()
    features = text_features(model, columns=columns)
    labels = LABELS if columns == 2 else None

    def run(module: Any) -> list[Tensor]:
        random.seed(0)  # which layers and prefixes
        return step(getattr(stock, wrapper)(model, getattr(module, name)(model), **options), features, labels)

    expected = run(stock)
    if patched:
        with sbert_kernels.patch():
            assert_close(run(stock), expected)
    else:
        assert_close(run(losses), expected)


@pytest.mark.parametrize("name", ["SparseCoSENTLoss", "SparseAnglELoss"])
def test_sparse_losses_equal_stock(name: str) -> None:
    columns = [torch.relu(column - 0.5) for column in embeddings(dim=40)]
    model = nn.Identity()
    ours, theirs = getattr(losses, name)(model), getattr(sparse, name)(model)
    assert_close(gradients(ours, columns, LABELS), gradients(theirs, columns, LABELS))
    with pytest.raises(AttributeError, match="should not be used alone"):
        ours([{}], LABELS)


def test_embeddings_in_a_sparse_layout_are_scored_by_stock() -> None:
    columns = [torch.relu(column - 0.5).to_sparse() for column in embeddings(dim=40)]
    value, expected = (
        module.SparseCoSENTLoss(nn.Identity()).compute_loss_from_embeddings(columns, LABELS)
        for module in (losses, sparse)
    )
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("default", [False, True])
def test_patched_training_equals_stock(bert: Any, tmp_path: Path, default: bool) -> None:
    """With the loss that the Trainer takes where none is given, too."""
    curves = []
    for patched in (False, True):
        with sbert_kernels.patch() if patched else torch.enable_grad():
            model = bert(torch.float32)
            data = {
                "sentence1": [f"question number {i} about {'cats' if i % 3 else 'dogs'}" for i in range(40)],
                "sentence2": [f"answer number {i}, rather long" for i in range(40)],
                "score": [(i * 7 % 11) / 10 for i in range(40)],
            }
            arguments = SentenceTransformerTrainingArguments(
                output_dir=str(tmp_path / str(patched)),
                per_device_train_batch_size=8,
                max_steps=4,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            )
            trainer = SentenceTransformerTrainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_dict(data),
                loss=None if default else stock.AnglELoss(model),
            )
            name = "CoSENTLoss" if default else "AnglELoss"
            assert (type(trainer.loss) is getattr(losses, name)) == patched
            trainer.train()
            curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 4
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
