"""Each objective's data and losses."""

from __future__ import annotations

import argparse

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as stock

from sbert_kernels import demo, losses
from sbert_kernels.demo.evaluation import Correlation, Retrieval
from sbert_kernels.demo.objectives import OBJECTIVES, Objective, angle, objective_of
from sbert_kernels.demo.options import DEFAULTS, Options
from sbert_kernels.workloads.models import static_model
from sbert_kernels.workloads.requirements import UserError
from sbert_kernels.workloads.texts import Pairs

PAIRS = [(f"query {i}", f"text {i}") for i in range(100)]
SCORES = [i / 100 for i in range(100)]


def build(*arguments: str) -> Objective:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return objective_of(Options.from_arguments(parser.parse_args(["--batch-size", "16", "--dim", "8", *arguments])))


@pytest.fixture
def model() -> SentenceTransformer:
    return static_model(dim=8, seed=0)


def test_every_objective_of_the_command_line_exists():
    assert list(OBJECTIVES) == list(DEFAULTS)


def test_mnr(model: SentenceTransformer):
    objective = build("--loss", "mnr")
    data = objective.prepare(Pairs(PAIRS, "here"))
    assert len(data.rows) == data.facts["train"] == 80
    assert isinstance(data.evaluation, Retrieval)
    assert type(objective.loss(model, "stock")) is stock.MultipleNegativesRankingLoss
    assert type(objective.training_loss(model)) is losses.MultipleNegativesRankingLoss


def test_matryoshka_is_the_default_and_has_mnr_inside(model: SentenceTransformer):
    objective = build("--matryoshka-dims", "8,4")
    for side, losses_of_side in (("stock", stock), ("sbert-kernels", losses)):
        loss = objective.loss(model, side)
        assert type(loss) is losses_of_side.MatryoshkaLoss
        assert type(loss.loss) is losses_of_side.MultipleNegativesRankingLoss
        assert list(loss.matryoshka_dims) == [8, 4]


def test_angle_with_scores_of_the_user():
    data = build("--loss", "angle").prepare(Pairs(PAIRS, "here", scores=SCORES))
    assert isinstance(data.evaluation, Correlation)
    rows = data.rows + data.evaluation.rows
    assert sorted(rows) == sorted((*pair, score) for pair, score in zip(PAIRS, SCORES, strict=True))
    assert len(data.lines) == 1  # nothing about stretching


@pytest.mark.parametrize(("low", "high"), [(0.0, 5.0), (-1.0, 1.0)])
def test_scores_beyond_0_to_1_are_stretched_in_order(low: float, high: float):
    scores = [low + (high - low) * i / 99 for i in range(100)]
    data = build("--loss", "angle").prepare(Pairs(PAIRS, "here", scores=scores))
    found = {query: score for query, _, score in data.rows + data.evaluation.rows}
    # Two roundings of float64, of numbers up to the range.
    assert [found[query] for query, _ in PAIRS] == pytest.approx([i / 99 for i in range(100)], abs=4 * 2**-52)
    assert f"from {low:g} to {high:g}" in data.lines[0]


def test_scores_without_an_order_are_refused():
    with pytest.raises(UserError, match="all scores of here are 1, wanted different ones"):
        build("--loss", "angle").prepare(Pairs(PAIRS, "here", scores=[1.0] * 100))
    # Whichever pair differs, the seed holds others out: put it where it is trained on.
    objective = build("--loss", "angle")
    trained_on = objective.prepare(Pairs(PAIRS, "here", scores=SCORES)).rows[0]
    scores = [float(pair == trained_on[:2]) for pair in PAIRS]
    with pytest.raises(UserError, match="all 20 held-out pairs have the same score"):
        objective.prepare(Pairs(PAIRS, "here", scores=scores))


def test_angle_asks_no_teacher_for_a_batch_that_cannot_be_filled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(angle, "graded_rows", None)
    with pytest.raises(UserError, match="--batch-size: got 241, wanted at most the 240 pairs that here leave"):
        build("--loss", "angle", "--batch-size", "241").prepare(Pairs(PAIRS, "here"))


def test_angle_trains_with_the_defaults_and_compares_what_stock_computes(model: SentenceTransformer):
    objective = build("--loss", "angle")
    compared, trained = objective.loss(model, "sbert-kernels"), objective.training_loss(model)
    assert (compared.positive_threshold, compared.losses["in_batch"].duplicates) == (None, "keep")
    assert (trained.positive_threshold, trained.losses["in_batch"].duplicates) == (0.5, "positive")
    terms = objective.loss(model, "stock").losses
    assert [type(terms[name]) for name in compared.losses] == [
        stock.CoSENTLoss,
        stock.MultipleNegativesRankingLoss,
        stock.AnglELoss,
    ]


def test_one_after_the_other_encodes_for_each_and_leaves_the_features_alone(model: SentenceTransformer):
    loss = build("--loss", "angle").loss(model, "stock")
    columns = [model.preprocess(list(column)) for column in zip(*PAIRS[:4], strict=True)]
    before = [set(column) for column in columns]
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    terms = loss(columns, torch.tensor([0.0, 1.0, 0.5, 0.2]))
    assert len(calls) >= len(terms) == 3
    assert [set(column) for column in columns] == before
