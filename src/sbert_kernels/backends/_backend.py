"""The contract that every backend fulfils."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from ..problems.contrastive import ContrastiveProblem, ContrastiveResult
from ..problems.contrastive import Needs as ContrastiveNeeds
from ..problems.pairwise import PairwiseGradients, PairwiseProblem
from ..problems.ranking import Needs as RankingNeeds
from ..problems.ranking import RankingProblem, RankingResult

Problem = ContrastiveProblem | RankingProblem | PairwiseProblem


class ContrastiveModule(Protocol):
    """A backend's module `contrastive`."""

    def contrastive(self, problem: ContrastiveProblem, needs: ContrastiveNeeds) -> ContrastiveResult:
        """Returns loss and gradients of the contrastive operation."""


class RankingModule(Protocol):
    """A backend's module `ranking`."""

    def ranking(self, problem: RankingProblem, needs: RankingNeeds) -> RankingResult:
        """Returns loss and gradients of the ranking operation."""


class PairwiseModule(Protocol):
    """A backend's module `pairwise`."""

    def pairwise(self, problem: PairwiseProblem) -> tuple[Tensor, ...]:
        """Returns the scores of each similarity, (C * n,) each."""

    def pairwise_gradients(
        self, problem: PairwiseProblem, gradients: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> PairwiseGradients:
        """Returns the gradients of the embeddings from those of the scores."""


class Operations(NamedTuple):
    """A backend's modules, one for each operation."""

    contrastive: ContrastiveModule
    ranking: RankingModule
    pairwise: PairwiseModule


class Backend(ABC):
    """One way to compute all operations. Importing a backend's package imports none of its kernels.

    Attributes:
        name: The name that users ask for it by.
        summary: A few words for `python -m sbert_kernels info`.
        automatic: It may be chosen without being asked for.
        device: The type of the device that it is made for; None if it is made for any.
        substitute: The name of a backend for the same device that serves what this one does not. Little is lost then,
            and where this one cannot run at all, no line in the log says so. None: torch operations serve it.
        has_kernels_for: The operations that it serves at all.
        by_definition: It computes everything by its definition, and gradients by autograd, which is off in a graph of
            torch.compile.
        self_checked: Its kernels are compared with torch operations on a device before they first serve there (see
            `self_check`): "quickly", where each further kind of problem has kernels to be compiled, or "thoroughly".
    """

    name: str
    summary: str
    automatic: bool = True
    device: str | None = None
    substitute: str | None = None
    has_kernels_for: tuple[str, ...] = ("contrastive", "ranking", "pairwise")
    by_definition: bool = False
    self_checked: Literal["quickly", "thoroughly"] | None = None

    def why_not_on(self, device: str, by_name: bool) -> str | None:
        """Returns why it cannot run on a device ("cuda:0"), or None if it can.

        Args:
            by_name: It was asked for by its name, and may do what it would not be chosen for.
        """
        return None

    def why_not(self, operation: str, problem: Problem | None) -> str | None:
        """Returns why it cannot serve a problem (None: the most usual one) where it runs, or None if it can."""
        return None

    def kernel_files(self) -> tuple[Path, ...]:
        """Returns the files that its results follow from, in a fixed order: its sources, and a compiled library."""
        package = Path(str(sys.modules[type(self).__module__].__file__)).parent
        return tuple(sorted(package.rglob("*.py")))

    def library(self) -> str | None:
        """Returns one line about its compiled library, where it lies or why there is none; None if it needs none."""
        return None

    @abstractmethod
    def load(self) -> Operations:
        """Imports the kernels and returns their modules."""

    @cached_property
    def operations(self) -> Operations:
        """The modules of the kernels, imported when they are first asked for."""
        return self.load()
