"""Finds the fastest of several ways by running each of them once for each kind of call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from triton.runtime.errors import OutOfResources

logger = logging.getLogger(__name__)
Candidate = TypeVar("Candidate", bound=Hashable)

_fastest: dict[Hashable, Any] = {}


def fastest(
    key: Hashable,
    candidates: Sequence[Candidate],
    run: Callable[[Candidate], object],
    device: torch.device,
    usual: Candidate,
) -> Candidate:
    """Returns the candidate with the shortest run; found once for each key in a process, by running all of them.

    One that needs more of the device than it has is passed over. While a CUDA graph is captured nobody can wait: the
    ``usual`` one is returned unless the fastest is known.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _fastest.get(key, usual)
    if key not in _fastest:
        seconds: dict[Candidate, float] = {}
        for candidate in candidates:
            try:
                run(candidate)  # compiles
                seconds[candidate] = min(_seconds(run, candidate, device) for _ in range(3))
            except (OutOfResources, torch.OutOfMemoryError) as error:
                logger.info("%s is passed over: %s", candidate, error)
        _fastest[key] = min(seconds, key=seconds.__getitem__, default=usual)
        logger.info("%s is the fastest, of %s", _fastest[key], {way: f"{1e3 * s:.3g} ms" for way, s in seconds.items()})
    return _fastest[key]


def _seconds(run: Callable[[Candidate], object], candidate: Candidate, device: torch.device) -> float:
    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begin = finished()
    run(candidate)
    return finished() - begin
