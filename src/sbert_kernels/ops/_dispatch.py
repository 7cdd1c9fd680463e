"""From a problem to what a backend makes of it."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends
from ..values import without_autocast


def evaluate(operation: str, backend: str | None, problem: Any, *arguments: Any, function: str | None = None) -> Any:
    """What the backend of this name, or the first that serves the problem, gives for an operation.

    ``function`` names another function of the operation's module than that of the operation's name.
    """
    return computed_by(backends.choose(operation, backend, problem).backend, operation, problem, arguments, function)


def computed_by(
    backend: backends.Backend, operation: str, problem: Any, arguments: tuple[Any, ...], function: str | None = None
) -> Any:
    compute = getattr(backend.module(operation), function or operation)
    # Under autocast the embeddings arrive in low precision; what the products here use is the backend's choice.
    with without_autocast(problem.device), torch.no_grad():
        return compute(problem, *arguments)
