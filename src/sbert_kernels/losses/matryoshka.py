"""MatryoshkaLoss on the fused contrastive operation: all prefixes of the embeddings in one call of it."""

from __future__ import annotations

import inspect
import logging
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss as StockLoss
from torch import Tensor, nn

from .._stock import matryoshka as stock_module
from .._stock import widened
from ..logs import described, log_once
from ..ops._checks import number
from ._drop_in import DropIn
from ._prefixes import Prefixes
from ._scale import learnable
from .cached_gist_embed import CachedGISTEmbedLoss
from .cached_multiple_negatives_ranking import CachedMultipleNegativesRankingLoss
from .gist_embed import GISTEmbedLoss
from .multiple_negatives_ranking import MultipleNegativesRankingLoss

logger = logging.getLogger(__name__)

# The drop-ins that take prefixes, with the methods that compute them. If a user has overridden one of these methods, it
# must be called with the embeddings of each prefix, as stock does.
PLAIN = {
    MultipleNegativesRankingLoss: ("forward", "compute_loss_from_embeddings", "compute_loss"),
    GISTEmbedLoss: ("forward",),
}
CACHED = (CachedMultipleNegativesRankingLoss, CachedGISTEmbedLoss)


class MatryoshkaLoss(DropIn, StockLoss):
    """Trains embeddings whose prefixes, the first 64 or 128 numbers say, are good embeddings too.

    It computes another loss on each of several prefixes of the embeddings and adds the results up. Use it when
    embeddings are to be stored or searched at a smaller size than the model gives, at little cost in quality.

    Values and gradients are those of stock's class to rounding. If the inner loss is one of this package with in-batch
    negatives (plain or cached, with a guide or not), all prefixes are computed in one pass over the embeddings; stock
    runs the whole loss once for each prefix. Any other inner loss, and an option of one that only stock serves, is
    computed one prefix at a time; for the latter one logged line says why.

    Inputs:
        +---------------------------------+----------------------------------+
        | Texts                           | Labels                           |
        +=================================+==================================+
        | those that the inner loss takes | those that the inner loss takes  |
        +---------------------------------+----------------------------------+

    Args:
        model: The model that the inner loss was built with.
        loss: The inner loss.
        matryoshka_dims: The widths of the prefixes, each at most the dimension of the embeddings.
        matryoshka_weights: What multiplies the loss of each prefix; 1 by default. With learnable weights the prefixes
            are computed one at a time.
        n_dims_per_step: How many of the prefixes, drawn at random, are computed in each step; -1 is all.

    Raises:
        ValueError: The dims or the weights do not go with each other or with the model.

    Recommendations:
        - Have the full dimension of the model among ``matryoshka_dims``.
        - With this class all prefixes cost little more than one, so ``n_dims_per_step`` is hardly needed.

    What differs from stock: where the norm of an embedding or a prefix is below the eps of the normalisation (1e-12; in
    the GIST losses 1e-8), since stock normalises such a prefix two or three times. The features keep the whole
    embedding that the model put there, not the last prefix. The guide of a GIST loss embeds once.

    Example:
        ::

            model = SentenceTransformer("microsoft/mpnet-base")
            loss = losses.MultipleNegativesRankingLoss(model)
            loss = losses.MatryoshkaLoss(model, loss, [768, 512, 256, 128, 64])
            SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()

    Source:
        Kusupati et al. 2022, Matryoshka Representation Learning, arXiv 2205.13147.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        loss: nn.Module,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | Sequence[int] | None = None,
        n_dims_per_step: int = -1,
    ) -> None:
        super().__init__(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step)
        self._fuse_loss_stage()

    def _fuse_loss_stage(self) -> None:
        """Replaces the decorator that stock has put around the loss stage of a cached drop-in by ours."""
        decorator = vars(self.loss).get("calculate_loss")
        if isinstance(self.loss, CACHED) and type(decorator) is stock_module.CachedLossDecorator:
            # As stock's assignment does; through vars(), because for a type checker it is a method.
            vars(self.loss)["calculate_loss"] = CachedLossDecorator(
                decorator.fn, decorator.matryoshka_dims, decorator.matryoshka_weights, decorator.n_dims_per_step
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copied or pickled loss, whose decorator comes back as stock's."""
        super().__setstate__(state)
        self._fuse_loss_stage()

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Returns the weighted sum () of the inner loss of each prefix.

        Args:
            sentence_features: The features of each column of texts.
            labels: The labels, as the inner loss takes them.
        """
        sentence_features = list(sentence_features)
        inner = self.loss
        if isinstance(inner, (MultipleNegativesRankingLoss, GISTEmbedLoss)):
            drop_in = next(cls for cls in PLAIN if isinstance(inner, cls))
            if inner.serves() and _in_one_call(inner, self._why_not_one_call(drop_in)):
                prefixes = _prefixes_of_step(self.matryoshka_dims, self.matryoshka_weights, self.n_dims_per_step)
                return inner(sentence_features, labels, prefixes=prefixes)
        return super().forward(sentence_features, widened(labels))

    def _why_not_one_call(self, drop_in: type[nn.Module]) -> str | None:
        """Returns why the inner loss, which is a ``drop_in``, must be called once for each prefix, or None."""
        for name in PLAIN[drop_in]:
            if inspect.getattr_static(self.loss, name) is not vars(drop_in)[name]:
                return f"its {name} was overridden"
        # Stock cuts whatever this loss's model returns, also for another loss or as a guide.
        if self.loss.model is not self.model:
            return "its model is not the one given to MatryoshkaLoss"
        if getattr(self.loss, "guide", None) is self.model:
            return "its guide is the model itself, and is truncated as well"
        return _why_not_weights(self.matryoshka_weights)


class CachedLossDecorator(stock_module.CachedLossDecorator):
    """Wraps ``calculate_loss`` of a cached loss, as stock's does, and calls it once for all prefixes if it can."""

    def __call__(self, reps: list[list[Tensor]], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the weighted sum () of the loss of each prefix of the embeddings ``reps``."""
        loss = getattr(self.fn, "__self__", None)
        if not isinstance(loss, CACHED) or not loss.serves() or not _in_one_call(loss, self._why_not_one_call()):
            return super().__call__(reps, *args, **kwargs)
        prefixes = _prefixes_of_step(self.matryoshka_dims, self.matryoshka_weights, self.n_dims_per_step)
        return self.fn(reps, *args, prefixes=prefixes, **kwargs)

    def _why_not_one_call(self) -> str | None:
        """Returns why the loss must be called once for each prefix, or None."""
        if self.fn.__func__ not in [vars(cls)["calculate_loss"] for cls in CACHED]:
            return "its calculate_loss was overridden"
        return _why_not_weights(self.matryoshka_weights)

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes a copy or a pickle stock's decorator, so that it loads anywhere; MatryoshkaLoss replaces it again."""
        return stock_module.CachedLossDecorator, (
            self.fn,
            self.matryoshka_dims,
            self.matryoshka_weights,
            self.n_dims_per_step,
        )


def _why_not_weights(weights: Sequence[Any]) -> str | None:
    """Returns why weights as they are now cannot be given to one call for all prefixes, or None."""
    if any(map(learnable, weights)):
        return "matryoshka_weights are learnable"
    try:
        finite = all(math.isfinite(number("matryoshka_weights", weight)) for weight in weights)
    except TypeError:
        finite = False
    return None if finite else f"matryoshka_weights={described(list(weights))} are not all finite numbers"


def _in_one_call(loss: nn.Module, why_not: str | None) -> bool:
    """Returns True if there is no reason against one call for all prefixes; otherwise logs the reason once."""
    if why_not is None:
        return True
    log_once(logger, f"{type(loss).__name__} in a MatryoshkaLoss is computed one prefix at a time: {why_not}.")
    return False


def _prefixes_of_step(dims: Sequence[int], weights: Sequence[Any], count: int) -> Prefixes:
    """Returns all prefixes, or ``count`` of them at random; a seed draws the same ones here as in stock."""
    indices: Sequence[int] = range(len(dims))
    if 0 < count < len(indices):
        indices = random.sample(indices, count)
    numbers = (number("matryoshka_weights", weights[index]) for index in indices)
    return Prefixes(tuple(dims[index] for index in indices), tuple(map(float, numbers)))
