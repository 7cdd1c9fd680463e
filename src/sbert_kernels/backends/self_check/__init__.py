"""Checks the kernels of a GPU library on a device against torch operations, before they first serve there.

    cases.py     the problems, and what counts as wrong
    records.py   what was found, kept in the cache folder

A kind of problem (an operation in a type and of a size) is checked when it first comes: its kernels are then compiled,
which most of them would be anyhow, and solve some problems. Once for each kind of device, driver, torch, Triton and
version of the kernels; later processes read the outcome. From then on a call costs one look into a set.

* Wrong results switch the whole library off on that device: what computes one gradient wrongly is not to be trusted
  with another. They are kept for that card alone, as it may be the card that is broken.
* Where a library serves none of the problems, it serves unchecked, and one line in the log says so.
* A kernel that raises (it cannot be compiled, say) switches off its kind of problem in this process. That is not kept,
  as its cause may go away.
* Where memory runs out, the library serves, and is checked at the next call.
* While a CUDA graph is captured, and where tensors have no values, nothing is checked: the next call that can is.

One thread checks at a time, in the whole process: others wait as soon as they ask for what is not known to be right, on
another device too, where they then mostly find what was kept of a card of the same name.

`backends.choose` asks. A check runs the modules of a library directly, never by another choice.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ... import settings
from ...logs import log_once
from ...machine import is_out_of_memory
from ...problems.contrastive import ContrastiveProblem
from ...problems.pairwise import PairwiseProblem
from ...problems.ranking import RankingProblem
from ...values import readable, without_autocast
from .._backend import Backend, Problem
from ..blockwise import BlockwiseBackend
from . import cases
from .records import Kind, Outcome, Records

logger = logging.getLogger(__name__)

KINDS = tuple(Kind(operation, dtype, size) for operation, size in cases.USUAL_SIZE.items() for dtype in cases.ROUNDINGS)
_CPU = torch.device("cpu")
_CPU_MULTIPROCESSORS = 2  # of the device of a test, which solves the problems step by step

_Key = tuple[str, torch.device, str, torch.dtype, int]  # of a library on a device, and a kind of problem

_lock = threading.Lock()
_right: set[_Key] = set()
_unchecked: set[_Key] = set()  # the library serves none of the problems
_wrong: dict[tuple[str, torch.device], str] = {}  # the library is off on the device: why
_raised: dict[_Key, str] = {}


def why_not(backend: Backend, operation: str, problem: Problem) -> str | None:
    """Returns why a library must not compute a problem where it lies, or None. Checks it there if nobody has yet.

    Args:
        backend: One that serves the problem for all else.
        operation: The operation.
        problem: What is to be computed.
    """
    device = problem.device
    if backend.self_checked is None or device.type != backend.device:
        return None
    dtype, size = _dtype(operation, problem), cases.size_of(operation, problem)
    key = (backend.name, device, operation, dtype, size)
    if key in _right or not settings.get("selfcheck"):
        return None
    with _lock:
        if key in _right:
            return None
        reason = _wrong.get(key[:2]) or _raised.get(key)
        if reason is None and key not in _unchecked and _can_run(problem):
            reason = _checked(backend, Kind(operation, dtype, size), device)
        return reason


def known_fault(backend: Backend, device: torch.device) -> str | None:
    """Returns why a library must not compute anything on a device, as far as is known; checks nothing."""
    if backend.self_checked is None or device.type != backend.device or not settings.get("selfcheck"):
        return None
    return _known_fault(backend, _with_index(device))


def state(backend: Backend, device: torch.device) -> str:
    """Returns in words what is known of a library on a device, for ``info``; checks nothing."""
    device = _with_index(device)
    found = _known_fault(backend, device)
    if found is None:
        records = Records(backend, device)
        outcomes = [(kind, records.right(kind)) for kind in records.kinds()]
        right = [f"{kind} right since {outcome.since}" for kind, outcome in outcomes if outcome is not None]
        found = "; ".join([*right, "nothing else checked yet" if right else "not checked yet"])
    return found if settings.get("selfcheck") else f"{found} (SBERT_KERNELS_SELFCHECK=0: it serves whatever is found)"


def _known_fault(backend: Backend, device: torch.device) -> str | None:
    with _lock:
        return _wrong.get((backend.name, device)) or _kept_fault(Records(backend, device), device)


def _dtype(operation: str, problem: Problem) -> torch.dtype:
    """Returns the type of a problem's products or inputs, for which kernels are compiled."""
    if operation == "contrastive":
        contrastive = cast(ContrastiveProblem, problem)
        return contrastive.autocast or contrastive.queries.dtype
    return (
        cast(RankingProblem, problem).scores.dtype if operation == "ranking" else cast(PairwiseProblem, problem).x.dtype
    )


def _can_run(problem: Problem) -> bool:
    """Returns True if values can be computed and read now, which stream capture and tensors without data forbid."""
    if problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    first = next(value for value in vars(problem).values() if isinstance(value, torch.Tensor))
    return readable(first)


