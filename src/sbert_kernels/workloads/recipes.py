"""Numbers and names of the recipes that are trained here. This module imports no torch, since command lines read it."""

from __future__ import annotations

# The same class names and constructors in both modules: to change the import is all that a user has to do.
STOCK = "sentence_transformers.sentence_transformer.losses"
OURS = "sbert_kernels.losses"
SIDES = {"stock": STOCK, "sbert-kernels": OURS}

STATIC_DIM = 512
MATRYOSHKA_DIMS = (512, 256, 128, 64, 32)
# By model. A static model's is that of sentence-transformers' own recipe for static embeddings: only a few rows of its
# table get a gradient in each step.
LEARNING_RATES = {"static": 2e-1, "minilm": 1e-4}


def default_matryoshka_dims(dim: int) -> tuple[int, ...]:
    """Returns ``dim`` and those of ``MATRYOSHKA_DIMS`` that are smaller, widest first."""
    return (dim, *(smaller for smaller in MATRYOSHKA_DIMS if smaller < dim))
