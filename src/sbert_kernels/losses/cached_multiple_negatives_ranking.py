"""CachedMultipleNegativesRankingLoss and its symmetric form: this package's gradient cache, and a fused loss stage.

The loss stage, between the two passes over the encoder, is one call of the contrastive operation for the whole batch:
it needs no chunks to bound its memory, and gathers across devices once instead of once a chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss as StockLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesSymmetricRankingLoss as StockSymmetric,
)
from sentence_transformers.util import cos_sim
from torch import Tensor
from typing_extensions import deprecated

from .._stock import cached_multiple_negatives_ranking as stock_module
from .._stock import delegated_options, deprecation_of, widened
from ..gradcache.loss_stage import backward_to_embeddings
from ._drop_in import DropIn
from ._fused_or_stock import serves
from ._gradient_cache import GradientCached
from ._prefixes import WHOLE, Prefixes
from ._scale import learnable, plain_scale
from .multiple_negatives_ranking import MultipleNegativesRankingLoss, check_duplicates


class CachedMultipleNegativesRankingLoss(GradientCached, DropIn, StockLoss):
    """Is :class:`MultipleNegativesRankingLoss` over batches of any size, in the encoder memory of a mini-batch.

    The encoder runs over the batch twice, mini-batch by mini-batch (GradCache): once for the embeddings of the whole
    batch, whose loss is then computed, and once to propagate its gradients. Use it when more in-batch negatives would
    help and the encoder's activations do not fit: batches of thousands of rows train on one GPU or on a CPU. It costs a
    second forward pass. Values and gradients are those of the plain loss over the whole batch.

    Rows of like length share a mini-batch, which saves padding; the loss stage needs no mini-batches. The engine is
    described in :mod:`sbert_kernels.gradcache`.

    Inputs:
        +-------------------------------------------------+--------+
        | Texts                                           | Labels |
        +=================================================+========+
        | (anchor, positive) pairs                        | none   |
        +-------------------------------------------------+--------+
        | (anchor, positive, negative) triplets           | none   |
        +-------------------------------------------------+--------+
        | (anchor, positive, negative_1, ..., negative_n) | none   |
        +-------------------------------------------------+--------+

    Args:
        model: The model.
        scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode, hardness_strength,
            duplicates: See :class:`MultipleNegativesRankingLoss`.
        mini_batch_size: A mini-batch takes no more memory than so many rows as long as the longest text. Does not
            change the loss: choose the largest that fits.
        mini_batch_num_tokens: The most tokens of a mini-batch, instead.
        show_progress_bar: True shows a progress bar over both passes.
        packing: "length" puts rows of like length into a mini-batch; "none" takes them as they come, as stock does.
        unique_rows: True encodes rows that are equal only once.
        activation_budget: Bytes of activations that may be kept for the second pass, or "auto" on a GPU: what is kept
            is not encoded twice.

    All options of the cache are explained in :class:`~sbert_kernels.gradcache.options.Options`.

    Raises:
        ValueError, TypeError: An option is not one of those above, or the model has a StaticEmbedding, which has no
            activations to save.

    Recommendations:
        - Use a large batch (``per_device_train_batch_size`` of 512 to 65536): that is what this loss is for.
        - A model with dropout or BatchNorm: see ``packing`` in the options of the cache.

    Example:
        ::

            model = SentenceTransformer("microsoft/mpnet-base")
            loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)
            arguments = SentenceTransformerTrainingArguments("output", per_device_train_batch_size=4096)
            SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss).train()

    Source:
        Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv 2101.06983.
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
        # Every option of the loss itself belongs to the inner loss, which checks it.
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

    # Stock reads this to assign such an attribute to the inner loss.
    _delegated_to_wrapped_loss: Any = (*delegated_options(StockLoss), "duplicates")

    @property
    def duplicates(self) -> str:
        """Returns the option ``duplicates`` of the inner loss; an assignment is passed on to it."""
        return getattr(self.loss, "duplicates", "keep")

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
        prefixes: Prefixes = WHOLE,
    ) -> Tensor:
        """Returns the loss () of the whole batch from the embeddings of its mini-batches. Stock has this method too.

        Args:
            reps: For each column, the embeddings [n, D] of each mini-batch.
            labels: Not used.
            with_backward: True leaves its gradient in ``.grad`` of every mini-batch, and detaches the loss from them.
                The loss still carries the gradient of a learnable scale, so that what multiplies the loss later (a
                weight, a gradient scaler) reaches the scale as well.
            prefixes: The prefixes to compute the loss of, from a MatryoshkaLoss.
        """
        parts = [part for column in reps for part in column]
        inner = self.loss
        by_stock = len(reps) < 2 or (prefixes is WHOLE and not self.serves(parts))
        if by_stock or not isinstance(inner, MultipleNegativesRankingLoss):
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = inner.compute_loss([torch.cat(column) for column in reps], labels, stock_module, prefixes)
        return backward_to_embeddings(loss, parts) if with_backward else loss

    def serves(self, reps: Sequence[Tensor] = ()) -> bool:
        """Returns True if the fused operation computes the loss of these embeddings; see ``_fused_or_stock.serves``."""
        if not isinstance(self.loss, MultipleNegativesRankingLoss):
            return serves(self, "its inner loss was replaced")
        # Stock's own gradient of a learnable scale would miss what multiplies the loss after the forward pass.
        return self.loss.serves(reps, {"scale": "learnable"} if learnable(self.scale) else None)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Returns the loss () of a batch; its backward pass encodes the batch once more.

        Args:
            sentence_features: The features of each column: anchors, positives, negatives.
            labels: Not used.
        """
        sentence_features = list(sentence_features)
        inner = self.loss
        with inner.ids_of(sentence_features) if isinstance(inner, MultipleNegativesRankingLoss) else nullcontext():
            return super().forward(sentence_features, widened(labels))

    def forward_cached(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Returns the loss () of a batch through the gradient cache. Stock has this method too."""
        if self.on_stock_engine(self.scale):
            return StockLoss.forward_cached(self, sentence_features, labels)
        return super().forward_cached(sentence_features, labels)

    def new_options(self) -> dict[str, Any]:
        """Returns the options that are set and that stock does not have, by name."""
        inner = self.loss
        of_loss = inner.new_options() if isinstance(inner, DropIn) else {}
        return of_loss | self.cache_options().changed()

    def get_config_dict(self) -> dict[str, Any]:
        """Returns the configuration for the model card: stock's, and the options that stock does not have."""
        return plain_scale(super().get_config_dict()) | self.new_options()


