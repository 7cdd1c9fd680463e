"""AnglEObjective: cosine, in-batch and angle terms together, as AnglE trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import multiple_negatives_ranking as stock
from torch import Tensor

from .. import settings
from ..logs import log_once
from ..ops.pairwise import pairwise_similarity
from ..values import readable
from ._serving import pairwise_similarity_of, unsupported_embeddings
from .cosent import AnglELoss, CoSENTLoss, checked_labels, tuple_labels
from .multiple_negatives_ranking import MultipleNegativesRankingLoss
from .weighted import WeightedLoss

logger = logging.getLogger(__name__)


class AnglEObjective(WeightedLoss):
    """The objective of AnglE (Li and Li 2023, arXiv 2309.12871): cosine, in-batch and angle terms, weighted.

    "cosine" and "angle" rank pairs by their scores, as :class:`CoSENTLoss` and :class:`AnglELoss` do, from one read of
    the embeddings; "in_batch" is :class:`MultipleNegativesRankingLoss`. By the columns of the data:

    * (a, b) with scores: all three terms. The rows whose score is at least ``positive_threshold`` are the anchors of
      the in-batch term, which is 0 if there is none; the texts of the other rows are candidates only.
    * (anchor, positive): the in-batch term only, which is logged once; there is no order to learn, and the other two
      are 0.
    * (anchor, positive, negatives...): all three terms. A pair with the positive has the label 1 (or the row's score,
      if there is one), a pair with a negative 1 minus that; the negatives are candidates of the in-batch term.

    What differs from AnglE's own code: the in-batch term is the mean over the rows that are anchors, not over all; a
    threshold says which, not the integer part of the score; the weights count in every format, and nothing is halved.
    Texts that are equal are positives, there and here. Its in-batch term takes each text of both columns as a row, and
    ranks all others for it; here the rows are those of the first column, and ``directions=("query_to_doc",
    "query_to_query")`` gives them these candidates.

    Args:
        model: The model.
        cosine_weight, ibn_weight, angle_weight: A finite number, or a learnable ``nn.Parameter``. The number 0 skips
            the term.
        cosine_scale, ibn_scale, angle_scale: Inverse temperatures; each may be a 0-d ``nn.Parameter``, too. AnglE's
            code uses 20 for all three.
        positive_threshold: See above; None makes every row an anchor, as MultipleNegativesRankingLoss does.
        directions, duplicates: Of the in-batch term, see :class:`MultipleNegativesRankingLoss`.
        gather_across_devices: All terms compare the rows of all ranks. The mean over anchors is each rank's own.
        mini_batch_size, mini_batch_num_tokens, show_progress_bar, packing, unique_rows, activation_budget: See
            :class:`WeightedLoss`.
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

    def ids_of(self, sentence_features: Sequence[dict[str, Tensor]]) -> AbstractContextManager[None]:
        return super().ids_of(sentence_features) if self._active("in_batch") else nullcontext()

    def components(self, embeddings: list[Tensor], labels: Tensor | None) -> dict[str, Tensor]:
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
            values["in_batch"] = self.losses["in_batch"].compute_loss(embeddings, labels, stock, weights=is_anchor)
        if not values:
            raise ValueError(
                f"{type(self).__name__} with ibn_weight=0 has nothing to compute for (anchor, positive) pairs without "
                "scores: give scores, negatives, or the in-batch term a weight."
            )
        return values

    def component_names(self) -> list[str]:
        return [name for name in self.losses if self._active(name)]

    def _ranked(
        self, names: list[str], anchors: Tensor, columns: list[Tensor], labels: Tensor | None
    ) -> dict[str, Tensor]:
        """The named terms, which order the pairs of each anchor with its row of each column by their labels."""
        losses = {name: self.losses[name] for name in names}
        if labels is None:
            labels = torch.ones(len(anchors), device=anchors.device)
        if len(columns) > 1:
            labels = tuple_labels(labels, len(columns))
        similarities = [pairwise_similarity_of(loss.similarity_fct) for loss in losses.values()]
        together = None not in similarities and len(set(similarities)) == len(similarities)
        if not together or settings.get("disable") or unsupported_embeddings([anchors, *columns]):
            pairs = [torch.cat([anchors] * len(columns)), torch.cat(columns)]
            return {name: loss.compute_loss_from_embeddings(pairs, labels) for name, loss in losses.items()}
        scores = pairwise_similarity(anchors, columns, similarities)
        return {name: loss.rank_scores(own, labels) for (name, loss), own in zip(losses.items(), scores, strict=True)}

    def _check_threshold(self, labels: Tensor) -> None:
        """Say so once if the scores cannot be on the scale of the threshold, which is meant for scores of 0 to 1."""
        threshold = self.positive_threshold
        if self._checked_threshold or threshold is None or threshold > 1 or not self._active("in_batch"):
            return
        # Not of tensors that have no values, as a compiler and a dry run hand them in.
        if not readable(labels) or not labels.numel():
            return
        highest, anchors = float(labels.max()), int((labels >= threshold).sum())
        # On a device reading them waits for it, so only those of the first batch are.
        self._checked_threshold = highest > 1 or labels.device.type != "cpu"
        if highest > 1:
            log_once(
                logger,
                f"{type(self).__name__}: scores go up to {highest:g}, and positive_threshold={threshold:g} makes "
                f"{anchors} of {labels.numel()} rows of this batch anchors, whose pairs count as paraphrases in the "
                "in-batch term: give a threshold on the scale of the scores.",
            )

    def _active(self, name: str) -> bool:
        weight = self.weights[name]
        return isinstance(weight, Tensor) or weight != 0

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {"positive_threshold": self.positive_threshold}
