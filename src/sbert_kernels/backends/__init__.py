"""Chooses how an operation is computed. A backend is a package with a module an operation; one is chosen per call.

`reference` is the definition in eager torch, the ground truth that the others are tested against; it is used only when
asked for. `cpu` serves most of what lies on the CPU, where its C++ kernels are compiled, `cuda` the most usual in-batch
losses on a GPU of compute capability 9.0, where its library is there, `triton` most of what lies on a GPU, and
`blockwise` everything.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .. import settings
from ..logs import log_once
from . import self_check
from ._backend import Backend, Problem
from .blockwise import BlockwiseBackend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

logger = logging.getLogger(__name__)

OPERATIONS = ("contrastive", "ranking", "pairwise")

# In order of preference.
BACKENDS: tuple[Backend, ...] = (CpuBackend(), CudaBackend(), TritonBackend(), BlockwiseBackend(), ReferenceBackend())


@dataclass(frozen=True)
class Choice:
    """A backend that serves a call, and the reason why it was chosen."""

    backend: Backend
    reason: str


def _named(name: str, origin: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"{origin}={name!r} is not a backend: expected one of {[b.name for b in BACKENDS]}.")


def why_not(
    backend: Backend, operation: str, problem: Problem | None, *, device: str = "cpu", by_name: bool = False
) -> str | None:
    """Returns why a backend cannot serve a problem, or None if it can, unless its self-check says otherwise.

    Args:
        problem: None stands for the most usual problem, on ``device``.
        by_name: The backend was asked for by its name, and may do what it would not be chosen for.
    """
    reason = backend.why_not_on(device if problem is None else str(problem.device), by_name)
    return reason if reason is not None else backend.why_not(operation, problem)


def choose(operation: str, requested: str | None = None, problem: Problem | None = None, device: str = "cpu") -> Choice:
    """Returns the backend for one call of ``operation``: the one asked for, else the first that serves it.

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
        reason = why_not(backend, operation, problem, device=device, by_name=True)
        if reason is None:
            reason = _fault(backend, operation, problem, device)
        if reason is not None:
            raise ValueError(f"{origin}={requested!r} cannot serve this call: {reason}.")
        return Choice(backend, f"asked for by {origin}")
    passed_over, where = "", device if problem is None else str(problem.device)
    obstacles: list[tuple[Backend, str]] = []  # that somebody should hear of
    faults: list[tuple[Backend, str]] = []  # that everybody has to hear of
    for backend in BACKENDS:
        if not backend.automatic:
            continue
        absent = backend.why_not_on(where, False)
        reason = absent if absent is not None else backend.why_not(operation, problem)
        fault = None if reason is not None else _fault(backend, operation, problem, device)
        if reason is None and fault is None:
            for other, found in faults:
                _log_fault(other, found, backend)
            for other, obstacle in obstacles:
                _log_passed_over(other, operation, obstacle, where, backend)
            return Choice(backend, f"first in order of preference: {backend.summary}{passed_over}")
        passed_over += f"; not {backend.name}: {reason or fault}"
        made_for_it = problem is not None and problem.device.type == backend.device
        if made_for_it and fault is not None:
            faults.append((backend, fault))
        elif made_for_it and reason is not None and (absent is None or backend.substitute is None):
            obstacles.append((backend, reason))
    raise AssertionError(f"no backend serves {operation!r}")


def _fault(backend: Backend, operation: str, problem: Problem | None, device: str) -> str | None:
    """Returns what the self-check of a backend finds wrong, or None; without a problem, only what is known of it."""
    if problem is None:
        return self_check.known_fault(backend, torch.device(device))
    return self_check.why_not(backend, operation, problem)


def _log_fault(backend: Backend, fault: str, instead: Backend) -> None:
    log_once(
        logger,
        f"The {backend.name} kernels are switched off: {fault}. The {instead.name} backend serves instead "
        f"({instead.summary}). Please report this to the authors of sbert-kernels with what `python -m sbert_kernels "
        "info` prints. SBERT_KERNELS_SELFCHECK=0 uses these kernels all the same.",
        logging.ERROR,
    )


def _log_passed_over(backend: Backend, operation: str, reason: str, device: str, chosen: Backend) -> None:
    """Log what the kernels that are made for a device do not serve: this problem, or one line for all of them.

    Of kernels with a substitute, only problems that it serves, of an operation that they have.
    """
    line = f"{operation} is not computed by the {backend.name} kernels: {reason}."
    if backend.substitute is not None:
        if chosen.name != backend.substitute or operation not in backend.has_kernels_for:
            return
        line += f" The {chosen.name} kernels compute it."
    elif why_not(backend, operation, None, device=device) == reason:
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
