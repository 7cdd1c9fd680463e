"""Executes a plan of the contrastive operation: allocates, launches kernels, calls the vendor's matrix products.

Everything is decided in `planner`. Nothing waits for the device, and no value is read back, so that a CUDA graph can
hold the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ....problems.contrastive import ContrastiveProblem, ContrastiveResult
from .call import Call, CallProgram
from .plan import Plan
from .softmax import ChunkProgram


class Step(Protocol):
    """A part of a call between what is done once before and after: a chunk of rows, say."""

    def run(self, call: Call) -> None:
        """Computes losses, and adds to the gradients."""


class Program:
    """Runs a plan: knows all launches, of which each call gives the tensors. Made once a plan, and holds no tensor.

    Other kernels that make weights are launched by a subclass, whose `steps_of` returns their steps.
    """

    def __init__(self, plan: Plan) -> None:
        self.call, self.steps = CallProgram(plan), self.steps_of(plan)

    def steps_of(self, plan: Plan) -> Sequence[Step]:
        """Returns the steps of a plan in their order."""
        return [ChunkProgram(plan, softmax, chunk) for softmax in plan.softmaxes for chunk in softmax.chunks]

    def run(self, problem: ContrastiveProblem) -> ContrastiveResult:
        """Returns loss and gradients of a problem that this plan was made for."""
        call = Call(self.call, problem)
        for step in self.steps:
            step.run(call)
        return call.result()
