"""AnglEObjective: cosine, in-batch and angle terms together, as AnglE trains them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Real
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from .. import settings
from .._stock import multiple_negatives_ranking as stock_module
from ..logs import log_once
from ..ops.pairwise import pairwise_similarity
from ..values import readable
from ._fused_or_stock import pairwise_similarity_of, why_not_embeddings
from .cosent import AnglELoss, CoSENTLoss, checked_labels, tuple_labels
from .multiple_negatives_ranking import MultipleNegativesRankingLoss
from .weighted import WeightedLoss

logger = logging.getLogger(__name__)


class AnglEObjective(WeightedLoss):
    """Trains with the whole objective of AnglE: a cosine, an in-batch and an angle term, weighted.

    "cosine" and "angle" put pairs into the order of their labels, as :class:`CoSENTLoss` and :class:`AnglELoss` do,
    from one read of the embeddings; "in_batch" is :class:`MultipleNegativesRankingLoss`. Use it for semantic textual
    similarity, with scored pairs or with hard negatives: the batch is encoded once for all three. sentence-transformers
    has no such loss; it takes three losses there, and encodes three times.

    Inputs:
        +-------------------------------------------------+---------------------------+----------------------+
        | Texts                                           | Labels                    | Terms                |
        +=================================================+===========================+======================+
        | (text_A, text_B) pairs                          | a score for each pair     | all                  |
        +-------------------------------------------------+---------------------------+----------------------+
        | (anchor, positive) pairs                        | none                      | in_batch only        |
        +-------------------------------------------------+---------------------------+----------------------+
        | (anchor, positive, negative_1, ..., negative_n) | none, or a score for each | all                  |
        |                                                 | anchor and its positive   |                      |
        +-------------------------------------------------+---------------------------+----------------------+

        With scored pairs, a row whose score is at least ``positive_threshold`` is an anchor of the in-batch term. The
        texts of the other rows are candidates only. Without any anchor the term is 0.

        With (anchor, positive) pairs there is no order to learn. The other two terms are 0, and one logged line says
        so.

        With negatives, a pair with the positive has the label 1 (or the score), and a pair with a negative 1 minus
        that. The negatives are candidates of the in-batch term.

    Args:
        model: The model.
        cosine_weight, ibn_weight, angle_weight: The weights of the terms: finite numbers, or ``nn.Parameter`` to learn
            them. A term of weight 0 is not computed.
        cosine_scale, ibn_scale, angle_scale: What multiplies the similarities in each term, 1 / temperature; each may
            be a 0-d ``nn.Parameter`` too. AnglE's code uses 20 for all three.
        positive_threshold: See above. None makes every row an anchor, as in MultipleNegativesRankingLoss.
        directions, duplicates: Options of the in-batch term; see :class:`MultipleNegativesRankingLoss`.
        gather_across_devices: True compares the rows of all ranks in all terms. The mean over the anchors is still that
            of each rank.
        mini_batch_size, mini_batch_num_tokens, show_progress_bar, packing, unique_rows, activation_budget: See
            :class:`WeightedLoss`.

    Raises:
        ValueError, TypeError: An option is not as above, or the weights are all 0.

    Recommendations:
        - Scores on another scale than 0 to 1 need another ``positive_threshold``; a first batch with larger scores is
          logged.
        - AnglE's own in-batch term takes the texts of both columns as rows, with all others as candidates. The nearest
          here is ``directions=("query_to_doc", "query_to_query")``, whose rows are the texts of the first column.

    What differs from AnglE's own code: the in-batch term is the mean over the anchors, not over all rows; a threshold
    decides which rows those are, not the integer part of the score; the weights count for every format of the data, and
    nothing is halved. In both, texts that are equal are positives.

    Example:
        ::

            loss = losses.AnglEObjective(model, cosine_weight=1.0, ibn_weight=1.0, angle_weight=1.0)
            SentenceTransformerTrainer(model=model, train_dataset=scored_pairs, loss=loss).train()

    Source:
        Li and Li 2023, AnglE-optimized Text Embeddings, arXiv 2309.12871.
    """

    _checked_threshold: bool = False

    def __init__(
        self,
        model: SentenceTransformer,
        cosine_weight: float | Tensor = 1.0,
        ibn_weight: float | Tensor = 1.0,
        angle_weight: float | Tensor = 1.0,
        cosine_scale: float | Tensor = 20.0,
        ibn_scale: float | Tensor = 20.0,
        angle_scale: float | Tensor = 20.0,
        *,
        positive_threshold: float | None = 0.5,
        directions: Sequence[str] = ("query_to_doc",),
        duplicates: str = "positive",
        gather_across_devices: bool = False,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        packing: str = "length",
        unique_rows: bool = False,
        activation_budget: int | str | None = None,
    ) -> None:
        in_batch = MultipleNegativesRankingLoss(
            model,
            scale=ibn_scale,
            directions=tuple(directions),
            gather_across_devices=gather_across_devices,
            duplicates=duplicates,
        )
        super().__init__(
            model,
            {
                "cosine": (
                    CoSENTLoss(model, cosine_scale, gather_across_devices=gather_across_devices),
                    cosine_weight,
                ),
                "in_batch": (in_batch, ibn_weight),
                "angle": (AnglELoss(model, angle_scale, gather_across_devices=gather_across_devices), angle_weight),
            },
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
            packing=packing,
            unique_rows=unique_rows,
            activation_budget=activation_budget,
        )
        if not any(self._active(name) for name in self.losses):
            raise ValueError("cosine_weight, ibn_weight and angle_weight are all 0: nothing is left to compute.")
        if positive_threshold is not None and not (
            isinstance(positive_threshold, Real) and math.isfinite(positive_threshold)
        ):
            raise ValueError(f"positive_threshold must be a finite number or None, got {positive_threshold!r}.")
        self.positive_threshold = positive_threshold

    @contextmanager
    def ids_of(self, sentence_features: Sequence[dict[str, Tensor]]) -> Iterator[None]:
        """Keeps the ids of a batch's texts for a block that computes its loss, if the in-batch term is computed."""
        with super().ids_of(sentence_features) if self._active("in_batch") else nullcontext():
            yield

    def components(self, embeddings: list[Tensor], labels: Tensor | None) -> dict[str, Tensor]:
        """Returns the terms by name, not weighted yet, without those that this batch has no data for.

        Args:
            embeddings: [B, D] for each column of texts.
            labels: [B] or [B, 1], or None.
        """
        if len(embeddings) < 2:
            raise ValueError(f"{type(self).__name__} compares at least 2 columns of texts, got {len(embeddings)}.")
        anchors, *columns = embeddings
        if labels is not None:
            labels = checked_labels(self, anchors, labels).to(anchors.device)
            self._check_threshold(labels)
        values = {}
        ranked = [name for name in ("cosine", "angle") if self._active(name)]
        if ranked and labels is None and len(columns) == 1:
            log_once(
                logger,
                f"{type(self).__name__}: (anchor, positive) pairs without scores have no order to learn, so only the "
                "in-batch term is computed.",
            )
        elif ranked:
            values = self._ranked(ranked, anchors, columns, labels)
        if self._active("in_batch"):
            is_anchor = None
            if labels is not None and self.positive_threshold is not None:
                is_anchor = (labels >= self.positive_threshold).to(torch.float32)
            in_batch: Any = self.losses["in_batch"]
            values["in_batch"] = in_batch.compute_loss(embeddings, labels, stock_module, weights=is_anchor)
        if not values:
            raise ValueError(
                f"{type(self).__name__} with ibn_weight=0 has nothing to compute for (anchor, positive) pairs without "
                "scores: give scores, negatives, or the in-batch term a weight."
            )
        return values

    def component_names(self) -> list[str]:
        """Returns the names of the terms whose weight is not the number 0."""
        return [name for name in self.losses if self._active(name)]

    def _ranked(
        self, names: list[str], anchors: Tensor, columns: list[Tensor], labels: Tensor | None
    ) -> dict[str, Tensor]:
        """Returns the terms "cosine" and "angle", as far as they are named.

        Args:
            names: The names.
            anchors: [B, D].
            columns: [B, D] each: the positives, then the negatives.
            labels: [B] of the pairs with the positives; None counts as 1.
        """
        losses: dict[str, Any] = {name: self.losses[name] for name in names}
        if labels is None:
            labels = torch.ones(len(anchors), device=anchors.device)
        if len(columns) > 1:
            labels = tuple_labels(labels, len(columns))
        found = [pairwise_similarity_of(loss.similarity_fct) for loss in losses.values()]
        similarities = [similarity for similarity in found if similarity is not None]
        together = len(set(similarities)) == len(losses)
        if not together or settings.get("disable") or why_not_embeddings([anchors, *columns]):
            pairs = [torch.cat([anchors] * len(columns)), torch.cat(columns)]
            return {name: loss.compute_loss_from_embeddings(pairs, labels) for name, loss in losses.items()}
        scores = pairwise_similarity(anchors, columns, similarities)
        return {
            name: loss.rank_scores(of_loss, labels)
            for (name, loss), of_loss in zip(losses.items(), scores, strict=True)
        }

    def _check_threshold(self, labels: Tensor) -> None:
        """Logs once if scores are above 1, which is not the scale that the threshold is meant for."""
        threshold = self.positive_threshold
        if self._checked_threshold or threshold is None or threshold > 1 or not self._active("in_batch"):
            return
        # A compiler and a dry run hand in tensors that hold no values.
        if not readable(labels) or not labels.numel():
            return
        highest, anchors = float(labels.max()), int((labels >= threshold).sum())
        # Reading them waits for a GPU, so there only the first batch is looked at.
        self._checked_threshold = highest > 1 or labels.device.type != "cpu"
        if highest > 1:
            log_once(
                logger,
                f"{type(self).__name__}: scores go up to {highest:g}, and positive_threshold={threshold:g} makes "
                f"{anchors} of {labels.numel()} rows of this batch anchors, whose pairs count as paraphrases in the "
                "in-batch term: give a threshold on the scale of the scores.",
            )

    def _active(self, name: str) -> bool:
        """Returns True unless the weight of the term is the number 0."""
        weight = self.weights[name]
        return isinstance(weight, Tensor) or weight != 0

    def get_config_dict(self) -> dict[str, Any]:
        """Returns the configuration for the model card."""
        return super().get_config_dict() | {"positive_threshold": self.positive_threshold}
