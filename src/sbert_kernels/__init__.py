"""Fused, memory-lean drop-in replacements for the losses of sentence-transformers.

The two ways in: ``sbert_kernels.patch()`` before a training script builds its losses, or ``from sbert_kernels import
losses`` in place of the stock import. :func:`contrastive_loss`, :func:`ranking_loss` and
:func:`pairwise_similarity` are the operations under them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import losses as losses
    from .backends import use_backend as use_backend
    from .gradcache import GradCache as GradCache
    from .ops.contrastive import contrastive_loss as contrastive_loss
    from .ops.pairwise import pairwise_similarity as pairwise_similarity
    from .ops.ranking import angle_loss as angle_loss
    from .ops.ranking import cosent_loss as cosent_loss
    from .ops.ranking import ranking_loss as ranking_loss
    from .patching import is_patched as is_patched
    from .patching import patch as patch
    from .patching import unpatch as unpatch

__version__ = "0.1.0"

# Loaded on first use: importing the package costs no import of torch or sentence-transformers.
_PUBLIC = {
    "GradCache": ("gradcache", "GradCache"),
    "angle_loss": ("ops.ranking", "angle_loss"),
    "contrastive_loss": ("ops.contrastive", "contrastive_loss"),
    "cosent_loss": ("ops.ranking", "cosent_loss"),
    "is_patched": ("patching", "is_patched"),
    "losses": ("losses", None),
    "pairwise_similarity": ("ops.pairwise", "pairwise_similarity"),
    "patch": ("patching", "patch"),
    "ranking_loss": ("ops.ranking", "ranking_loss"),
    "unpatch": ("patching", "unpatch"),
    "use_backend": ("backends", "use_backend"),
}

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = import_module(f".{module}", __name__)
    if attribute is not None:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
