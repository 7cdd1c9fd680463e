"""The operations as C++ kernels for the CPU (`csrc/cpu`)."""

from __future__ import annotations

from typing import cast

from ... import native
from ...problems.contrastive import ContrastiveProblem
from .._backend import Backend, Operations, Problem


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
        return native.cpu.load()

    def library(self) -> str | None:
        """Returns one line about the compiled library: where it lies, or why there is none."""
        return native.cpu.describe()

    def load(self) -> Operations:
        """Imports the kernels and returns their modules."""
        from . import contrastive, pairwise, ranking

        return Operations(contrastive=contrastive, ranking=ranking, pairwise=pairwise)
