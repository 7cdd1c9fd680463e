"""CoSENTLoss and AnglELoss on the fused ranking operation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer.losses import angle, cosent
from torch import Tensor

from ..logs import described, log_once
from ..ops.pairwise import pairwise_similarity
from ..ops.ranking import ranking_loss
from ._drop_in import DropIn
from ._scale import as_scale, check_scale, plain_scale
from ._serving import pairwise_similarity_of, serves, unsupported_embeddings

logger = logging.getLogger(__name__)


class CoSENTLoss(DropIn, cosent.CoSENTLoss):
    """Stock's CoSENTLoss, from one read of the embeddings.

    Values and gradients are stock's to rounding. New are ``gather_across_devices`` and a ``scale`` that is learned.

    Args:
        model: The model, which embeds pairs of texts; the labels say how similar they are.
        scale: Multiplies the similarities: the inverse temperature. An ``nn.Parameter`` is learned.
        similarity_fct: Of the two texts of a pair: ``pairwise_cos_sim``, ``pairwise_dot_score`` or
            ``pairwise_angle_sim``. Any other computes the scores itself, which is logged once; the ranking is ours.
        gather_across_devices: Whether the pairs of all ranks are ranked together; only their scores and labels travel,
            see :func:`sbert_kernels.ranking_loss`.
    """

    gather_across_devices: bool = False

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.pairwise_cos_sim,
        *,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, scale=check_scale(scale), similarity_fct=similarity_fct)
        self.gather_across_devices = gather_across_devices

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of two columns of embeddings [B, D] and their labels [B] or [B, 1]."""
        if not serves(self, None, self.new_options()):
            return super().compute_loss_from_embeddings(embeddings, labels)
        if len(embeddings) > 2:
            log_once(logger, f"{type(self).__name__} compares the first 2 columns of {len(embeddings)}, as stock does.")
        return self.rank(embeddings[0], [embeddings[1]], checked_labels(self, embeddings[0], labels))

    def rank(self, x: Tensor, columns: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss of the pairs of ``x`` with each of the columns, [B, D] each; labels [columns * B]."""
        return self.rank_scores(self.scores(x, columns), labels)

    def rank_scores(self, scores: Tensor, labels: Tensor) -> Tensor:
        if labels.shape != scores.shape:
            raise ValueError(f"Labels and scores must have the same shape, got {labels.shape} and {scores.shape}.")
        return ranking_loss(
            scores,
            labels.to(scores.device),
            scale=as_scale(self.scale),
            gather_across_devices=self.gather_across_devices,
        )

    def scores(self, x: Tensor, columns: Sequence[Tensor]) -> Tensor:
        similarity = pairwise_similarity_of(self.similarity_fct)
        unsupported = unsupported_embeddings([x, *columns])
        if similarity is None:
            unsupported = f"similarity_fct={util.similarity_fct_name(self.similarity_fct)} is not known"
        if unsupported is None:
            return pairwise_similarity(x, columns, (similarity,))[0]
        log_once(logger, f"{type(self).__name__} ranks scores that it does not compute itself: {unsupported}.")
        return torch.cat([self.similarity_fct(x, y) for y in columns])

    def new_options(self) -> dict[str, Any]:
        return {"gather_across_devices": True} if self.gather_across_devices else {}

    def get_config_dict(self) -> dict[str, Any]:
        return plain_scale(super().get_config_dict()) | self.new_options()


class AnglELoss(angle.AnglELoss, CoSENTLoss):
    """Stock's AnglELoss, as :class:`CoSENTLoss` computes it; the pairs of an n-tuple share one read of its anchor.

    Args:
        model: The model, which embeds pairs of texts with labels, or (anchor, positive, negatives...) tuples.
        scale, gather_across_devices: See :class:`CoSENTLoss`.
    """

    def __init__(
        self, model: SentenceTransformer, scale: float | Tensor = 20.0, *, gather_across_devices: bool = False
    ) -> None:
        super().__init__(model, scale)
        self.gather_across_devices = gather_across_devices

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """The loss of two columns of embeddings [B, D] and their labels, or of anchors, positives and negatives."""
        if len(embeddings) <= 2 or not serves(self, None, self.new_options()):
            return super().compute_loss_from_embeddings(embeddings, labels)
        anchors, *columns = embeddings
        if labels is None:
            labels = torch.ones(len(anchors), device=anchors.device)
        return self.rank(anchors, columns, tuple_labels(checked_labels(self, anchors, labels), len(columns)))


def tuple_labels(labels: Tensor, columns: int) -> Tensor:
    """Labels [columns * B] of anchors with their positives, ``labels``, then with each negative, 1 - ``labels``."""
    if labels.dtype == torch.bool:
        labels = labels.int()
    return torch.cat([labels, (1 - labels).repeat(columns - 1)])


def checked_labels(loss: Any, x: Tensor, labels: Tensor | None) -> Tensor:
    """Labels as a vector, one for each row of ``x``."""
    if labels is None:
        raise ValueError(f"{type(loss).__name__} requires labels for datasets with pairs.")
    if not isinstance(labels, Tensor):
        raise TypeError(f"{type(loss).__name__} expects labels as a tensor, got {described(labels)}.")
    if labels.numel() != len(x):
        raise ValueError(
            f"{type(loss).__name__} expects {len(x)} labels (one per example), but got {labels.numel()} labels with "
            f"shape {tuple(labels.shape)}."
        )
    return labels.reshape(-1)
