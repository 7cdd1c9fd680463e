"""Executes a plan of the contrastive operation with weights by the CUDA library."""

from __future__ import annotations

from collections.abc import Sequence

from ...triton.contrastive.plan import Plan
from ...triton.contrastive.run import Program, Step
from .planner import TwoSidedPlan
from .softmax import CudaChunk
from .two_sided import TwoSided


class CudaProgram(Program):
    """Runs a plan with the library's operator in the place of Triton's sweep."""

    def steps_of(self, plan: Plan) -> Sequence[Step]:
        """Returns the steps of a plan in their order."""
        if isinstance(plan, TwoSidedPlan):
            return [TwoSided(plan)]
        return [CudaChunk(plan, softmax, chunk) for softmax in plan.softmaxes for chunk in softmax.chunks]
