"""What the rest of the demo asks of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn

from sbert_kernels.demo.data import Pairs, Row
from sbert_kernels.demo.evaluation import Evaluation
from sbert_kernels.demo.options import DEFAULTS, Defaults, DemoError, Options

# The same class names and constructors in both modules: to change the import is all it takes.
SIDES = {"stock": "sentence_transformers.sentence_transformer.losses", "sbert-kernels": "sbert_kernels.losses"}


@dataclass(frozen=True)
class Data:
    """The rows to train on, what judges the model, and what there is to say about both."""

    rows: list[Row]
    evaluation: Evaluation
    lines: tuple[str, ...]  # for the terminal
    facts: dict[str, Any]  # for results.json


class Objective(ABC):
    """One kind of training. Built anew in each process of the comparison, so that it holds nothing but the options."""

    comparison: str  # what the two sides are, for the terminal

    def __init__(self, options: Options) -> None:
        self.options = options

    @property
    def defaults(self) -> Defaults:
        return DEFAULTS[self.options.objective][self.options.model]

    @abstractmethod
    def prepare(self, pairs: Pairs) -> Data:
        """Hold some of the pairs out, and make rows of the rest."""

    @abstractmethod
    def loss(self, model: SentenceTransformer, side: str) -> nn.Module:
        """The loss of one of ``SIDES`` in the comparison."""

    def training_loss(self, model: SentenceTransformer) -> nn.Module:
        """The loss of the training after the comparison."""
        return self.loss(model, "sbert-kernels")

    def require_rows(self, rows: int, pairs: Pairs) -> None:
        """Raise DemoError if so many rows to train on do not fill a batch."""
        if self.options.batch_size > rows:
            raise DemoError(
                f"argument --batch-size: got {self.options.batch_size}, wanted at most the {rows} pairs that "
                f"{pairs.source} leave for training"
            )
