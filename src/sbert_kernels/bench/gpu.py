"""Benchmark on one GPU: parity, then time and peak memory of the Triton kernels against their peers.

Losses run as users run them: the class, its forward, loss.backward(), on embeddings that exist already. Jobs run in
order of importance until `--minutes` are spent; what is left then is listed as not run. Errors and running out of
memory are results. Rates count three matrix products, 6 N^2 D operations, whatever an implementation really computes;
they are read against the same three products by the vendor's library. Which of the project's own goals a run meets
says ``python -m benchmarks.goals`` in a clone.

    python -m sbert_kernels bench gpu [--quick]
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sbert_kernels import contrastive_loss, machine, settings
from sbert_kernels.backends.triton import why_not_on
from sbert_kernels.bench import contrastive, gpu_peers, harness, ranking
from sbert_kernels.bench.cases.gpu import KINDS
from sbert_kernels.bench.gpu_jobs import LEAST_SECONDS, NOT_RUN, OURS_COLUMN, Budget, Job, Pace, in_batch, plan
from sbert_kernels.bench.peers import compiled, gradients_of, largest_error
from sbert_kernels.bench.report import Chart, Report
from sbert_kernels.workloads.recipes import OURS, STOCK

# What roundings alone may add to twice eager's error, which luck can make small.
FEW_ROUNDINGS = {"bfloat16": 2**-7, "float32": 2**-21}
PEER_LIMIT = 0.1  # bfloat16 errors are of a percent or two
LONG_SECONDS, LONG_ROUNDS = 0.1, 3  # calls that take longer are repeated so often
ROW_SECONDS = 6.0  # no further round of a row starts after them
# Entries of the largest matrix in a measurement of the vendor's products: 2 GiB in bfloat16.
GEMM_ENTRIES = 2**30
COMPILE_SHARE = 0.25  # of the time, at most, until the last compilation ahead of its use begins
COMMAND = "python -m sbert_kernels bench gpu"


# -- running jobs -----------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Holds what the jobs share, and runs them."""

    device: str
    repeats: int
    budget: Budget
    backend: str | None = "triton"
    peers: dict[str, gpu_peers.CrossEntropy] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # why a peer is not among them
    pace: Pace = field(default_factory=Pace)
    failed: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    reports: dict[str, Report] = field(default_factory=dict)

    def run(self, jobs: Iterable[Job], say: Callable[[str], None] = lambda text: None) -> None:
        """Runs what there is time for. A row with a note is one in which something of ours failed."""
        for job in jobs:
            if self.budget.left() < LEAST_SECONDS[job.kind]:
                self.not_run.append(f"{job.kind}: {job.name}")
                continue
            say(f"{job.kind}: {job.name}")
            try:
                with machine.matmul_precision(job.precision):
                    row = _RUNNERS[job.kind](self, job)
            except Exception as error:
                row = job.columns | {OURS_COLUMN[job.kind]: reason(error), "note": reason(error)}
            if "note" in row:
                self.failed.append(f"{job.kind}: {job.name}: {row['note']}")
            self.reports[job.kind].rows.append(row)
            _release()


def reason(error: BaseException) -> str:
    """Returns an exception in one line."""
    if machine.is_out_of_memory(error):
        return machine.OUT_OF_MEMORY
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else repr(error)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# -- parity -----------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Computes our in-batch loss where documents of one id are no negatives of one another's queries."""

    def forward(self, features: list[dict[str, Tensor]], labels: None) -> Tensor:
        """Returns the loss; every two rows have the same document id."""
        queries, documents = (column["embedding"] for column in features)
        return contrastive_loss(queries, documents, duplicates="mask", document_ids=_ids(len(documents), documents))


def _ids(rows: int, like: Tensor) -> Tensor:
    return torch.arange(rows, device=like.device) // 2


def _masked_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Returns stock's similarities (N, N), with the same exclusions."""
    from sentence_transformers.util import cos_sim

    ids = _ids(len(b), b)
    own = torch.eye(len(b), dtype=torch.bool, device=b.device)
    return cos_sim(a, b).masked_fill((ids[:, None] == ids) & ~own, -math.inf)


