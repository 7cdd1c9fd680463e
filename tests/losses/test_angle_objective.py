"""AnglEObjective equals stock's CoSENTLoss, MultipleNegativesRankingLoss and AnglELoss, one after the other."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor, nn

from sbert_kernels import contrastive_loss, losses
from sbert_kernels.losses import AnglEObjective
from support.contrastive import ALL_DIRECTIONS
from support.embedded import Embedded
from support.gradients import model_gradients
from support.numbers import assert_close
from support.texts import text_features

SCORES = torch.tensor([0.1, 0.9, 0.4, 0.4, 0.7, 0.0, 1.0], dtype=torch.float64)
AS_STOCK = {"positive_threshold": None, "duplicates": "keep"}
replayed = pytest.mark.parametrize("cache", [{}, {"mini_batch_size": 3}], ids=["plain", "cached"])


def parameter(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


class CoSENTOfTuples(stock.CoSENTLoss):
    """CoSENT for n-tuples as stock's AnglELoss reads them."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
        anchors, *columns = embeddings
        labels = torch.ones(len(anchors)) if labels is None else labels
        labels = torch.cat([labels, (1 - labels).repeat(len(columns) - 1)])
        return super().compute_loss_from_embeddings([anchors.repeat(len(columns), 1), torch.cat(columns)], labels)


def one_by_one(
    model: Any, features: Any, labels: Any, weights: tuple[float, float, float], directions: Any = ("query_to_doc",)
) -> list[Tensor]:
    terms = [
        CoSENTOfTuples(model, scale=11.0),
        stock.MultipleNegativesRankingLoss(model, scale=13.0, directions=directions),
        stock.AnglELoss(model, scale=17.0),
    ]
    runs = [(w, model_gradients(term, features, labels)) for w, term in zip(weights, terms, strict=True) if w]
    return [sum(weight * run[index] for weight, run in runs) for index in range(len(runs[0][1]))]


SCALES = {"cosine_scale": 11.0, "ibn_scale": 13.0, "angle_scale": 17.0}


@pytest.mark.parametrize("weights", [(1.0, 0.5, 2.0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0, 1)])
@pytest.mark.parametrize(("columns", "labels"), [(2, SCORES), (2, SCORES[:, None]), (3, None), (3, SCORES)])
@replayed
def test_equals_the_three_losses(bert: Any, columns: int, labels: Any, weights: Any, cache: dict[str, Any]) -> None:
    model = bert()
    features = text_features(model, columns=columns)
    ours = model_gradients(AnglEObjective(model, *weights, **SCALES, **AS_STOCK, **cache), features, labels)
    labels = None if labels is None else labels.reshape(-1)
    assert_close(ours, one_by_one(model, features, labels, weights), replayed=bool(cache))


@replayed
def test_pairs_without_scores_are_the_in_batch_term_alone(
    bert: Any, cache: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = bert()
    loss = AnglEObjective(model, ibn_weight=0.5, ibn_scale=13.0, directions=ALL_DIRECTIONS, **cache)
    # The same terms in the same order as of other formats: the Trainer gathers them over the ranks one by one.
    result = loss(text_features(model), None)
    assert list(result) == ["cosine", "in_batch", "angle"]
    assert result["cosine"] == result["angle"] == 0
    assert "no order to learn" in caplog.text
    assert_close(
        model_gradients(loss, text_features(model), None),
        one_by_one(model, text_features(model), None, (0, 0.5, 0), ALL_DIRECTIONS),
        replayed=bool(cache),
    )
    with pytest.raises(ValueError, match="ibn_weight=0 has nothing to compute"):
        AnglEObjective(model, ibn_weight=0)(text_features(model), None)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.int64, torch.bool])
@replayed
def test_rows_below_the_threshold_are_candidates_only(bert: Any, cache: dict[str, Any], kind: torch.dtype) -> None:
    model = bert()
    labels = (SCORES >= 0.4).to(kind) if not kind.is_floating_point else SCORES.to(kind)
    anchors = [1, 2, 3, 4, 6]
    a, b = (model(column)["sentence_embedding"] for column in text_features(model))
    logits = 20 * torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T
    expected = torch.nn.functional.cross_entropy(logits[anchors], torch.tensor(anchors))
    result = AnglEObjective(model, positive_threshold=0.4, **cache)(text_features(model), labels)
    assert list(result) == ["cosine", "in_batch", "angle"]
    assert result["in_batch"].item() == pytest.approx(expected.item(), rel=1e-6 if kind == torch.float32 else 1e-9)


