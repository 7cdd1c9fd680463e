"""How an operation is computed. A backend is a package with a module an operation; this file chooses one per call.

`reference` is the definition in eager torch, the ground truth that the others are tested against; it is used only when
asked for. `cpu` serves most of what lies on the CPU, where its C++ kernels are compiled, `triton` most of what lies on
a GPU, and `blockwise` everything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from .. import settings
from ..logs import log_once
from .triton import obstacle as triton_obstacle

logger = logging.getLogger(__name__)

OPERATIONS = ("contrastive", "ranking", "pairwise")


def _not_on_cpu(device: str, by_name: bool) -> str | None:
    return None if device == "cpu" else f"the inputs are on {device}"


@dataclass(frozen=True)
class Backend:
    """What dispatch knows of a backend before it is imported."""

    name: str
    automatic: bool  # may be chosen without being asked for
    summary: str
    device: str | None = None  # the type of the device that it is made for; None: any
    uses_autograd: bool = False  # to compute gradients
    # Why it cannot run on a device ("cuda:0"), when it was asked for by its name or not.
    obstacle: Callable[[str, bool], str | None] | None = None

    operations: tuple[str, ...] = OPERATIONS

    def module(self, operation: str) -> ModuleType:
        """Its implementation of an operation: a function of that name, and what else the operation needs."""
        return import_module(f".{self.name}.{operation}", __name__)

    def unsupported(self, operation: str, problem: Any, by_name: bool = False, device: str = "cpu") -> str | None:
        """Why the backend cannot serve a problem (None: the most usual one, on ``device``), or None.

        ``by_name``: it was asked for, and may do what it would not be chosen for.
        """
        if self.obstacle is None:
            return None
        reason = self.obstacle(device if problem is None else str(problem.device), by_name)
        return reason if reason is not None else self.module(operation).unsupported(problem)


# In order of preference.
BACKENDS = (
    Backend("cpu", True, "C++ that stays in the cache", device="cpu", obstacle=_not_on_cpu),
    Backend("triton", True, "fused kernels on a GPU", device="cuda", obstacle=triton_obstacle),
    Backend("blockwise", True, "row blocks of torch ops, any device and dtype"),
    Backend("reference", False, "eager torch, holds every matrix, the ground truth", uses_autograd=True),
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


def choose(operation: str, requested: str | None = None, problem: Any = None, device: str = "cpu") -> Choice:
    """The backend for one call of ``operation``: the one asked for, else the first that serves it.

    Args:
        operation: One of :data:`OPERATIONS`.
        requested: A backend's name (the call's own ``backend=``), which wins over :func:`use_backend` and
            ``SBERT_KERNELS_BACKEND``.
        problem: What is to be computed; without it, the choice is the one for the most usual problem.
        device: Where that one lies.

    Raises:
        ValueError: if no backend has that name, or the one asked for cannot serve the operation or the problem.
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
        reason = backend.unsupported(operation, problem, by_name=True, device=device)
        if reason is not None:
            raise ValueError(f"{origin}={requested!r} cannot serve this call: {reason}.")
        return Choice(backend, f"asked for by {origin}")
    passed_over = ""
    for backend in BACKENDS:
        if not backend.automatic or operation not in backend.operations:
            continue
        reason = backend.unsupported(operation, problem, device=device)
        if reason is None:
            return Choice(backend, f"first in order of preference: {backend.summary}{passed_over}")
        passed_over += f"; not {backend.name}: {reason}"
        if problem is not None and problem.device.type == backend.device:
            _log_passed_over(backend, operation, reason, str(problem.device))
    raise AssertionError(f"no backend serves {operation!r}")


def _log_passed_over(backend: Backend, operation: str, reason: str, device: str) -> None:
    """Log what the kernels that are made for a device do not serve: this problem, or one line for all of them."""
    line = f"{operation} is not computed by the {backend.name} kernels: {reason}."
    if backend.unsupported(operation, None, device=device) == reason:
        line = (
            f"The {backend.name} kernels are not in use: {reason}. Torch operations compute the same in blocks "
            "instead: without N x N matrices, but mostly no faster than sentence-transformers' own losses."
        )
    log_once(logger, line)


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
