"""Drop-in replacements for the losses of sentence-transformers: the same names, arguments and numbers.

Each class that stock has too is a subclass of stock's and overrides only the computation, so ``isinstance``,
configurations, model cards and whatever else looks at a loss keep working. All other names of stock's losses, dense and
sparse, are here as well and are stock's own objects, so that a script can import this module in the place of stock's.
"""

from .. import versions  # noqa: F401  first: it says which sentence-transformers is wanted

# isort: split
import sys
from typing import Any

from sentence_transformers.sentence_transformer import losses as _dense
from sentence_transformers.sparse_encoder import losses as _sparse

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

# Now, before any Trainer exists, because a Trainer may also build its loss itself.
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


def _stock_s_own() -> dict[str, Any]:
    """Returns what stock's packages of losses have and this one lacks, by name: classes and their modules."""
    found: dict[str, Any] = {}
    for package in (_dense, _sparse):
        for name in package.__all__:
            if name in globals():
                continue
            found[name] = getattr(package, name)
            module = found[name].__module__.removeprefix(package.__name__ + ".")
            if module not in globals() and module in vars(package):
                found[module] = vars(package)[module]
    return found


def __getattr__(name: str) -> Any:
    # Looked up at each call, because sbert_kernels.patch() changes stock's packages.
    found = _stock_s_own()
    if name not in found:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}, and sentence_transformers has no other loss of that name.",
            name=name,
            obj=sys.modules[__name__],
        )
    return found[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_stock_s_own()})


__all__ += [name for package in (_dense, _sparse) for name in package.__all__ if name not in __all__]
