"""The operations by their definitions in eager torch, the ground truth that the other backends are tested against."""

from __future__ import annotations

from .._backend import Backend, Operations


class ReferenceBackend(Backend):
    """Computes every operation by its definition; used only when asked for."""

    name = "reference"
    summary = "eager torch, holds every matrix, the ground truth"
    automatic = False
    by_definition = True

    def load(self) -> Operations:
        """Imports the kernels and returns their modules."""
        from . import contrastive, pairwise, ranking

        return Operations(contrastive=contrastive, ranking=ranking, pairwise=pairwise)
