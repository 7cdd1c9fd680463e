"""Drop-in replacements for the losses of sentence-transformers: the same names, arguments and numbers.

Each class subclasses its stock class and overrides the computation only, so ``isinstance``, configuration, model cards
and whatever else looks at a loss keep working.
"""

from .cached_gist_embed import CachedGISTEmbedLoss
from .cached_multiple_negatives_ranking import (
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
)
from .gist_embed import GISTEmbedLoss
from .matryoshka import MatryoshkaLoss
from .multiple_negatives_ranking import MultipleNegativesRankingLoss, MultipleNegativesSymmetricRankingLoss

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "GISTEmbedLoss",
    "MatryoshkaLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
]
