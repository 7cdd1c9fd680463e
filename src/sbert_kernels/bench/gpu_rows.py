"""How each kind of job of `bench gpu` is measured: a function that returns a row of its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sbert_kernels import machine, settings
from sbert_kernels.bench import contrastive, gpu_peers, gpu_training
from sbert_kernels.bench.gpu_jobs import NOT_RUN, Job, Training
from sbert_kernels.bench.gpu_pace import Make, Step, Timed, reason, release, timed
from sbert_kernels.bench.gpu_steps import (
    Bench,
    as_ours,
    backend_of,
    contenders,
    free_bytes,
    inputs_of,
    loss_and_gradients,
    loss_of,
    our_settings,
    ours,
    refused,
)
from sbert_kernels.bench.peers import largest_error
from sbert_kernels.workloads.recipes import OURS, STOCK

# What roundings alone may add to twice eager's error, which luck can make small; at scale 20, of which logits are
# multiples.
FEW_ROUNDINGS = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-21, "autocast bfloat16": 2**-7}
PEER_LIMIT = 0.1  # bfloat16 errors are of a percent or two
# Entries of the largest matrix in a measurement of the vendor's products: 2 GiB in bfloat16.
GEMM_ENTRIES = 2**30
HOST_CALLS, HOST_WARMUP = 50, 3


# -- parity -----------------------------------------------------------------------------------------------------------


def parity_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns errors of ours and of eager in the same type, both against float64."""
    if job.peer is not None:
        return _peer_row(bench, job, job.peer)

    def values(library: str, *, exact: bool = False) -> list[Tensor]:
        loss = loss_of(library, job, bench.device, exact=exact)
        return loss_and_gradients(loss, job, bench.device, torch.float64 if exact else None)

    exact = values(STOCK, exact=True)
    eager = largest_error(values(STOCK), exact)
    with settings.override(**our_settings(bench, job)):
        error = largest_error(values(OURS), exact)
    limit = 2 * eager + FEW_ROUNDINGS[job.dtype] * max(1.0, getattr(job.case, "scale", 20.0) / 20)
    row = {**job.columns, "ours error": error, "eager error": eager, "limit": limit, "verdict": "pass"}
    return row | ({} if error <= limit else {"verdict": "FAIL", "note": f"error {error:.2g} above {limit:.2g}"})


def _peer_row(bench: Bench, job: Job, name: str) -> dict[str, Any]:
    """Returns the error of a peer; one that computes something else is not timed, and no failure of ours."""
    row: dict[str, Any] = {"case": f"{name}, N={job.rows} D={job.dim} {job.dtype}", "limit": PEER_LIMIT}
    try:
        exact = loss_and_gradients(loss_of(STOCK, job, bench.device), job, bench.device, torch.float64)
        loss = bench.peers[name](job.in_batch)
        if isinstance(loss, str):
            raise ValueError(loss)
        error = largest_error(loss_and_gradients(loss, job, bench.device), exact)
        row |= {"peer error": error}
        wrong = None if error <= PEER_LIMIT else f"wrong result: error {error:.2g}"
    except Exception as error:
        wrong = reason(error)
    if wrong:
        del bench.peers[name]
        bench.missing[name] = wrong
    else:
        bench.checked.add(name)
    return row | {"verdict": wrong or "pass"}


# -- times ------------------------------------------------------------------------------------------------------------


def _timed(bench: Bench, job: Job, makes: Mapping[str, Make | str]) -> Timed:
    """Times the contenders of a job, and remembers how long they took."""
    found = timed(makes, bench.repeats, bench.budget, lambda name: bench.pace.seconds(name, job))
    bench.pace.note(job, found.timings)
    release()
    return found


def _columns(timings: Mapping[str, machine.Timing]) -> dict[str, Any]:
    """Returns the times, their ratios to ours, and the samples; a note where ours failed."""
    row: dict[str, Any] = {f"{name} ms": timing.error or 1e3 * timing.median_s for name, timing in timings.items()}
    our_seconds = timings["ours"].median_s
    row |= {f"{name}/ours": timing.median_s / our_seconds for name, timing in timings.items() if name != "ours"}
    row |= {f"{name} samples ms": [1e3 * s for s in timing.samples] for name, timing in timings.items()}
    error = timings["ours"].error
    return row | ({"note": error} if error and not error.startswith(NOT_RUN) else {})


def contrastive_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns times, ratios, which share of the vendor's rate ours reaches, and peak memory."""
    case = job.in_batch
    found = _timed(bench, job, contenders(bench, job, inputs_of(job, bench.device), free_bytes()))
    row = job.columns | _columns(found.timings)
    in_products = replace(case, dtype="bfloat16") if job.autocast else case
    rate = gemm_rate(in_products, bench.device)
    done = 6.0 * case.batch * case.batch * (1 + case.negatives) * case.dim / found.timings["ours"].median_s
    row |= {"TFLOP/s": done / 1e12, "GEMM TFLOP/s": rate / 1e12, "% of GEMM": 100 * done / rate}
    if found.peaks:
        row |= {f"{name} MiB": timing.error for name, timing in found.timings.items() if timing.error}
        row |= {f"{name} MiB": peak / machine.MIB for name, peak in found.peaks.items()}
        row["gradients MiB"] = 2 * case.batch * case.dim * contrastive.dtype_of(case).itemsize / machine.MIB
    return row


