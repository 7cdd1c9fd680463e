"""The interface of an objective: its data, its losses, and its evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn

from sbert_kernels.demo.evaluation import Evaluation
from sbert_kernels.demo.options import DEFAULTS, Defaults, Options
from sbert_kernels.workloads.requirements import UserError
from sbert_kernels.workloads.texts import Pairs, Row


@dataclass(frozen=True)
class Data:
    """Holds the rows to train on, what judges the model, and what there is to say about both."""

    rows: Sequence[Row]
    evaluation: Evaluation
    lines: tuple[str, ...]  # for the terminal
    facts: dict[str, Any]  # for results.json


class Objective(ABC):
    """Describes one kind of training. Each process of the comparison builds its own, so it holds only the options."""

    comparison: str  # what the two sides are, for the terminal

    def __init__(self, options: Options) -> None:
        self.options = options

    @property
    def defaults(self) -> Defaults:
        """Returns the defaults of this loss and model."""
        return DEFAULTS[self.options.loss][self.options.model]

    @abstractmethod
    def prepare(self, pairs: Pairs) -> Data:
        """Holds some of the pairs out, and makes rows of the rest."""

    @abstractmethod
    def loss(self, model: SentenceTransformer, side: str) -> nn.Module:
        """Returns the loss of one of ``SIDES`` for the comparison."""

    def training_loss(self, model: SentenceTransformer) -> nn.Module:
        """Returns the loss of the training after the comparison."""
        return self.loss(model, "sbert-kernels")

    def require_rows(self, rows: int, pairs: Pairs) -> None:
        """Raises UserError if so many rows to train on do not fill a batch."""
        if self.options.batch_size > rows:
            raise UserError(
                f"argument --batch-size: got {self.options.batch_size}, wanted at most the {rows} pairs that "
                f"{pairs.source} leave for training"
            )
