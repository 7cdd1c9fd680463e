"""The way from a problem to the backend that computes it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

import torch

from .. import backends
from ..backends import Backend, Problem
from ..values import without_autocast


class backend_for(AbstractContextManager[Backend]):
    """Gives the backend of this name, or the first that serves the problem; it runs without autograd and autocast.

    What autocast asks for is in the problem where it matters; it would cast the backend's other products as well.

    A class, because a generator takes longer to enter than all of this.
    """

    def __init__(self, operation: str, requested: str | None, problem: Problem) -> None:
        self.chosen = backends.choose(operation, requested, problem).backend
        self.without_autocast = without_autocast(problem.device)
        self.without_grad = torch.no_grad() if torch.is_grad_enabled() else None

    def __enter__(self) -> Backend:
        self.without_autocast.__enter__()
        if self.without_grad is not None:
            self.without_grad.__enter__()
        return self.chosen

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.without_grad is not None:
            self.without_grad.__exit__(kind, error, traceback)
        self.without_autocast.__exit__(kind, error, traceback)