with warnings.catch_warnings():
    # A deprecated class warns when it is subclassed, which no user has done here.
    warnings.simplefilter("ignore", DeprecationWarning)

    @deprecated(deprecation_of(StockSymmetric))
    class CachedMultipleNegativesSymmetricRankingLoss(StockSymmetric, CachedMultipleNegativesRankingLoss):
        """Is :class:`MultipleNegativesSymmetricRankingLoss` in the encoder memory of a mini-batch.

        It is :class:`CachedMultipleNegativesRankingLoss` with ``directions=("query_to_doc", "doc_to_query")`` and
        ``partition_mode="per_direction"``, and deprecated in favour of it. Use it only in scripts that have it already.

        Inputs:
            +-------------------------------------------------+--------+
            | Texts                                           | Labels |
            +=================================================+========+
            | (anchor, positive) pairs                        | none   |
            +-------------------------------------------------+--------+
            | (anchor, positive, negative_1, ..., negative_n) | none   |
            +-------------------------------------------------+--------+

        Args:
            model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices, duplicates,
                show_progress_bar, packing, unique_rows, activation_budget: See
                :class:`CachedMultipleNegativesRankingLoss`.

        Example:
            ::

                loss = losses.CachedMultipleNegativesRankingLoss(
                    model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
                )  # instead of losses.CachedMultipleNegativesSymmetricRankingLoss(model)
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
                widened(scale),
                similarity_fct,
                mini_batch_size,
                mini_batch_num_tokens,
                gather_across_devices,
                show_progress_bar,
            )
            assert isinstance(self.loss, MultipleNegativesRankingLoss)  # as __init__ has made it
            self.loss.duplicates = check_duplicates(duplicates)
            self._set_cache_options(packing, unique_rows, activation_budget)
