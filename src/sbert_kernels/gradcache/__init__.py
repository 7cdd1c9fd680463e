"""The gradient cache (arXiv 2101.06983): losses over large batches in the memory of a mini-batch."""

from .. import versions  # noqa: F401  first: it says which sentence-transformers is wanted
from .cache import GradCache

__all__ = ["GradCache"]
