"""Decides at each call whether a loss is computed by the fused operation or by its stock class."""

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
    """Returns the operation's name for a similarity function of sentence-transformers, or None for any other.

    Raises:
        TypeError: It is no function.
    """
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
    """Returns the operation's name for a function that compares two columns row by row, or None for any other."""
    if getattr(similarity_fct, "__func__", None) is SentenceTransformer.similarity_pairwise:
        model = similarity_fct.__self__
        similarity_fct = util.SimilarityFunction.to_similarity_pairwise_fn(model.similarity_fn_name)
    # Compared one by one, because a user's callable need not have a hash.
    return next((name for known, name in PAIRWISE if known is similarity_fct), None)


def why_not_embeddings(embeddings: Sequence[Tensor]) -> str | None:
    """Returns why the operation cannot take embeddings that stock can take, or None if it can."""
    for embedding in embeddings:
        if embedding.is_sparse:
            return "the embeddings are sparse"
    return None


def serves(loss: nn.Module, why_not: str | None, new_options: dict[str, Any] | None = None) -> bool:
    """Returns True if the fused operation computes this call of a loss, and False if its stock class does.

    A fallback to stock logs one line that says why.

    Args:
        loss: The drop-in.
        why_not: Why only the stock class can compute it as it is set now, or None.
        new_options: The options that are set and that the stock class does not have, by name.

    Raises:
        ValueError: Only the stock class can compute the loss, but an option is set that it does not have, or a backend
            was asked for.
    """
    disabled = settings.get("disable")
    if why_not is None and not disabled:
        return True
    name = type(loss).__name__
    options = ", ".join(f"{key}={value!r}" for key, value in (new_options or {}).items())
    if disabled:
        if options:
            log_once(logger, f"{name}: SBERT_KERNELS_DISABLE is set, and stock does not honour {options}.")
        return False
    if options:
        raise ValueError(f"{name} cannot combine {options} with a stock computation, which is needed: {why_not}.")
    backend = settings.get("backend")
    if backend is not None:
        raise ValueError(f"{name} cannot be served by the backend asked for, {backend!r}: {why_not}.")
    log_once(logger, f"{name} is computed by sentence-transformers, not by a fused kernel: {why_not}.")
    return False
