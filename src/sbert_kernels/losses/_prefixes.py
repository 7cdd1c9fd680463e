"""The prefixes of the embeddings that one step of a MatryoshkaLoss looks at, as its inner loss is handed them."""

from __future__ import annotations

from typing import NamedTuple


class Prefixes(NamedTuple):
    """Widths, and the weight of each, for :func:`sbert_kernels.contrastive_loss`; None for the whole embeddings."""

    dims: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None


WHOLE = Prefixes()
