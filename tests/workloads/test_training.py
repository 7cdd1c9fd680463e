"""Trainings with the Trainer: texts that are tokenized once give the features, and the losses, of the usual way."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers.sentence_transformer import losses

from sbert_kernels.workloads.models import static_model
from sbert_kernels.workloads.training import Settings, TokenizedTexts, prepare

ROWS = [(f"what is the number {i % 9}", f"the number {i} comes after {i - 1}") for i in range(128)]


def test_features_of_tokenized_texts_are_those_of_the_model():
    module = static_model(dim=8, seed=0)[0]
    texts = [text for row in ROWS[:5] for text in row]
    found, wanted = TokenizedTexts(module, ROWS)(texts, prompt=None, task=None), module.preprocess(texts)
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


def test_a_training_on_texts_that_are_tokenized_ahead_has_the_same_losses(tmp_path: Path):
    curves = []
    for ahead in (False, True):
        model = static_model(dim=8, seed=0)
        loss = losses.MultipleNegativesRankingLoss(model)
        train = prepare(model, loss, ROWS, Settings(32, 3, 1e-2, 0, tmp_path, tokenize_ahead=ahead))
        if ahead:  # the model's own way is not asked again
            model[0].preprocess = model.preprocess = None
        curves.append(train().losses)
    assert curves[0] == curves[1]
