"""AnglE's objective: the model's cosines learn the order of graded pairs, and rank correlation judges it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from sbert_kernels.demo.data import split_pairs
from sbert_kernels.demo.evaluation import Correlation
from sbert_kernels.demo.grading import TEACHER, graded_rows
from sbert_kernels.demo.objectives.base import Data, Objective
from sbert_kernels.workloads.models import dim_of
from sbert_kernels.workloads.recipes import SIDES
from sbert_kernels.workloads.requirements import UserError
from sbert_kernels.workloads.texts import Pairs, ScoredPair

# What the three stock losses compute: every row is an anchor, and equal texts stay negatives of each other.
AS_STOCK = {"positive_threshold": None, "duplicates": "keep"}


class AngleObjective(Objective):
    """Trains with AnglEObjective, beside what a user of stock writes for it; on scores of the user or of a teacher."""

    comparison = (
        "stock's CoSENTLoss, MultipleNegativesRankingLoss and AnglELoss one after the other (three encodings of a "
        'batch) and with AnglEObjective(positive_threshold=None, duplicates="keep"), which computes the same from one'
    )

    def prepare(self, pairs: Pairs) -> Data:
        """Returns scored rows: with the scores of the data, or with those of a teacher."""
        return self._graded(pairs) if pairs.scores is None else self._scored(pairs, pairs.scores)

    def _graded(self, pairs: Pairs) -> Data:
        split = split_pairs(pairs.pairs, self.options.seed, self.defaults.held_out, 0)
        train = split.train[: self.defaults.graded]
        self.require_rows(3 * len(train), pairs)
        rows, held_out, means = graded_rows(train, split.queries, self.options.seed)
        graded = ", ".join(f"{kind} {mean:.2f}" for kind, mean in means.items())
        lines = (
            f"{len(train) + len(split.queries):,} of them, each query with its own text, the nearest other text and a "
            f"random one; their score is the cosine of {TEACHER}, on average: {graded}",
        )
        return self._data(rows, held_out, lines, {"scores": TEACHER, "mean_scores": means})

    def _scored(self, pairs: Pairs, scores: list[float]) -> Data:
        low, high = min(scores), max(scores)
        if low == high:
            raise UserError(f"argument --columns: all scores of {pairs.source} are {low:g}, wanted different ones")
        lines: tuple[str, ...] = ()
        if low < 0 or high > 1:
            # The threshold of the in-batch term is a half; orders and correlations do not change.
            scores = [(score - low) / (high - low) for score in scores]
            lines = (f"scores from {low:g} to {high:g}, stretched to 0 to 1",)
        rows = [(*pair, score) for pair, score in zip(pairs.pairs, scores, strict=True)]
        split = split_pairs(rows, self.options.seed, self.defaults.held_out, 0)
        self.require_rows(len(split.train), pairs)
        return self._data(split.train, split.queries, lines, {"scores": "of the data", "range": [low, high]})

    def _data(
        self, rows: list[ScoredPair], held_out: list[ScoredPair], lines: tuple[str, ...], facts: dict[str, Any]
    ) -> Data:
        if len({score for *_, score in held_out}) == 1:
            raise UserError(
                f"all {len(held_out)} held-out pairs have the same score, which no order can be compared with: wanted "
                "more data, or other scores"
            )
        lines += (f"{len(rows):,} scored pairs to train on, {len(held_out):,} held out",)
        return Data(rows, Correlation(held_out), lines, facts | {"train": len(rows), "held_out": len(held_out)})

    def loss(self, model: SentenceTransformer, side: str) -> nn.Module:
        """Returns the loss of one of ``SIDES``, with the options that make both compute the same."""
        losses = importlib.import_module(SIDES[side])
        if side == "sbert-kernels":
            return self._within_matryoshka(model, losses, losses.AnglEObjective(model, **AS_STOCK))
        terms = {
            "cosine": losses.CoSENTLoss(model),
            "in_batch": losses.MultipleNegativesRankingLoss(model),
            "angle": losses.AnglELoss(model),
        }
        return OneAfterTheOther({name: self._within_matryoshka(model, losses, term) for name, term in terms.items()})

    def training_loss(self, model: SentenceTransformer) -> nn.Module:
        """Returns AnglEObjective with its own defaults."""
        losses = importlib.import_module(SIDES["sbert-kernels"])
        return self._within_matryoshka(model, losses, losses.AnglEObjective(model))

    def _within_matryoshka(self, model: SentenceTransformer, losses: Any, loss: nn.Module) -> nn.Module:
        dims = self.options.trained_dims(dim_of(model))
        return losses.MatryoshkaLoss(model, loss, list(dims)) if dims else loss


class OneAfterTheOther(nn.Module):
    """Runs losses that each encode the batch for themselves; the Trainer sums and logs them."""

    def __init__(self, losses: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> dict[str, Tensor]:
        """Returns the value of each loss by its name."""
        columns = list(sentence_features)
        # A model writes its outputs into the features: each loss gets its own.
        return {name: loss([dict(column) for column in columns], labels) for name, loss in self.losses.items()}
