"""Holds the prefixes of the embeddings that one step of a MatryoshkaLoss looks at, as its inner loss gets them."""

from __future__ import annotations

from typing import NamedTuple


class Prefixes(NamedTuple):
    """Holds the widths of prefixes and the weight of each, or None and None for the whole embeddings.

    They are the ``matryoshka_dims`` and ``matryoshka_weights`` of :func:`sbert_kernels.contrastive_loss`.
    """

    dims: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None


WHOLE = Prefixes()