def loss_of(library: str, job: Job) -> nn.Module:
    """Returns the loss of a job out of a library (the name of a module)."""
    if job.mask and library == OURS:
        return Masked()
    case = replace(job.in_batch, options={"similarity_fct": _masked_similarity}) if job.mask else job.in_batch
    return contrastive.make_loss(library, case)


def parity_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns the row of a parity job: errors of ours, by each strategy, and of eager in the same dtype."""
    errors: dict[str, float] = {}
    if isinstance(job.case, ranking.Case):
        errors["ours"], eager, _ = ranking.parity(job.case, bench.device)
    else:
        case = job.in_batch
        inputs = contrastive.make_inputs(case, contrastive.dtype_of(case), bench.device)
        exact = _loss_and_gradients(loss_of(STOCK, job), case, inputs, torch.float64)
        eager = largest_error(_loss_and_gradients(loss_of(STOCK, job), case, inputs), exact)
        for strategy in settings.STRATEGIES:
            with settings.override(backend=bench.backend, strategy=strategy):
                errors[strategy] = largest_error(_loss_and_gradients(loss_of(OURS, job), case, inputs), exact)
    row = {**job.columns, **{f"{name} error": error for name, error in errors.items()}}
    limit = 2 * eager + FEW_ROUNDINGS[job.columns["dtype"]]
    row |= {"eager error": eager, "limit": limit, "verdict": "pass"}
    wrong = [f"{name} error {error:.2g} above {limit:.2g}" for name, error in errors.items() if not error <= limit]
    return row | ({"verdict": "FAIL", "note": "; ".join(wrong)} if wrong else {})


def _loss_and_gradients(
    loss: nn.Module, case: contrastive.Case, inputs: list[dict[str, Tensor]], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Returns loss and gradients in float64; computed in `dtype`, or in the inputs' own."""
    columns = [{key: value.to(dtype or value.dtype) for key, value in column.items()} for column in inputs]
    step, leaves = contrastive.make_step(loss, case, columns)
    return [step().double(), *(gradient.double() for gradient in gradients_of(leaves))]


def check_peers(bench: Bench) -> Iterable[dict[str, Any]]:
    """Yields a row with the error of each peer; peers that compute something else are not timed."""
    case = in_batch(1024, 384)
    inputs = contrastive.make_inputs(case, torch.bfloat16, bench.device)
    exact = _loss_and_gradients(contrastive.make_loss(STOCK, case), case, inputs, torch.float64)
    for name, cross_entropy in list(bench.peers.items()):
        row: dict[str, Any] = {"case": f"{name}, N={case.batch} D={case.dim} {case.dtype}", "limit": PEER_LIMIT}
        try:
            loss = gpu_peers.InBatchLoss(cross_entropy, case.scale)
            error = largest_error(_loss_and_gradients(loss, case, inputs), exact)
            row |= {"peer error": error}
            wrong = None if error <= PEER_LIMIT else f"wrong result: error {error:.2g}"
        except Exception as error:
            wrong = reason(error)
        if wrong:
            del bench.peers[name]
            bench.missing[name] = wrong
        yield row | {"verdict": wrong or "pass"}


# -- time of the in-batch loss ----------------------------------------------------------------------------------------


def too_large(case: contrastive.Case, free_bytes: float) -> str | None:
    """Returns what one N x N matrix needs if it alone cannot fit, or None; eager torch holds several."""
    needed = case.batch * case.batch * (1 + case.negatives) * contrastive.dtype_of(case).itemsize
    return f"needs {needed / 2**30:.3g} GiB" if needed > free_bytes else None


def free_bytes() -> float:
    """Returns the bytes that torch can still allocate."""
    if not torch.cuda.is_available():
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


Make = Callable[[], Callable[[], object]]


