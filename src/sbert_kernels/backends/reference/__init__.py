"""The operations by their definitions in eager torch, the ground truth that the other backends are tested against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...problems.contrastive import ContrastiveProblem, ContrastiveResult
from ...problems.contrastive import Needs as ContrastiveNeeds
from ...problems.pairwise import PairwiseGradients, PairwiseProblem
from ...problems.ranking import Needs as RankingNeeds
from ...problems.ranking import RankingProblem, RankingResult
from .._backend import Backend


class ReferenceBackend(Backend):
    """Computes every operation by its definition; used only when asked for."""

    name = "reference"
    summary = "eager torch, holds every matrix, the ground truth"
    automatic = False
    by_definition = True

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
