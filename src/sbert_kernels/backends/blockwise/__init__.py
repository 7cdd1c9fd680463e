"""The operations in blocks of torch operations, for every device and dtype."""

from __future__ import annotations

from .._backend import Backend, Operations


class BlockwiseBackend(Backend):
    """Serves every problem, on any device."""

    name = "blockwise"
    summary = "row blocks of torch ops, any device and dtype"

    def load(self) -> Operations:
        """Imports the kernels and returns their modules."""
        from . import contrastive, pairwise, ranking

        return Operations(contrastive=contrastive, ranking=ranking, pairwise=pairwise)
