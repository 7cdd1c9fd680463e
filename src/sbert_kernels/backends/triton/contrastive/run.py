"""Executes a plan of the contrastive operation: allocates, launches kernels, calls the vendor's matrix products.

Everything is decided in `planner`. Nothing waits for the device, and no value is read back, so that a CUDA graph can
hold the call.
"""

from __future__ import annotations

from ....problems.contrastive import ContrastiveProblem, ContrastiveResult
from .call import Call, CallProgram
from .plan import Plan
from .softmax import ChunkProgram


class Program:
    """Runs a plan: knows all launches, of which each call gives the tensors. Made once a plan, and holds no tensor."""

    def __init__(self, plan: Plan) -> None:
        self.call = CallProgram(plan)
        self.chunks = [ChunkProgram(plan, softmax, chunk) for softmax in plan.softmaxes for chunk in softmax.chunks]

    def run(self, problem: ContrastiveProblem) -> ContrastiveResult:
        """Returns loss and gradients of a problem that this plan was made for."""
        call = Call(self.call, problem)
        for chunk in self.chunks:
            chunk.run(call)
        return call.result()
