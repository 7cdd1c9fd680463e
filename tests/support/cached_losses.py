"""Every loss that can run over the gradient cache, batches of text, and a pass through the cache or in one piece."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor, nn

from sbert_kernels import losses
from support.contrastive import ALL_DIRECTIONS
from support.gradients import total, value_and_gradients

WORDS = (
    "how",
    "tall",
    "is",
    "the",
    "tower",
    "and",
    "who",
    "wrote",
    "a",
    "book",
    "about",
    "rice",
    "rain",
    "light",
    "at",
)

GUIDED = {"margin": 0.1}  # without one, rounding would say which of several equal texts are false negatives


def mixed(model: Any, **options: Any) -> nn.Module:
    """Returns a WeightedLoss of three losses, one of which is stock's."""
    entries = {
        "ranking": (losses.MultipleNegativesRankingLoss(model, directions=ALL_DIRECTIONS), 1.0),
        "spread": (stock.GlobalOrthogonalRegularizationLoss(model), 0.5),
        "order": (losses.AnglELoss(model), 0.25),
    }
    return losses.WeightedLoss(model, entries, **options)


# By name: the loss over the engine and the loss in one piece, of a model and a guide.
OBJECTIVES: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "ranking": (
        lambda m, g, **o: losses.CachedMultipleNegativesRankingLoss(m, directions=ALL_DIRECTIONS, **o),
        lambda m, g: losses.MultipleNegativesRankingLoss(m, directions=ALL_DIRECTIONS),
    ),
    "symmetric": (
        lambda m, g, **o: losses.CachedMultipleNegativesSymmetricRankingLoss(m, **o),
        lambda m, g: losses.MultipleNegativesSymmetricRankingLoss(m),
    ),
    "guided": (
        lambda m, g, **o: losses.CachedGISTEmbedLoss(m, g, **GUIDED, **o),
        lambda m, g: losses.GISTEmbedLoss(m, g, **GUIDED),
    ),
    "cosent": (lambda m, g, **o: losses.CachedCoSENTLoss(m, **o), lambda m, g: losses.CoSENTLoss(m)),
    "angle": (lambda m, g, **o: losses.CachedAnglELoss(m, **o), lambda m, g: losses.AnglELoss(m)),
    "weighted": (lambda m, g, **o: mixed(m, **o), lambda m, g: mixed(m)),
    "objective": (lambda m, g, **o: losses.AnglEObjective(m, **o), lambda m, g: losses.AnglEObjective(m)),
}

PACKINGS = [{"packing": "length"}, {"packing": "length", "unique_rows": True}, {"packing": "none"}]


def around(name: str, wrapper: str, model: Any, guide: Any, **options: Any) -> nn.Module:
    """Returns the loss of that name in a wrapper ("none", "matryoshka" or "stock matryoshka").

    It runs over the gradient cache if options are given.
    """
    cached, plain = OBJECTIVES[name]
    loss = cached(model, guide, **options) if options else plain(model, guide)
    if wrapper == "none":
        return loss
    module = stock if wrapper == "stock matryoshka" else losses
    return module.MatryoshkaLoss(model, loss, [32, 8], [1.0, 0.5])


def batch(model: Any, rows: int, columns: int = 2, longest: int = 12) -> list[dict[str, Any]]:
    """Returns features of texts of 1 to ``longest`` words, a third of them those of other rows, in any column."""
    draw = random.Random(rows * 10 + columns)
    texts: list[str] = []
    for index in range(rows * columns):
        again = index and draw.random() < 1 / 3
        words = draw.choices(WORDS, k=draw.randint(1, longest))
        texts.append(draw.choice(texts) if again else " ".join(words))
    return [model.preprocess(texts[column::columns]) for column in range(columns)]


def labels_of(features: list[dict[str, Any]]) -> Tensor:
    """Returns a score from 0 to 1 for each row of these features, the same at each call."""
    return torch.rand(len(features[0]["input_ids"]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def value_of(loss: nn.Module, features: list[dict[str, Any]]) -> Tensor:
    """Returns what a loss comes to for these features, the sum of its terms where it has several."""
    return total(loss(features, labels_of(features)))


def gradients(loss: nn.Module, value: Callable[[], Tensor]) -> list[Tensor]:
    """Returns a value, and the gradient of every parameter of the loss's model."""
    return value_and_gradients(value, loss.model.parameters())


def in_one_piece(loss: nn.Module, features: list[dict[str, Any]]) -> list[Tensor]:
    """Returns the value of a loss and the gradients of its model, for a copy of these features."""
    return gradients(loss, lambda: value_of(loss, copy.deepcopy(features)))


def through_the_cache(loss: nn.Module, features: list[dict[str, Any]]) -> list[Tensor]:
    """Returns the same as ``in_one_piece``, for the features themselves, which the loss must leave as they were."""
    before = copy.deepcopy(features)
    result = gradients(loss, lambda: value_of(loss, features))
    for column, old in zip(features, before, strict=True):
        assert list(column) == list(old)
        for key, value in old.items():
            assert torch.equal(column[key], value) if isinstance(value, Tensor) else column[key] == value
    return result
