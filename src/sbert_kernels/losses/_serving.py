"""Whether a loss is computed by the fused operation or by its stock class, decided at each call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer, util
from torch import Tensor, nn

from .. import settings
from ..logs import described, log_once

logger = logging.getLogger(__name__)

# The operation's names for the pairwise similarity functions of sentence-transformers.
PAIRWISE = (
    (util.pairwise_cos_sim, "cos"),
    (util.pairwise_dot_score, "dot"),
    (util.pairwise_angle_sim, "angle"),
)


def similarity_of(similarity_fct: Any) -> str | None:
    """The operation's name for a similarity function of sentence-transformers, or None for any other."""
    if getattr(similarity_fct, "__func__", None) is SentenceTransformer.similarity:
        # `model.similarity` dispatches on the model's similarity_fn_name, which is filled in when it is read.
        model = similarity_fct.__self__
        similarity_fct = util.SimilarityFunction.to_similarity_fn(model.similarity_fn_name)
    if not callable(similarity_fct):
        raise TypeError(
            "similarity_fct must be a function, such as sentence_transformers.util.cos_sim, got "
            f"{described(similarity_fct)}."
        )
    if similarity_fct in (util.cos_sim, util.pytorch_cos_sim):
        return "cos"
    return "dot" if similarity_fct is util.dot_score else None


def pairwise_similarity_of(similarity_fct: Any) -> str | None:
    """The same for a function that compares row by row."""
    if getattr(similarity_fct, "__func__", None) is SentenceTransformer.similarity_pairwise:
        model = similarity_fct.__self__
        similarity_fct = util.SimilarityFunction.to_similarity_pairwise_fn(model.similarity_fn_name)
    # Not looked up by its hash, which a callable of the user's need not have.
    return next((name for known, name in PAIRWISE if known is similarity_fct), None)


def unsupported_embeddings(embeddings: Sequence[Tensor]) -> str | None:
    """Why the operation cannot take these embeddings although stock can, or None."""
    if any(embedding.is_sparse for embedding in embeddings):
        return "the embeddings are sparse"
    return None


def serves(loss: nn.Module, unsupported: str | None, new_options: dict[str, Any] | None = None) -> bool:
    """Whether the fused operation computes this call of ``loss``.

    Args:
        loss: The drop-in.
        unsupported: Which of its options only the stock computation serves, if any.
        new_options: Options that stock does not honour, by name, where they are set.

    Raises:
        ValueError: ``unsupported``, but a new option or a backend was asked for that stock cannot honour.
    """
    name = type(loss).__name__
    options = ", ".join(f"{key}={value!r}" for key, value in (new_options or {}).items())
    if settings.get("disable"):
        if options:
            log_once(logger, f"{name}: SBERT_KERNELS_DISABLE is set, and stock does not honour {options}.")
        return False
    if unsupported is None:
        return True
    if options:
        raise ValueError(f"{name} cannot combine {options} with a stock computation, which is needed: {unsupported}.")
    backend = settings.get("backend")
    if backend is not None:
        raise ValueError(f"{name} cannot be served by the backend asked for, {backend!r}: {unsupported}.")
    log_once(logger, f"{name} is computed by sentence-transformers, not by a fused kernel: {unsupported}.")
    return False
