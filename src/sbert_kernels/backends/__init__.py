"""How an operation is computed. A backend is a module with one function per operation; this file chooses one per call.

`reference` is the definition in eager torch, the ground truth that the others are tested against; it is used only when
asked for. `blockwise` serves everything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .. import settings

logger = logging.getLogger(__name__)

OPERATIONS = ("contrastive",)


@dataclass(frozen=True)
class Backend:
    """What dispatch knows of a backend before it is imported."""

    name: str
    operations: tuple[str, ...]
    automatic: bool  # may be chosen without being asked for
    summary: str

    def function(self, operation: str) -> Callable[..., Any]:
        return getattr(import_module(f".{self.name}", __name__), operation)


# In order of preference.
BACKENDS = (
    Backend("blockwise", ("contrastive",), True, "row blocks of torch ops, any device and dtype"),
    Backend("reference", ("contrastive",), False, "eager torch, holds every matrix, the ground truth"),
)


@dataclass(frozen=True)
class Choice:
    """The backend that serves a call, and why."""

    backend: Backend
    reason: str


def _named(name: str, origin: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"{origin}={name!r} is not a backend: expected one of {[b.name for b in BACKENDS]}.")


def choose(operation: str, requested: str | None = None) -> Choice:
    """The backend for one call of ``operation``: the one asked for, else the first that serves it.

    Args:
        operation: One of :data:`OPERATIONS`.
        requested: A backend's name (the call's own ``backend=``), which wins over :func:`use_backend` and
            ``SBERT_KERNELS_BACKEND``.

    Raises:
        ValueError: if no backend has that name, or the one asked for cannot serve the operation.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation={operation!r} is unknown: expected one of {list(OPERATIONS)}.")
    origin = "backend"
    if requested is None:
        requested, origin = settings.get("backend"), "use_backend() or SBERT_KERNELS_BACKEND"
    if requested is not None:
        backend = _named(requested, origin)
        if operation not in backend.operations:
            raise ValueError(f"{origin}={requested!r} does not serve {operation!r}.")
        choice = Choice(backend, f"asked for by {origin}")
    else:
        backend = next(b for b in BACKENDS if b.automatic and operation in b.operations)
        choice = Choice(backend, f"first in order of preference: {backend.summary}")
    logger.debug("%s is served by %s (%s)", operation, choice.backend.name, choice.reason)
    return choice


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Use the named backend for every call in a ``with`` block; ``None`` goes back to choosing one per call.

    Raises:
        ValueError: if no backend has that name.
    """
    if name is not None:
        _named(name, "name")
    with settings.override(backend=name):
        yield
