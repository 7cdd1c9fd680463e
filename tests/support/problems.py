"""Problems of ``contrastive_loss``: its arguments in one dict, of which every tensor gets its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sbert_kernels import contrastive_loss


def loss_and_gradients(backend: str, problem: dict[str, Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Returns the loss and the gradients of all tensors that have one, in float64, computed in ``dtype``.

    ``problem`` holds the arguments of ``contrastive_loss``. The gradients are those of the queries, of each column of
    documents, and of ``all_queries``, ``scale`` and ``weights`` where they are tensors. Without ``dtype``, each tensor
    keeps its own.
    """
    # Parameters and weights are wider than embeddings of half precision.
    wide = dtype if dtype is None or dtype.itemsize > 2 else torch.float32
    arguments: dict[str, Any] = {}
    for name, value in problem.items():
        if "ids" in name:
            arguments[name] = value
        elif "guide" in name:
            # Exclusions are decisions: every type has to take them from the same numbers.
            arguments[name] = value if value is None or dtype is None else _cast(value, torch.float32)
        else:
            arguments[name] = _leaves(value, wide if name in ("scale", "weights") else dtype)
    loss = contrastive_loss(backend=backend, **arguments)
    others = (arguments.get(name) for name in ("all_queries", "scale", "weights"))
    leaves = [arguments["queries"], *arguments["documents"], *(x for x in others if isinstance(x, Tensor))]
    return [x.detach().double() for x in (loss, *torch.autograd.grad(loss, leaves))]


def _cast(value: Tensor | list[Tensor], dtype: torch.dtype) -> Tensor | list[Tensor]:
    """Returns a tensor, or a list of them, in ``dtype``."""
    return value.to(dtype) if isinstance(value, Tensor) else [x.to(dtype) for x in value]


def _leaves(value: Any, dtype: torch.dtype | None) -> Any:
    """Returns a tensor, or a list of them, as new leaves of ``dtype`` that have gradients; anything else as it is."""
    if isinstance(value, list):
        return [_leaves(x, dtype) for x in value]
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(dtype or value.dtype).requires_grad_()
