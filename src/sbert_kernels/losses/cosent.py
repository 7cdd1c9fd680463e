"""CoSENTLoss and AnglELoss on the fused ranking operation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer.losses import AnglELoss as StockAnglELoss
from sentence_transformers.sentence_transformer.losses import CoSENTLoss as StockCoSENTLoss
from torch import Tensor

from .._stock import widened
from ..logs import described, log_once
from ..ops.pairwise import pairwise_similarity
from ..ops.ranking import ranking_loss
from ._drop_in import DropIn
from ._fused_or_stock import pairwise_similarity_of, serves, why_not_embeddings
from ._scale import as_scale, check_scale, plain_scale

logger = logging.getLogger(__name__)


class CoSENTLoss(DropIn, StockCoSENTLoss):
    """Trains the similarities of pairs of texts to have the order of their labels.

    ``loss = log(1 + sum(exp(scale * (s_i - s_j))))`` over all pairs i, j of the batch with ``label_i < label_j``, where
    s is the similarity of the two texts of a pair. Use it for data with graded similarity (semantic textual similarity,
    scores of a cross-encoder): only the order of the labels counts, not their scale.

    Values and gradients are those of stock's class to rounding, from one read of the embeddings, in O(B log B) time.
    New are ``gather_across_devices`` and a ``scale`` that is learned.

    Inputs:
        +------------------------+---------------------------------------------+
        | Texts                  | Labels                                      |
        +========================+=============================================+
        | (text_A, text_B) pairs | a number for each pair, larger for more     |
        |                        | similar texts                               |
        +------------------------+---------------------------------------------+

    Args:
        model: The model.
        scale: Multiplies the similarities; it is 1 / temperature. A 0-d ``nn.Parameter`` is learned.
        similarity_fct: ``pairwise_cos_sim``, ``pairwise_dot_score`` or ``pairwise_angle_sim``. Any other function
            computes the similarities itself, and one logged line says so; the ranking is fused all the same.
        gather_across_devices: True ranks the pairs of all ranks together. Only their similarities and labels travel;
            see :func:`sbert_kernels.ranking_loss`.

    Raises:
        ValueError, TypeError: The scale is not one number, or the labels do not go with the pairs.

    Recommendations:
        - Use it where you would use ``CosineSimilarityLoss``: it usually gives a stronger signal.
        - Use batches in which labels differ: pairs with equal labels are not compared.
        - If the encoder's memory limits the batch, use :class:`CachedCoSENTLoss`.

    Example:
        ::

            model = SentenceTransformer("microsoft/mpnet-base")
            train_dataset = Dataset.from_dict({
                "sentence1": ["It's nice weather outside today.", "He drove to work."],
                "sentence2": ["It's so sunny.", "She walked to the store."],
                "score": [1.0, 0.3],
            })
            loss = losses.CoSENTLoss(model)
            SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss).train()

    Source:
        Huang et al. 2024, CoSENT: Consistent Sentence Embedding via Similarity Ranking, IEEE/ACM TASLP,
        doi 10.1109/TASLP.2024.3402087.
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
        """Returns the loss () of two columns of embeddings [B, D] and their labels [B] or [B, 1]."""
        if not serves(self, None, self.new_options()):
            return super().compute_loss_from_embeddings(embeddings, labels)
        if len(embeddings) > 2:
            log_once(logger, f"{type(self).__name__} compares the first 2 columns of {len(embeddings)}, as stock does.")
        return self.rank(embeddings[0], [embeddings[1]], checked_labels(self, embeddings[0], labels))

    def rank(self, x: Tensor, columns: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Returns the loss () of the pairs of each row of ``x`` with its row of each column.

        Args:
            x: [B, D].
            columns: [B, D] each.
            labels: [columns * B], those of the first column first.
        """
        return self.rank_scores(self.scores(x, columns), labels)

    def rank_scores(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss () of similarities [B] and their labels [B]."""
        if labels.shape != scores.shape:
            raise ValueError(f"Labels and scores must have the same shape, got {labels.shape} and {scores.shape}.")
        return ranking_loss(
            scores,
            labels.to(scores.device),
            scale=as_scale(self.scale),
            gather_across_devices=self.gather_across_devices,
        )

    def scores(self, x: Tensor, columns: Sequence[Tensor]) -> Tensor:
        """Returns the similarities [columns * B] of each row of ``x`` [B, D] with its row of each column [B, D]."""
        similarity = pairwise_similarity_of(self.similarity_fct)
        why_not = why_not_embeddings([x, *columns])
        if similarity is not None and why_not is None:
            return pairwise_similarity(x, columns, (similarity,))[0]
        if similarity is None:
            why_not = f"similarity_fct={util.similarity_fct_name(self.similarity_fct)} is not known"
        log_once(logger, f"{type(self).__name__} ranks scores that it does not compute itself: {why_not}.")
        return torch.cat([self.similarity_fct(x, y) for y in columns])

    def new_options(self) -> dict[str, Any]:
        """Returns the options that are set and that stock does not have, by name."""
        return {"gather_across_devices": True} if self.gather_across_devices else {}

    def get_config_dict(self) -> dict[str, Any]:
        """Returns the configuration for the model card: stock's, and the options that stock does not have."""
        return plain_scale(super().get_config_dict()) | self.new_options()


class AnglELoss(StockAnglELoss, CoSENTLoss):
    """Trains the angles of pairs of texts, in the complex plane, to have the order of their labels.

    It is :class:`CoSENTLoss` with ``pairwise_angle_sim`` as the similarity: the halves of an embedding are the real and
    imaginary parts of complex numbers, and the angle between two texts is that of their quotient. The gradient of a
    cosine vanishes where texts are very similar or very different; that of an angle does not. Use it as CoSENTLoss, or
    beside it: :class:`AnglEObjective` trains both, as the paper does.

    Inputs:
        +-------------------------------------------------+-------------------------------------------+
        | Texts                                           | Labels                                    |
        +=================================================+===========================================+
        | (text_A, text_B) pairs                          | a number for each pair, larger for more   |
        |                                                 | similar texts                             |
        +-------------------------------------------------+-------------------------------------------+
        | (anchor, positive, negative_1, ..., negative_n) | none: 1 for the positive, 0 for a         |
        |                                                 | negative; or the positive's label from 0  |
        |                                                 | to 1, and 1 minus that for a negative     |
        +-------------------------------------------------+-------------------------------------------+

    Args:
        model: The model. Its embeddings must have an even dimension.
        scale, gather_across_devices: See :class:`CoSENTLoss`.

    Example:
        ::

            loss = losses.AnglELoss(model)
            SentenceTransformerTrainer(model=model, train_dataset=scored_pairs, loss=loss).train()

    Source:
        Li and Li 2023, AnglE-optimized Text Embeddings, arXiv 2309.12871.
    """

    def __init__(
        self, model: SentenceTransformer, scale: float | Tensor = 20.0, *, gather_across_devices: bool = False
    ) -> None:
        super().__init__(model, widened(scale))
        self.gather_across_devices = gather_across_devices

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Returns the loss () of embeddings [B, D] of each column, and labels [B] or [B, 1] or None."""
        if len(embeddings) <= 2 or not serves(self, None, self.new_options()):
            return super().compute_loss_from_embeddings(embeddings, widened(labels))
        anchors, *columns = embeddings
        if labels is None:
            labels = torch.ones(len(anchors), device=anchors.device)
        return self.rank(anchors, columns, tuple_labels(checked_labels(self, anchors, labels), len(columns)))


def tuple_labels(labels: Tensor, columns: int) -> Tensor:
    """Returns the labels of anchors with their positives, and behind them those with the negatives.

    Args:
        labels: [B], those with the positives. With a negative it is 1 minus that.
        columns: The number of columns besides the anchors.

    Returns:
        [columns * B].
    """
    if labels.dtype == torch.bool:
        labels = labels.int()
    return torch.cat([labels, (1 - labels).repeat(columns - 1)])


def checked_labels(loss: Any, x: Tensor, labels: Tensor | None) -> Tensor:
    """Returns labels as a vector [B], after a check that there is one for each row of ``x`` [B, D].

    Raises:
        TypeError, ValueError: They are missing, no tensor, or not as many.
    """
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
