"""The stock Trainer, patched and not: the same loss curve, checkpoint and model card."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses as namespace
from torch import nn

import sbert_kernels
from support.trainer import logged_values, train

STEPS = 6
RECIPES: dict[str, Callable[[Any], nn.Module]] = {
    "mnr": lambda model: namespace.MultipleNegativesRankingLoss(model),
    "cached": lambda model: namespace.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    # A guide of its own: what a guide that is trained itself lets pass hangs on the last digit of its weights.
    "gist": lambda model: namespace.GISTEmbedLoss(model, copy.deepcopy(model)),
    "matryoshka": lambda model: namespace.MatryoshkaLoss(
        model, namespace.MultipleNegativesRankingLoss(model), [32, 16]
    ),
    "matryoshka-2d": lambda model: namespace.Matryoshka2dLoss(
        model, namespace.MultipleNegativesRankingLoss(model), [32, 16]
    ),
    "matryoshka-cached": lambda model: namespace.MatryoshkaLoss(
        model, namespace.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), [32, 16]
    ),
}


def short_training(model: Any, loss: nn.Module, folder: Path, steps: int = STEPS) -> SentenceTransformerTrainer:
    """Trains on 40 pairs with one checkpoint, after the last step; returns the trainer."""
    pairs = Dataset.from_dict(
        {
            "anchor": [f"question number {i} about {'cats' if i % 3 else 'dogs'}" for i in range(40)],
            "positive": [f"answer number {i}, rather long" for i in range(40)],
        }
    )
    options = {"per_device_train_batch_size": 8, "max_steps": steps, "save_steps": steps, "learning_rate": 1e-3}
    return train(model, loss, folder, pairs, **options)


def card(folder: Path) -> str:
    """The model card, less what is different in any two runs: the time it took."""
    text = (folder / "README.md").read_text()
    return re.sub(r"(?i).*(training time|\bseconds\b|minutes).*", "", text)


@pytest.mark.parametrize("recipe", RECIPES)
def test_patched_training_equals_stock(
    bert: Callable[..., Any], tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, cards, weights = [], [], []
    for name, context in (("stock", contextlib.nullcontext), ("fused", sbert_kernels.patch)):
        with context():
            model = bert(torch.float32)
            loss = RECIPES[recipe](model)
            reached = any(sbert_kernels.is_patched(part) for part in loss.modules())
            assert reached == (name == "fused"), "patch() has to reach the loss"
            folder = tmp_path / "run"
            trainer = short_training(model, loss, folder)
            checkpoint = folder / f"checkpoint-{STEPS}"
            curves.append(logged_values(trainer, "loss"))
            cards.append(card(checkpoint))
            weights.append(model.state_dict())
            folder.rename(tmp_path / name)
    assert len(curves[0]) == STEPS
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert cards[0] == cards[1]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_a_learnable_scale_is_trained(bert: Callable[..., Any], tmp_path: Path, cached: bool) -> None:
    model = bert(torch.float32)
    scale = nn.Parameter(torch.tensor(10.0))
    if cached:
        loss = sbert_kernels.losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=3)
    else:
        loss = sbert_kernels.losses.MultipleNegativesRankingLoss(model, scale=scale)
    short_training(model, loss, tmp_path, steps=3)
    assert 0 < abs(loss.scale.item() - 10.0) < 0.1
