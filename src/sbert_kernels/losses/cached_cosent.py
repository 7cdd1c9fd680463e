"""CachedCoSENTLoss and CachedAnglELoss: CoSENTLoss and AnglELoss over this package's gradient cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, util
from torch import Tensor

from .._stock import CachedLossMixin
from ..gradcache.loss_stage import backward_to_embeddings
from ._gradient_cache import GradientCached, check_splits
from .cosent import AnglELoss, CoSENTLoss


class _CachedRanking(GradientCached, CachedLossMixin, CoSENTLoss):
    """Puts the gradient cache under a ranking loss; stands before that loss among the bases."""

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Returns the loss () of a batch; its backward pass encodes the batch once more.

        Args:
            sentence_features: The features of each column of texts.
            labels: The labels [B] or [B, 1], or None where the loss needs none.
        """
        return self.forward_cached(sentence_features, labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Returns the loss () of the whole batch from the embeddings of its mini-batches, as stock's Cached losses do.

        Args:
            reps: For each column, the embeddings [n, D] of each mini-batch.
            labels: The labels of the batch.
            with_backward: True leaves its gradient in ``.grad`` of every mini-batch, and detaches the loss from them.
                The loss still carries the gradient of a learnable scale.
        """
        from_embeddings: Callable[[list[Tensor], Any], Tensor] = self.compute_loss_from_embeddings
        loss = from_embeddings([torch.cat(column) for column in reps], labels)
        return backward_to_embeddings(loss, [part for column in reps for part in column]) if with_backward else loss

    def get_config_dict(self) -> dict[str, Any]:
        """Returns the configuration for the model card: that of the plain loss, and the options of the cache."""
        mini_batch = {
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }
        return super().get_config_dict() | mini_batch | self.cache_options().changed()


class CachedCoSENTLoss(_CachedRanking):
    """Is :class:`CoSENTLoss` over batches of any size, in the encoder memory of a mini-batch.

    The encoder runs over the batch twice, mini-batch by mini-batch (GradCache), so every pair of a large batch is
    compared with every other. Use it when the encoder's activations limit the batch. Values and gradients are those of
    CoSENTLoss over the whole batch. sentence-transformers has no such loss.

    Inputs:
        +------------------------+---------------------------------------------+
        | Texts                  | Labels                                      |
        +========================+=============================================+
        | (text_A, text_B) pairs | a number for each pair, larger for more     |
        |                        | similar texts                               |
        +------------------------+---------------------------------------------+

    Args:
        model, scale, similarity_fct, gather_across_devices: See :class:`CoSENTLoss`.
        mini_batch_size, mini_batch_num_tokens, show_progress_bar, packing, unique_rows, activation_budget: See
            :class:`CachedMultipleNegativesRankingLoss`, and :class:`~sbert_kernels.gradcache.options.Options` for
            more words.

    Raises:
        ValueError, TypeError: An option is not one of those there, or the model has a StaticEmbedding, which has no
            activations to save.

    Example:
        ::

            loss = losses.CachedCoSENTLoss(model, mini_batch_size=64)
            arguments = SentenceTransformerTrainingArguments("output", per_device_train_batch_size=2048)
            SentenceTransformerTrainer(model=model, args=arguments, train_dataset=scored_pairs, loss=loss).train()

    Source:
        Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv 2101.06983.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.pairwise_cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        *,
        gather_across_devices: bool = False,
        packing: str = "length",
        unique_rows: bool = False,
        activation_budget: int | str | None = None,
    ) -> None:
        check_splits(type(self).__name__, model, "take CoSENTLoss")
        super().__init__(model, scale, similarity_fct, gather_across_devices=gather_across_devices)
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar
        self._set_cache_options(packing, unique_rows, activation_budget)


class CachedAnglELoss(_CachedRanking, AnglELoss):
    """Is :class:`AnglELoss` over batches of any size, in the encoder memory of a mini-batch.

    The encoder runs over the batch twice, mini-batch by mini-batch (GradCache). Use it when the encoder's activations
    limit the batch. Values and gradients are those of AnglELoss over the whole batch. sentence-transformers has no such
    loss.

    Inputs:
        +-------------------------------------------------+-------------------------------------------+
        | Texts                                           | Labels                                    |
        +=================================================+===========================================+
        | (text_A, text_B) pairs                          | a number for each pair, larger for more   |
        |                                                 | similar texts                             |
        +-------------------------------------------------+-------------------------------------------+
        | (anchor, positive, negative_1, ..., negative_n) | none, or the positive's from 0 to 1       |
        +-------------------------------------------------+-------------------------------------------+

    Args:
        model, scale, gather_across_devices: See :class:`AnglELoss`.
        mini_batch_size, mini_batch_num_tokens, show_progress_bar, packing, unique_rows, activation_budget: See
            :class:`CachedCoSENTLoss`.

    Example:
        ::

            loss = losses.CachedAnglELoss(model, mini_batch_size=64)
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | Tensor = 20.0,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        *,
        gather_across_devices: bool = False,
        packing: str = "length",
        unique_rows: bool = False,
        activation_budget: int | str | None = None,
    ) -> None:
        check_splits(type(self).__name__, model, "take AnglELoss")
        super().__init__(model, scale, gather_across_devices=gather_across_devices)
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar
        self._set_cache_options(packing, unique_rows, activation_budget)