def contenders(bench: Bench, job: Job) -> dict[str, Make | str]:
    """Returns how to make the step of each contender, or why there is none."""
    case = job.in_batch
    inputs = contrastive.make_inputs(case, contrastive.dtype_of(case), bench.device)

    def step_of(loss: nn.Module) -> Callable[[], Tensor]:
        return contrastive.make_step(loss, case, inputs)[0]

    def compiled_step() -> Callable[[], object]:
        step, why_not = compiled(contrastive.make_loss(STOCK, case), step_of)
        if step is None:
            raise RuntimeError(why_not)
        return step

    def ours(strategy: str) -> Callable[[], object]:
        step = step_of(contrastive.make_loss(OURS, case))

        def run() -> object:
            with settings.override(backend=bench.backend, strategy=strategy):
                return step()

        return run

    matrix = too_large(case, free_bytes())
    found: dict[str, Make | str] = {strategy: partial(ours, strategy) for strategy in settings.STRATEGIES}
    found["eager"] = matrix or (lambda: step_of(contrastive.make_loss(STOCK, case)))
    if job.peers:
        found["compiled"] = matrix or compiled_step
        for name, cross_entropy in bench.peers.items():
            half_only = gpu_peers.PEERS[name].half_only and case.dtype == "float32"
            loss = gpu_peers.InBatchLoss(cross_entropy, case.scale)
            found[name] = "no float32" if half_only else partial(step_of, loss)
        found |= bench.missing
    return found


def timed(
    makes: Mapping[str, Make | str],
    repeats: int,
    budget: Budget,
    expected: Callable[[str], float] = lambda name: 0.0,
) -> dict[str, machine.Timing]:
    """Times in one process what can be made and run, and that there is time for; says of the rest why not.

    Each contender first runs by itself, so that what breaks one is no matter to the others.
    """
    results: dict[str, machine.Timing] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, make in makes.items():
        if isinstance(make, str):
            results[name] = machine.Timing(error=make)
            continue
        if 2 * expected(name) > budget.left():
            results[name] = machine.Timing(error=f"{NOT_RUN}: some {expected(name):.1f} s a call")
            continue
        try:
            step = make()
            results[name] = machine.measure({name: step}, repeats=1)[name]
        except Exception as error:
            results[name] = machine.Timing(error=reason(error))
        if results[name].error:
            _release()
        else:
            steps[name] = step
    seconds = [results[name].median_s for name in steps]
    room = min(ROW_SECONDS, budget.left())
    if steps and sum(seconds) < room:
        rounds = min(repeats, LONG_ROUNDS) if max(seconds) > LONG_SECONDS else repeats
        results |= machine.measure(steps, repeats=rounds, warmup=0, budget_s=room)
    return results


