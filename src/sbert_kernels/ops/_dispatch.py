"""The way from a problem to the backend that computes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import backends
from ..backends import Backend, Problem
from ..values import without_autocast


@contextmanager
def backend_for(operation: str, requested: str | None, problem: Problem) -> Iterator[Backend]:
    """Gives the backend of this name, or the first that serves the problem; it runs without autograd and autocast.

    What autocast asks for is in the problem where it matters; it would cast the backend's other products as well.
    """
    chosen = backends.choose(operation, requested, problem).backend
    with without_autocast(problem.device), torch.no_grad():
        yield chosen
