"""CoSENTLoss and AnglELoss over a gradient cache: all pairs of a batch compared, in the memory of a mini-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor

from ..gradcache.stage import backward_to_embeddings
from ._cached import GradientCached, check_splits
from .cosent import AnglELoss, CoSENTLoss


class _Cached(GradientCached, CachedLossMixin):
    """The gradient cache around a ranking loss; a base before that loss."""

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return self.forward_cached(sentence_features, labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the whole batch from its mini-batches of embeddings.

        With ``with_backward``, every mini-batch has its gradient in ``.grad`` afterwards, and the loss returned is
        detached from all of them. It still carries the gradient of a learnable scale.
        """
        loss = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        return backward_to_embeddings(loss, [part for column in reps for part in column]) if with_backward else loss

    def get_config_dict(self) -> dict[str, Any]:
        mini_batch = {
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }
        return super().get_config_dict() | mini_batch | self.cache_options().changed()


class CachedCoSENTLoss(_Cached, CoSENTLoss):
    """:class:`CoSENTLoss` over a gradient cache (Gao et al. 2021, arXiv 2101.06983): a batch is embedded in
    mini-batches, twice, so that the number of pairs that are compared costs no memory of the encoder.

    Values and gradients are those of CoSENTLoss over the whole batch; its comparisons grow as the square of the pairs.

    Args:
        model, scale, similarity_fct, gather_across_devices: See :class:`CoSENTLoss`.
        mini_batch_size: Encode in the memory that so many rows of the longest text take.
        mini_batch_num_tokens: Encode so many tokens at once, instead.
        show_progress_bar: Whether to show a progress bar over both passes.
        packing: "length" puts rows of like length into a mini-batch; "none" takes them as they come, as stock does.
        unique_rows: Whether rows that are equal are encoded once.
        activation_budget: Bytes of activations that may be kept for the second pass, or "auto".

    The options of the cache are those of :class:`~sbert_kernels.gradcache.options.Options`, in more words there.

    Raises:
        ValueError: an option that cannot be, or a model with a StaticEmbedding, which has no activations to save.
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


class CachedAnglELoss(_Cached, AnglELoss):
    """:class:`AnglELoss` over a gradient cache, for pairs, triplets and n-tuples.

    Args:
        model, scale, mini_batch_size, mini_batch_num_tokens, show_progress_bar, gather_across_devices, packing,
            unique_rows, activation_budget: See :class:`CachedCoSENTLoss`.
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