def gemm_rate(case: contrastive.Case, device: str) -> float:
    """Returns the operations a second of the vendor's three products of a step, of as many rows as fit."""
    n, m, dim, dtype = case.batch, case.batch * (1 + case.negatives), case.dim, contrastive.dtype_of(case)
    n = min(n, max(1, GEMM_ENTRIES // m))
    seconds = sum(
        machine.gemm_seconds(*shape, dtype, repeats=3, device=device)
        for shape in ((n, m, dim), (n, dim, m), (m, dim, n))  # [n, D] @ [D, M], [n, M] @ [M, D], [M, n] @ [n, D]
    )
    return 6.0 * n * m * dim / seconds


def chosen_strategy(case: contrastive.Case) -> str:
    """Returns the strategy that the cost model takes for an in-batch case."""
    from sbert_kernels.backends.triton import contrastive as kernels
    from sbert_kernels.problems.contrastive import ContrastiveProblem, ContrastiveSpec, Needs
    from sbert_kernels.problems.scale import Scale

    embeddings = torch.empty(case.batch, case.dim, dtype=contrastive.dtype_of(case), device="meta")
    spec = ContrastiveSpec(dims=(case.dim,), dim_weights=(1.0,))
    problem = ContrastiveProblem(embeddings, (embeddings,) * (1 + case.negatives), Scale(case.scale), spec=spec)
    return kernels.choose_strategy(problem, Needs(queries=True, documents=True))


def columns_of(
    case: contrastive.Case, timings: Mapping[str, machine.Timing], chosen: str, rate: float
) -> dict[str, Any]:
    """Returns the columns of a row of the in-batch loss. Ours is the strategy that the cost model chose."""
    timings = {"ours": timings[chosen], **timings}
    row: dict[str, Any] = {f"{name} ms": timing.error or 1e3 * timing.median_s for name, timing in timings.items()}
    ours = timings["ours"].median_s
    others = [name for name in timings if name not in ("ours", *settings.STRATEGIES)]
    row |= {f"{name}/ours": timings[name].median_s / ours for name in others}
    ran = [name for name in settings.STRATEGIES if timings[name].samples] or [chosen]
    faster = min(ran, key=lambda name: timings[name].median_s)
    done = 6.0 * case.batch * case.batch * (1 + case.negatives) * case.dim / ours
    row |= {"chosen": chosen, "faster": faster, "chosen/faster": ours / timings[faster].median_s}
    row |= {"TFLOP/s": done / 1e12, "GEMM TFLOP/s": rate / 1e12, "% of GEMM": 100 * done / rate}
    return row | {f"{name} samples ms": [1e3 * s for s in timing.samples] for name, timing in timings.items()}


def contrastive_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns times, ratios, and which share of the vendor's rate ours reaches."""
    case = job.in_batch
    timings = timed(contenders(bench, job), bench.repeats, bench.budget, lambda name: bench.pace.seconds(name, case))
    for name, timing in timings.items():
        if timing.samples:
            bench.pace.note(name, case, timing.median_s)
    _release()
    row = job.columns | columns_of(case, timings, chosen_strategy(case), gemm_rate(case, bench.device))
    return row | note_of({name: timings[name] for name in settings.STRATEGIES})


def note_of(timings: Mapping[str, machine.Timing]) -> dict[str, str]:
    """Returns the column that says which of ours failed, if any did."""
    errors = {name: timing.error for name, timing in timings.items() if timing.error}
    broken = [f"{name}: {error}" for name, error in errors.items() if not error.startswith(NOT_RUN)]
    return {"note": "; ".join(broken)} if broken else {}


# -- the other jobs ---------------------------------------------------------------------------------------------------


def memory_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns the peak extra memory of ours and of eager torch, each in a process of its own."""
    case, row = job.in_batch, job.columns
    dtype = contrastive.dtype_of(case)
    matrix = too_large(case, free_bytes())
    for name, library in (("ours", OURS), ("eager", STOCK)):
        if name == "eager" and matrix:
            row["eager MiB"] = matrix
            continue
        try:
            result = machine.run_in_process(contrastive.prepare, library, case, dtype, bench.device)
            row[f"{name} MiB"] = result.cell
        except RuntimeError as error:  # its last line is what was raised in there
            row[f"{name} MiB"] = str(error).strip().splitlines()[-1]
    row["gradients MiB"] = 2 * case.batch * case.dim * dtype.itemsize / machine.MIB
    return row | ({"note": row["ours MiB"]} if isinstance(row["ours MiB"], str) else {})


def losses_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns the times of a ranking loss or of Matryoshka's, ours and eager."""
    case = job.case

    def step_of(library: str) -> Callable[[], object]:
        if isinstance(case, ranking.Case):
            return ranking.make_step(ranking.make_loss(library, case), *ranking.make_inputs(case, bench.device))[0]
        inputs = contrastive.make_inputs(case, contrastive.dtype_of(case), bench.device)
        return contrastive.make_step(contrastive.make_loss(library, case), case, inputs)[0]

    makes: dict[str, Make | str] = {"ours": partial(step_of, OURS), "eager": partial(step_of, STOCK)}
    if isinstance(case, contrastive.Case):
        makes["eager"] = too_large(case, free_bytes()) or makes["eager"]
    timings = timed(makes, bench.repeats, bench.budget)
    row = job.columns | {f"{name} ms": timing.error or 1e3 * timing.median_s for name, timing in timings.items()}
    row["eager/ours"] = timings["eager"].median_s / timings["ours"].median_s
    row |= {f"{name} samples ms": [1e3 * s for s in timing.samples] for name, timing in timings.items()}
    return row | note_of({"ours": timings["ours"]})


_RUNNERS = {"parity": parity_row, "contrastive": contrastive_row, "memory": memory_row, "losses": losses_row}


def compile_ahead(bench: Bench, jobs: Sequence[Job]) -> str | None:
    """Fills Triton's cache from several processes, on small inputs of each kind; returns what went wrong, or None.

    A kernel takes a core some seconds to compile, and there are hundreds: one after the other the GPU would wait for
    most of the time there is. What fails here fails again where it is measured, and is reported there.
    """
    unique: dict[Any, Job] = {}
    for job in jobs:
        if job.kind == "parity":
            unique.setdefault((job.kind, job.name), job)
        elif isinstance(job.case, contrastive.Case) and job.kind != "memory":
            small = replace(
                job, case=replace(job.case, batch=512), peers=False
            )  # sizes divide by 16, as the large ones
            unique.setdefault((job.kind, small.name), small)
    workers = min(16, os.cpu_count() or 1, len(unique))
    if workers < 2:
        return None
    until = time.time() + COMPILE_SHARE * bench.budget.left()
    compile_one = partial(_compile, bench.device, bench.backend, until)
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(compile_one, unique.values()))
    except Exception as error:  # a process that died
        return f"compiling ahead of time: {reason(error)}"
    wrong = [text for text in found if text]
    return f"compiling ahead of time: {len(wrong)} of {len(unique)} failed, the first by {wrong[0]}" if wrong else None


def _compile(device: str, backend: str | None, until: float, job: Job) -> str | None:
    """Starts the kernels of a job once, unless it is too late for it; returns why it could not."""
    if time.time() > until:
        return None
    torch.set_num_threads(1)
    try:
        with machine.matmul_precision(job.precision):
            if isinstance(job.case, ranking.Case):
                ranking.parity(job.case, device)
                return None
            inputs = contrastive.make_inputs(job.in_batch, contrastive.dtype_of(job.in_batch), device)
            for strategy in settings.STRATEGIES:
                with settings.override(backend=backend, strategy=strategy):
                    _loss_and_gradients(loss_of(OURS, job), job.in_batch, inputs)
    except Exception as error:
        return reason(error)
    return None


# -- the command ------------------------------------------------------------------------------------------------------


def new_reports() -> dict[str, Report]:
    """Returns an empty report for each kind of job."""
    names = {"ours": "ours ms", "eager": "eager ms", "torch.compile": "compiled ms"}
    times = Chart("ms, median (times ours)", {**names, **{name: f"{name} ms" for name in gpu_peers.PEERS}})
    charts = {
        "parity": Chart("error against float64", {"tiled": "tiled error", "eager": "eager error"}),
        "contrastive": times,
        "memory": Chart("MiB, peak extra memory (times ours)", {"ours": "ours MiB", "eager": "eager MiB"}),
        "losses": Chart("ms, median (times ours)", {"ours": "ours ms", "eager": "eager ms"}),
    }
    facts = machine.facts() | {p.distribution: machine.version(p.distribution) for p in gpu_peers.PEERS.values()}
    return {
        kind: Report(f"On a GPU: {text}", f"gpu-{kind}", facts, machine.line(), charts=(charts[kind],))
        for kind, text in KINDS.items()
    }


def run(args: argparse.Namespace) -> None:
    """Runs the command: exits with status 2 where there is no GPU that the Triton kernels can use."""
    harness.begin(args)
    why_not = why_not_on("cuda", by_name=True) if torch.cuda.is_available() else "torch sees none"
    if why_not is not None:
        print(f"bench gpu needs a GPU ({why_not}); where there is one: {COMMAND}", file=sys.stderr)
        raise SystemExit(2)
    bench = Bench("cuda", args.repeats, Budget(60 * args.minutes), reports=new_reports())
    print(machine.line())
    jobs = [job for job in plan(args.quick) if job.kind in args.kinds]
    conclude(bench, jobs, args)


def conclude(bench: Bench, jobs: Sequence[Job], args: argparse.Namespace) -> None:
    """Runs the jobs, prints and writes the reports; exits non-zero at the end if a row of ours failed."""
    bench.peers, bench.missing = gpu_peers.load()
    for text in (gpu_peers.advice(bench.missing), compile_ahead(bench, jobs)):
        if text:
            print(text)
    bench.reports["parity"].rows.extend(check_peers(bench))
    with tqdm(jobs, file=sys.stderr) as progress:
        bench.run(progress, progress.set_description)
    for report in bench.reports.values():
        if report.rows:
            harness.finish(report, args.output, [])
    if bench.not_run:
        print("\nnot run: the time was spent", *bench.not_run, sep="\n  ")
    if bench.failed:
        raise SystemExit("\n  ".join(["failed", *bench.failed]))