@replayed
def test_no_row_above_the_threshold_is_an_in_batch_term_of_zero(bert: Any, cache: dict[str, Any]) -> None:
    model = bert()
    with_term = AnglEObjective(model, positive_threshold=2.0, **cache)
    assert with_term(text_features(model), SCORES)["in_batch"] == 0
    assert_close(
        model_gradients(with_term, text_features(model), SCORES),
        model_gradients(AnglEObjective(model, ibn_weight=0, **cache), text_features(model), SCORES),
    )


@replayed
def test_equal_texts_are_positives(bert: Any, cache: dict[str, Any]) -> None:
    model = bert()
    rows, ids = [0, 1, 2, 2, 1, 5], torch.tensor([0, 1, 2, 2, 1, 5])
    features = [
        {key: value[rows] if isinstance(value, Tensor) else value for key, value in column.items()}
        for column in text_features(model)
    ]
    a, b = (model(dict(column))["sentence_embedding"] for column in features)
    values = {}
    for duplicates in ("positive", "keep"):
        loss = AnglEObjective(model, duplicates=duplicates, directions=ALL_DIRECTIONS, **cache)
        result = loss([dict(x) for x in features], torch.ones(6))
        values[duplicates] = result["in_batch"].item()
        expected = contrastive_loss(
            a, b, query_ids=ids, document_ids=ids, duplicates=duplicates, directions=ALL_DIRECTIONS
        )
        assert values[duplicates] == pytest.approx(expected.item(), rel=1e-9)
    assert values["positive"] != pytest.approx(values["keep"], rel=1e-3)


@replayed
def test_learnable_weights_and_scales(bert: Any, cache: dict[str, Any]) -> None:
    model = bert()
    scales, weights = [parameter(x) for x in (11, 13, 17)], [parameter(x) for x in (1.0, 0.5, 0.0)]
    loss = AnglEObjective(model, *weights, *scales, **AS_STOCK, **cache)
    assert {id(x) for x in (*scales, *weights)} <= {id(x) for x in loss.parameters()}
    found = model_gradients(loss, text_features(model), SCORES, (*scales, *weights))
    names = {
        "cosine": losses.CoSENTLoss(model, scales[0]),
        "in_batch": losses.MultipleNegativesRankingLoss(model, scales[1]),
        "angle": losses.AnglELoss(model, scales[2]),
    }
    runs = [model_gradients(term, text_features(model), SCORES, tuple(scales)) for term in names.values()]
    expected = [sum(w.detach() * run[i] for w, run in zip(weights, runs, strict=True)) for i in range(len(runs[0]))]
    assert_close(found, [*expected, *(run[0] for run in runs)], replayed=bool(cache))


@pytest.mark.parametrize("module", [losses, stock], ids=["ours", "stock"])
@replayed
def test_under_matryoshka(bert: Any, module: Any, cache: dict[str, Any]) -> None:
    model = bert()
    dims = [32, 8]
    loss = module.MatryoshkaLoss(model, AnglEObjective(model, **SCALES, **AS_STOCK, **cache), dims, [1.0, 0.5])
    terms = [
        stock.CoSENTLoss(model, scale=11.0),
        stock.MultipleNegativesRankingLoss(model, scale=13.0),
        stock.AnglELoss(model, scale=17.0),
    ]
    features = text_features(model)
    wrapped = [stock.MatryoshkaLoss(model, term, dims, [1.0, 0.5]) for term in terms]
    runs = [model_gradients(term, features, SCORES) for term in wrapped]
    expected = [sum(x) for x in zip(*runs, strict=True)]
    assert_close(model_gradients(loss, features, SCORES), expected, replayed=bool(cache))


