"""The operations as C++ kernels for the CPU (`csrc/cpu`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from ... import extension
from ...problems.contrastive import ContrastiveProblem, ContrastiveResult
from ...problems.contrastive import Needs as ContrastiveNeeds
from ...problems.pairwise import PairwiseGradients, PairwiseProblem
from ...problems.ranking import Needs as RankingNeeds
from ...problems.ranking import RankingProblem, RankingResult
from .._backend import Backend, Problem


class CpuBackend(Backend):
    """Serves most of what lies on the CPU, where the C++ kernels are compiled."""

    name = "cpu"
    summary = "C++ that stays in the cache"
    device = "cpu"

    def why_not_on(self, device: str, by_name: bool) -> str | None:
        """Returns why it cannot run on a device, or None if it can."""
        return None if device == "cpu" else f"the inputs are on {device}"

    def why_not(self, operation: str, problem: Problem | None) -> str | None:
        """Returns why it cannot serve a problem on the CPU, or None if it can."""
        from . import contrastive

        if operation == "contrastive":
            return contrastive.why_not(cast("ContrastiveProblem | None", problem))
        return extension.load()

    def contrastive(self, problem: ContrastiveProblem, needs: ContrastiveNeeds) -> ContrastiveResult:
        """Returns loss and gradients of the contrastive operation."""
        from .contrastive import contrastive

        return contrastive(problem, needs)

    def ranking(self, problem: RankingProblem, needs: RankingNeeds) -> RankingResult:
        """Returns loss and gradients of the ranking operation."""
        from .ranking import ranking

        return ranking(problem, needs)

    def pairwise(self, problem: PairwiseProblem) -> tuple[Tensor, ...]:
        """Returns the scores of each similarity of the pairwise operation."""
        from .pairwise import pairwise

        return pairwise(problem)

    def pairwise_gradients(
        self, problem: PairwiseProblem, gradients: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> PairwiseGradients:
        """Returns the gradients of the embeddings from those of the scores."""
        from .pairwise import pairwise_gradients

        return pairwise_gradients(problem, gradients, needs)