def _with_index(device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


def _kept_fault(records: Records, device: torch.device) -> str | None:
    """Returns why a library is off, if that is kept of this device."""
    outcome = records.fault()
    if outcome is None:
        return None
    kept = f" (found {outcome.since}; without {records.fault_path} it is checked again)"
    return _wrong_text(records, device, outcome) + kept


def _wrong_text(records: Records, device: torch.device, outcome: Outcome) -> str:
    return f"WRONG RESULTS on {records.facts['device']} ({device}): {outcome.wrong}"


def _checked(backend: Backend, kind: Kind, device: torch.device) -> str | None:
    """Returns why a library must not compute a kind of problem on a device, or None; remembers either."""
    key = (backend.name, device, kind.operation, kind.dtype, kind.size)
    records = Records(backend, device)
    reason = _kept_fault(records, device)
    if reason is None and records.right(kind) is None:
        logger.info("Checking %s of the %s kernels on %s, once.", kind, backend.name, records.facts["device"])
        try:
            # In a context of its own: neither the caller's settings nor a listing of launches concern it.
            served, wrong = contextvars.Context().run(_compare, backend, kind, device)
        except Exception as error:
            if _out_of_memory(error):
                return None
            lines = str(error).strip().splitlines() or [""]
            _raised[key] = f"{kind} raises {type(error).__name__} in its self-check on {device}: {lines[0]}"
            return _raised[key]
        if served:
            outcome = Outcome.now(wrong)
            records.write(kind, outcome)
            reason = None if wrong is None else _wrong_text(records, device, outcome)
        elif kind.dtype != torch.bfloat16:  # what it serves of these, it multiplies in half precision
            half = (*key[:3], torch.bfloat16, kind.size)
            if half not in _right and half not in _unchecked:
                reason = _raised.get(half) or _checked(backend, replace(kind, dtype=torch.bfloat16), device)
            if half in _raised:
                _raised[key] = _raised[half]
            if half in _unchecked:
                _unchecked.add(key)
            if half not in _right:  # or there was too little memory to know
                return reason
        else:
            log_once(
                logger,
                f"The {backend.name} kernels compute {kind.operation} unchecked, as they serve none of the problems of "
                f"their self-check ({kind}).",
            )
            _unchecked.add(key)
            return None
    if reason is None:
        _right.add(key)
        return None
    _wrong[key[:2]] = reason
    for other in [other for other in _right if other[:2] == key[:2]]:
        _right.discard(other)
    return reason


def _compare(backend: Backend, kind: Kind, device: torch.device) -> tuple[bool, str | None]:
    """Returns if a library serves any case of a kind, and what it computes wrongly of them, or None.

    It must be called in a fresh context.
    """
    served, multiprocessors = False, _multiprocessors(device) if backend.self_checked == "thoroughly" else None
    with _undisturbed(device):
        for case in cases.cases(kind.operation, kind.dtype, kind.size, multiprocessors):
            problem = cases.moved(case.problem, device)
            if backend.why_not(kind.operation, problem) is None:
                served = True
                wrong = _fault_of(backend, case, problem)
                if wrong is not None:
                    return served, f"{kind}, {case.name}: {wrong}"
    return served, None


def _fault_of(backend: Backend, case: cases.Case, problem: Problem) -> str | None:
    """Returns what a library computes wrongly of a case, a problem on the device, or None."""
    judged_on = problem.device if case.operation == "contrastive" else _CPU
    exact = case.values(BlockwiseBackend().operations, cases.moved(problem, judged_on, torch.float64))
    with settings.override(block_bytes=case.block_bytes):
        found = case.values(backend.operations, problem)
        again = case.values(backend.operations, problem) if case.large else found
    for value, right in zip(found, exact, strict=True):
        wrong = cases.fault(value, right)
        if wrong is not None:
            return wrong
    for value, second in zip(found, again, strict=True):
        if not torch.equal(value.tensor, second.tensor):
            return f"{value.name} has other bits when it is computed again"
    return None


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _out_of_memory(error: Exception) -> bool:
    """Returns True if there was too little memory: torch's, a library's of the vendor, or that of the CPU."""
    text = str(error)
    return is_out_of_memory(error) or "out of memory" in text or "ALLOC_FAILED" in text


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Keeps what the caller has switched on from a block of code: gradients, autocast, modes, settings.

    And the complaints about waiting for the device, which reading the results does.
    """
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
        without_autocast(device),
        without_autocast(_CPU),
        settings.override(matmul="float32", weights=None, autotune=False, block_bytes=None),
    ):
        if device.type != "cuda":
            yield
            return
        complaints = torch.cuda.get_sync_debug_mode()
        try:
            if complaints:  # to set it warns, so that it is left alone where it is off
                torch.cuda.set_sync_debug_mode(0)
            with torch.cuda.device(device):
                yield
        finally:
            if complaints:
                torch.cuda.set_sync_debug_mode(complaints)
