"""MatryoshkaLoss on the fused contrastive operation: all prefixes of the embeddings in one call of it."""

from __future__ import annotations

import inspect
import logging
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import matryoshka as stock
from torch import Tensor, nn

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

# The drop-ins that take prefixes, and the methods that compute them: a user's own version of one of these has to be
# called with the embeddings of each prefix.
PLAIN = {
    MultipleNegativesRankingLoss: ("forward", "compute_loss_from_embeddings", "compute_loss"),
    GISTEmbedLoss: ("forward",),
}
CACHED = (CachedMultipleNegativesRankingLoss, CachedGISTEmbedLoss)


class MatryoshkaLoss(DropIn, stock.MatryoshkaLoss):
    """Stock's MatryoshkaLoss, all prefixes of the embeddings in one call of the inner loss.

    This holds for the inner losses of this package that rank in-batch negatives (plain or cached, guided or not); any
    other inner loss, and whatever option of one only stock serves, is computed one prefix at a time, as by stock.

    Values and gradients are stock's to rounding, except where the norm of an embedding or of a prefix is below the eps
    of the normalisation (1e-12, in the GIST losses 1e-8): stock normalises such a prefix two or three times. The
    features keep the whole embedding that the model put there, not the last prefix. The guide of a GIST loss embeds
    once.

    Args:
        model: The model that the inner loss was built with.
        loss: The inner loss, of the prefix of every embedding.
        matryoshka_dims: Widths of the prefixes, each at most the embeddings' dimension.
        matryoshka_weights: What multiplies the loss of each; 1 by default. A learnable one is computed as by stock.
        n_dims_per_step: How many of the prefixes, drawn at random, a step looks at; -1 is all.
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
        """Put ours in the place of the decorator that stock has put around the loss stage of a cached drop-in."""
        decorator = vars(self.loss).get("calculate_loss")
        if isinstance(self.loss, CACHED) and type(decorator) is stock.CachedLossDecorator:
            self.loss.calculate_loss = CachedLossDecorator(
                decorator.fn, decorator.matryoshka_dims, decorator.matryoshka_weights, decorator.n_dims_per_step
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fuse_loss_stage()

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        sentence_features = list(sentence_features)
        drop_in = next((cls for cls in PLAIN if isinstance(self.loss, cls)), None)
        if drop_in is None or not self.loss.serves() or not _in_one_call(self.loss, self._hindrance(drop_in)):
            return super().forward(sentence_features, labels)
        prefixes = _prefixes_of_step(self.matryoshka_dims, self.matryoshka_weights, self.n_dims_per_step)
        return self.loss(sentence_features, labels, prefixes=prefixes)

    def _hindrance(self, drop_in: type[nn.Module]) -> str | None:
        """Why the inner loss must be called once a prefix, or None."""
        for name in PLAIN[drop_in]:
            if inspect.getattr_static(self.loss, name) is not vars(drop_in)[name]:
                return f"its {name} was overridden"
        # Stock truncates what this wrapper's model returns, to whomever it returns it.
        if self.loss.model is not self.model:
            return "its model is not the one given to MatryoshkaLoss"
        if getattr(self.loss, "guide", None) is self.model:
            return "its guide is the model itself, and is truncated as well"
        return _unsupported_weights(self.matryoshka_weights)


class CachedLossDecorator(stock.CachedLossDecorator):
    """Stock's decorator of ``calculate_loss``, which calls it once with all prefixes where it can."""

    def __call__(self, reps: list[list[Tensor]], *args: Any, **kwargs: Any) -> Tensor:
        loss = getattr(self.fn, "__self__", None)
        if not isinstance(loss, CACHED) or not loss.serves() or not _in_one_call(loss, self._hindrance()):
            return super().__call__(reps, *args, **kwargs)
        prefixes = _prefixes_of_step(self.matryoshka_dims, self.matryoshka_weights, self.n_dims_per_step)
        return self.fn(reps, *args, prefixes=prefixes, **kwargs)

    def _hindrance(self) -> str | None:
        if self.fn.__func__ not in [vars(cls)["calculate_loss"] for cls in CACHED]:
            return "its calculate_loss was overridden"
        return _unsupported_weights(self.matryoshka_weights)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as stock's, for where this package is not installed; MatryoshkaLoss replaces it again."""
        return stock.CachedLossDecorator, (
            self.fn,
            self.matryoshka_dims,
            self.matryoshka_weights,
            self.n_dims_per_step,
        )


def _unsupported_weights(weights: Sequence[Any]) -> str | None:
    """Why weights as they are now cannot be given to one call for all prefixes, or None."""
    if any(map(learnable, weights)):
        return "matryoshka_weights are learnable"
    try:
        finite = all(math.isfinite(number("matryoshka_weights", weight)) for weight in weights)
    except TypeError:
        finite = False
    return None if finite else f"matryoshka_weights={described(list(weights))} are not all finite numbers"


def _in_one_call(loss: nn.Module, hindrance: str | None) -> bool:
    if hindrance is None:
        return True
    log_once(logger, f"{type(loss).__name__} in a MatryoshkaLoss is computed one prefix at a time: {hindrance}.")
    return False


def _prefixes_of_step(dims: Sequence[int], weights: Sequence[Any], count: int) -> Prefixes:
    """All prefixes, or ``count`` of them, drawn by the same call as stock's: the same seed draws the same prefixes."""
    indices: Sequence[int] = range(len(dims))
    if 0 < count < len(indices):
        indices = random.sample(indices, count)
    numbers = (number("matryoshka_weights", weights[index]) for index in indices)
    return Prefixes(tuple(dims[index] for index in indices), tuple(map(float, numbers)))
