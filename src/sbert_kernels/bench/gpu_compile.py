"""Compiles the Triton kernels of `bench gpu`, ours and the peers', ahead of their use, in several processes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch

from sbert_kernels import machine, settings
from sbert_kernels.bench.gpu_jobs import Job, small
from sbert_kernels.bench.gpu_pace import Budget, reason
from sbert_kernels.bench.gpu_peers import PEERS
from sbert_kernels.bench.gpu_steps import Bench, loss_and_gradients, loss_of, our_settings
from sbert_kernels.workloads.recipes import OURS

COMPILE_SHARE = 0.15  # of the time, at most, until the last compilation ahead of its use begins


def compile_ahead(bench: Bench, jobs: Sequence[Job]) -> str | None:
    """Fills Triton's cache from several processes, on small inputs of each kind; returns what went wrong, or None.

    A kernel takes a core some seconds to compile, and there are hundreds: one after the other the GPU would wait for
    most of the time there is. What fails here fails again where it is measured, and is reported there.
    """
    unique: dict[tuple[str, int], Job] = {}
    for job in jobs:
        for few in _small(bench, job):
            unique.setdefault((few.name, few.rows), few)
    workers = min(16, os.cpu_count() or 1, len(unique))
    if workers < 2:
        return None
    until = time.time() + COMPILE_SHARE * bench.budget.left()
    compile_one = partial(_compile, bench.device, bench.backends, until)
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(compile_one, unique.values()))
    except Exception as error:  # a process that died
        return f"compiling ahead of time: {reason(error)}"
    wrong = [text for text in found if text]
    return f"compiling ahead of time: {len(wrong)} of {len(unique)} failed, the first by {wrong[0]}" if wrong else None


def _small(bench: Bench, job: Job) -> list[Job]:
    """Returns the jobs on few rows that need the same kernels, of each backend where all are timed."""
    found = small(job)
    if found is None:
        return []
    return [replace(found, backend=name) for name in bench.backends] if job.kind == "backends" else [found]


def _compile(device: str, backends: tuple[str | None, ...], until: float, job: Job) -> str | None:
    """Starts the kernels of a job once, unless it is too late for it; returns why it could not."""
    if time.time() > until:
        return None
    torch.set_num_threads(1)
    bench = Bench(device, 1, Budget(0.0), backends=backends)
    try:
        with machine.matmul_precision(job.precision), settings.override(**our_settings(bench, job)):
            loss = loss_of(OURS, job, device) if job.peer is None else PEERS[job.peer].load()(job.in_batch)
            if not isinstance(loss, str):
                loss_and_gradients(loss, job, device)
    except Exception as error:
        return reason(error)
    return None
