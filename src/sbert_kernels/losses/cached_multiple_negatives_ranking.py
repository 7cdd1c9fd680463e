"""CachedMultipleNegativesRankingLoss and its symmetric form: the gradient cache of this package, a fused loss stage.

The loss between the two passes over the encoder is one call of the contrastive operation over the whole batch: it needs
no chunks to bound its memory, and gathers across devices once, not once a chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import cached_multiple_negatives_ranking as stock
from sentence_transformers.sentence_transformer.losses.cached_multiple_negatives_symmetric_ranking import (
    CachedMultipleNegativesSymmetricRankingLoss as StockSymmetric,
)
from sentence_transformers.util import cos_sim
from torch import Tensor
from typing_extensions import deprecated

from ..gradcache.stage import backward_to_embeddings
from ._cached import GradientCached
from ._drop_in import DropIn
from ._prefixes import WHOLE, Prefixes
from ._scale import learnable, plain_scale
from ._serving import serves
from .multiple_negatives_ranking import MultipleNegativesRankingLoss, check_duplicates


class CachedMultipleNegativesRankingLoss(GradientCached, DropIn, stock.CachedMultipleNegativesRankingLoss):
    """Stock's CachedMultipleNegativesRankingLoss with a fused loss stage and our gradient cache.

    ``mini_batch_size`` bounds the memory of the encoder; the loss stage needs no bound.

    Args:
        model: The model, which embeds (query, positive) pairs or (query, positive, negatives...) tuples.
        scale: Multiplies the similarities: the inverse temperature. Positive; an ``nn.Parameter`` is learned.
        similarity_fct: ``cos_sim`` or ``dot_score``; any other is computed by stock, which is logged once.
        mini_batch_size: Encode in the memory that so many rows of the longest text take.
        mini_batch_num_tokens: Encode so many tokens at once, instead.
        gather_across_devices: Whether the documents (and queries) of all ranks are candidates.
        directions: Which candidates a row has: "query_to_doc", and any of "query_to_query", "doc_to_query" and
            "doc_to_doc".
        partition_mode: "joint", one softmax over all directions; or "per_direction", the mean of one for each.
        show_progress_bar: Whether to show a progress bar over both passes.
        hardness_mode: None, or the documents that weigh more by their similarity: "in_batch_negatives",
            "hard_negatives", "all_negatives".
        hardness_strength: What multiplies that similarity in the logit; not negative.
        duplicates: What becomes of an in-batch negative whose text equals the row's own positive (or query, in the
            directions whose candidates are queries): "keep" (as stock), "mask", or "positive". Texts are compared by
            their token ids, those of candidates only.
        packing: "length" puts rows of like length into a mini-batch; "none" takes them as they come, as stock does.
        unique_rows: Whether rows that are equal are encoded once.
        activation_budget: Bytes of activations that may be kept for the second pass, or "auto".

    The options of the cache are those of :class:`~sbert_kernels.gradcache.options.Options`, in more words there.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        show_progress_bar: bool = False,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        duplicates: str = "keep",
        packing: str = "length",
        unique_rows: bool = False,
        activation_budget: int | str | None = None,
    ) -> None:
        # Stock keeps these; every option of the loss itself belongs to the inner loss, which validates it.
        super().__init__(
            model=model,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
        )
        self.loss = MultipleNegativesRankingLoss(
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            gather_across_devices=gather_across_devices,
            directions=directions,
            partition_mode=partition_mode,
            hardness_mode=hardness_mode,
            hardness_strength=hardness_strength,
            duplicates=duplicates,
        )
        self._set_cache_options(packing, unique_rows, activation_budget)

    _delegated_to_wrapped_loss = (*stock.CachedMultipleNegativesRankingLoss._delegated_to_wrapped_loss, "duplicates")

    @property
    def duplicates(self) -> str:
        return self.loss.duplicates

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
        prefixes: Prefixes = WHOLE,
    ) -> Tensor:
        """The loss of the whole batch from its mini-batches of embeddings; see stock.

        With ``with_backward``, every mini-batch has its gradient in ``.grad`` afterwards, and the loss returned is
        detached from all of them. It still carries the gradient of a learnable scale, so that whatever multiplies the
        loss later (a weight, a gradient scaler) reaches the scale as well.
        """
        if len(reps) < 2 or (prefixes is WHOLE and not self.serves([part for column in reps for part in column])):
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = self.loss.compute_loss([torch.cat(column) for column in reps], labels, stock, prefixes)
        return backward_to_embeddings(loss, [part for column in reps for part in column]) if with_backward else loss

    def serves(self, reps: Sequence[Tensor] = ()) -> bool:
        """Whether the fused operation computes the loss stage (of these embeddings); see :func:`._serving.serves`."""
        if not isinstance(self.loss, MultipleNegativesRankingLoss):
            return serves(self, "its inner loss was replaced")
        # Stock accumulates the gradient of a learnable scale in the forward pass, whatever multiplies the loss later.
        return self.loss.serves(reps, {"scale": "learnable"} if learnable(self.scale) else None)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        sentence_features = list(sentence_features)
        fused = isinstance(self.loss, MultipleNegativesRankingLoss)
        with self.loss.ids_of(sentence_features) if fused else nullcontext():
            return super().forward(sentence_features, labels)

    def forward_cached(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        if self.on_stock_engine(self.scale):
            return stock.CachedMultipleNegativesRankingLoss.forward_cached(self, sentence_features, labels)
        return super().forward_cached(sentence_features, labels)

    def new_options(self) -> dict[str, Any]:
        return getattr(self.loss, "new_options", dict)() | self.cache_options().changed()

    def get_config_dict(self) -> dict[str, Any]:
        return plain_scale(super().get_config_dict()) | self.new_options()


with warnings.catch_warnings():
    # Subclassing a deprecated class warns, at a point where no user has asked for it yet.
    warnings.simplefilter("ignore", DeprecationWarning)

    @deprecated(StockSymmetric.__deprecated__)
    class CachedMultipleNegativesSymmetricRankingLoss(StockSymmetric, CachedMultipleNegativesRankingLoss):
        """Stock's CachedMultipleNegativesSymmetricRankingLoss with a fused loss stage and our gradient cache.

        Args:
            model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices, duplicates,
                show_progress_bar, packing, unique_rows, activation_budget: See
                :class:`CachedMultipleNegativesRankingLoss`.
        """

        def __init__(
            self,
            model: SentenceTransformer,
            scale: float | Tensor = 20.0,
            similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
            mini_batch_size: int = 32,
            mini_batch_num_tokens: int | None = None,
            gather_across_devices: bool = False,
            show_progress_bar: bool = False,
            *,
            duplicates: str = "keep",
            packing: str = "length",
            unique_rows: bool = False,
            activation_budget: int | str | None = None,
        ) -> None:
            super().__init__(
                model,
                scale,
                similarity_fct,
                mini_batch_size,
                mini_batch_num_tokens,
                gather_across_devices,
                show_progress_bar,
            )
            self.loss.duplicates = check_duplicates(duplicates)
            self._set_cache_options(packing, unique_rows, activation_budget)