def test_the_embeddings_are_read_once(bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbert_kernels.losses import angle_objective, cosent

    calls, original = [], angle_objective.pairwise_similarity

    def counted(x: Tensor, y: Any, similarities: Any) -> Any:
        calls.append(list(similarities))
        return original(x, y, similarities)

    monkeypatch.setattr(angle_objective, "pairwise_similarity", counted)
    monkeypatch.setattr(cosent, "pairwise_similarity", counted)
    model = bert()
    AnglEObjective(model)(text_features(model, columns=3), None)
    AnglEObjective(model, angle_weight=0)(text_features(model), SCORES)
    assert calls == [["cos", "angle"], ["cos"]]


def test_a_disabled_package_computes_by_stock(bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    for columns, labels in ((2, SCORES), (3, None)):
        loss = AnglEObjective(model, **AS_STOCK)
        expected = model_gradients(loss, text_features(model, columns=columns), labels)
        with monkeypatch.context() as patched:
            patched.setenv("SBERT_KERNELS_DISABLE", "1")
            patched.setattr("sbert_kernels.losses.angle_objective.pairwise_similarity", None)
            assert_close(model_gradients(loss, text_features(model, columns=columns), labels), expected)


def test_scores_of_another_scale_than_the_threshold_s_are_remarked_once(caplog: pytest.LogCaptureFixture) -> None:
    columns = [{"embedding": torch.randn(7, 4)} for _ in range(2)]
    quiet: list[tuple[dict[str, Any], Tensor | None]] = [
        ({}, SCORES),
        ({}, SCORES > 0.5),
        ({"positive_threshold": 2.5}, 5 * SCORES),
        ({"positive_threshold": None}, 5 * SCORES),
        ({"ibn_weight": 0}, 5 * SCORES),
    ]
    for options, labels in quiet:
        AnglEObjective(Embedded(), **options, duplicates="keep")(columns, labels)
    assert "positive_threshold" not in caplog.text
    loss = AnglEObjective(Embedded(), duplicates="keep")
    for labels in (0.1 * SCORES, 5 * SCORES, 4 * SCORES):
        loss(columns, labels)
    remarks = [record.message for record in caplog.records if "positive_threshold" in record.message]
    assert len(remarks) == 1
    assert "scores go up to 5, and positive_threshold=0.5 makes 6 of 7 rows" in remarks[0]


def test_refusals(bert: Any) -> None:
    model = bert()
    with pytest.raises(ValueError, match="are all 0"):
        AnglEObjective(model, 0, 0.0, 0)
    for threshold in (float("nan"), "0.5"):
        with pytest.raises(ValueError, match="positive_threshold must be a finite number or None"):
            AnglEObjective(model, positive_threshold=threshold)
    with pytest.raises(ValueError, match="duplicates must be one of"):
        AnglEObjective(model, duplicates="none")
    with pytest.raises(ValueError, match="weight of losses\\['angle'\\] must be finite"):
        AnglEObjective(model, angle_weight=float("inf"))
    with pytest.raises(ValueError, match="at least 2 columns of texts, got 1"):
        AnglEObjective(model, ibn_weight=0)(text_features(model, columns=1), SCORES)
    with pytest.raises(ValueError, match="AnglEObjective expects 7 labels"):
        AnglEObjective(model)(text_features(model), SCORES[:3])
    with pytest.raises(TypeError, match=r"AnglEObjective expects labels as a tensor, got \[0.1, 0.9, "):
        AnglEObjective(model)(text_features(model), SCORES.tolist())


def test_configuration_copies_and_citations(bert: Any) -> None:
    model = bert()
    loss = AnglEObjective(model, angle_weight=0.25, ibn_scale=parameter(13), mini_batch_size=2)
    config = json.loads(json.dumps(loss.get_config_dict()))
    assert {name: entry["weight"] for name, entry in config["losses"].items()} == {
        "cosine": 1.0,
        "in_batch": 1.0,
        "angle": 0.25,
    }
    assert (config["losses"]["in_batch"]["scale"], config["losses"]["in_batch"]["duplicates"]) == (13, "positive")
    assert (config["positive_threshold"], config["mini_batch_size"]) == (0.5, 2)
    assert all(theirs(model).citation in loss.citation for theirs in (stock.CoSENTLoss, stock.AnglELoss))
    expected = model_gradients(loss, text_features(model), SCORES)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert_close(model_gradients(other, text_features(model), SCORES), expected)