def gemm_rate(case: contrastive.Case, device: str) -> float:
    """Returns the operations a second of the vendor's three products of a step, of as many rows as fit."""
    n, m, dim, dtype = case.batch, case.batch * (1 + case.negatives), case.dim, contrastive.dtype_of(case)
    n = min(n, max(1, GEMM_ENTRIES // m))
    seconds = sum(
        machine.gemm_seconds(*shape, dtype, repeats=3, device=device)
        for shape in ((n, m, dim), (n, dim, m), (m, dim, n))  # [n, D] @ [D, M], [n, M] @ [M, D], [M, n] @ [n, D]
    )
    return 6.0 * n * m * dim / seconds


def losses_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns the times of another loss, ours and eager, and of the peers that have it."""
    found = _timed(bench, job, contenders(bench, job, inputs_of(job, bench.device), free_bytes()))
    return job.columns | _columns(found.timings)


def weights_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns the times of both ways of making the weights, and of the one that the library chooses ("ours")."""
    step_of = inputs_of(job, bench.device)

    def make(way: str | None) -> Make:
        return lambda: ours(bench, replace(job, way=way), step_of)

    timings = _timed(bench, job, {"ours": make(None), **{way: make(way) for way in settings.WEIGHTS}}).timings
    row = job.columns | _columns(timings)
    ran = [way for way in settings.WEIGHTS if timings[way].samples]
    if ran:
        faster = min(ran, key=lambda way: timings[way].median_s)
        row |= {"faster": faster, "ours/faster": timings["ours"].median_s / timings[faster].median_s}
    errors = {way: timings[way].error or NOT_RUN for way in settings.WEIGHTS if not timings[way].samples}
    broken = [f"{way}: {error}" for way, error in errors.items() if not error.startswith(NOT_RUN)]
    return row | ({"note": "; ".join(broken)} if broken and "note" not in row else {})


def backends_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns the times of each of our backends, and of the one that serves the job ("ours")."""
    step_of = inputs_of(job, bench.device)

    def make(name: str | None) -> Make:
        return lambda: ours(bench, replace(job, backend=name), step_of)

    timings = _timed(bench, job, {str(name): make(name) for name in bench.backends}).timings
    served = timings[str(backend_of(bench, job))]
    bench.pace.note(job, {"ours": served})
    row = job.columns | _columns({"ours": served, **timings})
    errors = {name: timing.error for name, timing in timings.items() if timing.error}
    failed = [f"{name}: {text}" for name, text in errors.items() if not text.startswith(NOT_RUN) and not refused(text)]
    return row | ({"note": "; ".join(failed)} if failed and "note" not in row else {})


def host_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns what the host takes for a step if it waits for nothing, and whole steps that do wait."""
    step_of = inputs_of(job, bench.device)
    steps = {"ours": ours(bench, job, step_of), "eager": step_of(loss_of(STOCK, job, bench.device))}
    row = dict(job.columns)
    for name, step in steps.items():
        for _ in range(HOST_WARMUP):
            step.call()
        row[f"{name} host us"] = 1e6 * machine.host_seconds(step.call, HOST_CALLS)
    timings = machine.measure({name: step.call for name, step in steps.items()}, repeats=bench.repeats)
    return row | _columns(timings)


def sigmoid_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns the time of another library's sigmoid loss, beside our softmax of the same shape."""
    step_of = inputs_of(job, bench.device)

    def sigmoid() -> Step:
        return step_of(gpu_peers.sigmoid_loss(bench.device))

    makes: dict[str, Make | str] = {"ours": lambda: ours(bench, job, step_of), gpu_peers.SIGMOID: sigmoid}
    return job.columns | _columns(_timed(bench, job, makes).timings)


def training_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns the times of whole training steps of a transformer through the gradient cache, and their peak memory."""
    case = job.case
    if not isinstance(case, Training):
        raise TypeError(f"case: got {job.name}, wanted a training")
    workload = gpu_training.workload(case, bench.device)

    makes: dict[str, Make | str] = {
        "ours": lambda: as_ours(bench, job, gpu_training.step(workload, OURS, case, bench.device)),
        "eager": lambda: gpu_training.step(workload, STOCK, case, bench.device),
    }
    found = _timed(bench, job, makes)
    row = job.columns | _columns(found.timings) | workload.facts
    return row | {f"{name} peak MiB": peak / machine.MIB for name, peak in found.peaks.items()}


Runner = Callable[[Bench, Job], dict[str, Any]]
RUNNERS: dict[str, Runner] = {
    "parity": parity_row,
    "backends": backends_row,
    "host": host_row,
    "contrastive": contrastive_row,
    "weights": weights_row,
    "losses": losses_row,
    "training": training_row,
    "sigmoid": sigmoid_row,
}
