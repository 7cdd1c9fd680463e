"""The in-batch-negatives loss of both libraries, built alike."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from sentence_transformers import SentenceTransformer
from torch import nn


def in_batch_loss(
    model: SentenceTransformer, module: str, matryoshka_dims: Sequence[int] = (), mini_batch_size: int | None = None
) -> nn.Module:
    """Returns the MultipleNegativesRankingLoss of a module of ``recipes.SIDES``.

    Args:
        model: that is to be trained.
        module: the name of the module that holds the loss.
        matryoshka_dims: if there are any, the loss is put into a MatryoshkaLoss with these dimensions.
        mini_batch_size: if there is one, the loss is CachedMultipleNegativesRankingLoss with this size.
    """
    losses = importlib.import_module(module)
    if mini_batch_size is None:
        loss = losses.MultipleNegativesRankingLoss(model)
    else:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size)
    return losses.MatryoshkaLoss(model, loss, list(matryoshka_dims)) if matryoshka_dims else loss
