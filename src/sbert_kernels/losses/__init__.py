"""Drop-in replacements for the losses of sentence-transformers: the same names, arguments and numbers.

A class that stock has too subclasses it and overrides the computation only, so ``isinstance``, configuration, model
cards and whatever else looks at a loss keep working.
"""

from .. import versions  # noqa: F401  first: it says which sentence-transformers is wanted
from ._trainer import follow_trainers
from .angle_objective import AnglEObjective
from .cached_cosent import CachedAnglELoss, CachedCoSENTLoss
from .cached_gist_embed import CachedGISTEmbedLoss
from .cached_multiple_negatives_ranking import (
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
)
from .cosent import AnglELoss, CoSENTLoss
from .gist_embed import GISTEmbedLoss
from .matryoshka import MatryoshkaLoss
from .multiple_negatives_ranking import MultipleNegativesRankingLoss, MultipleNegativesSymmetricRankingLoss
from .sparse_cosent import SparseAnglELoss, SparseCoSENTLoss
from .weighted import WeightedLoss

# Before any Trainer is made: a loss may be built inside of one.
follow_trainers()

__all__ = [
    "AnglELoss",
    "AnglEObjective",
    "CachedAnglELoss",
    "CachedCoSENTLoss",
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "CoSENTLoss",
    "GISTEmbedLoss",
    "MatryoshkaLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "SparseAnglELoss",
    "SparseCoSENTLoss",
    "WeightedLoss",
]
