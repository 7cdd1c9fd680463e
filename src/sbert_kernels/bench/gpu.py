"""Benchmark on one GPU: parity, then time and peak memory of our kernels against their peers.

Losses run as users run them: the class, its forward, loss.backward(), on embeddings that exist already. The jobs that
say most in the least time come first; what a row will take is foreseen from smaller sizes, and one that would not end
in `--seconds` is listed as not run, like a peer's call that is too long. A peer that takes five times as long as ours
is not timed again at a larger size. Errors and running out of memory are results. An interrupt (SIGINT) ends the
measurements, and what there is by then is written.

Ours is computed by the backend that a user gets: the CUDA library where it serves, else the Triton kernels. Where there
are both, the sizes of the project's goals are timed by each, first of all.

Rates count three matrix products, 6 N^2 D operations, whatever an implementation really computes; they are read against
the same three products by the vendor's library. Peak memory is that of one call, gradients included. The host's time is
that of calls which follow one another without waiting for the card. Which of the project's own goals a run meets says
``python -m benchmarks.goals`` in a clone.

    python -m sbert_kernels bench gpu [--quick] [--seconds 240] [--output benchmarks/results/h200]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from sbert_kernels import machine
from sbert_kernels.backends import BACKENDS
from sbert_kernels.backends.triton import why_not_on
from sbert_kernels.bench import gpu_peers, harness
from sbert_kernels.bench.cases.gpu import KINDS, WITHOUT_JOBS
from sbert_kernels.bench.gpu_compile import compile_ahead
from sbert_kernels.bench.gpu_jobs import OURS_COLUMN, Job, plan
from sbert_kernels.bench.gpu_pace import Budget, reason, release
from sbert_kernels.bench.gpu_rows import RUNNERS
from sbert_kernels.bench.gpu_steps import Bench, backend_of
from sbert_kernels.bench.report import Chart, Report

COMMAND = "python -m sbert_kernels bench gpu"
AROUND_SECONDS = 25.0  # for imports before the first job, and for pictures after the last one


@dataclass
class Run:
    """Runs jobs while there is time, and gathers their rows."""

    bench: Bench
    reports: dict[str, Report]
    failed: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    def run(self, jobs: Iterable[Job], say: Callable[[str], None] = lambda text: None) -> None:
        """Runs what there is time for. A row with a note is one in which something of ours failed."""
        for job in jobs:
            name = f"{job.kind}: {job.name}"
            if self.bench.budget.left() < self.bench.pace.row_seconds(job):
                self.not_run.append(name)
                continue
            say(name)
            try:
                with machine.matmul_precision(job.precision):
                    row = RUNNERS[job.kind](self.bench, job)
            except Exception as error:
                row = job.columns | {OURS_COLUMN.get(job.kind, "ours ms"): reason(error), "note": reason(error)}
            if len(self.bench.backends) > 1 and job.peer is None:
                row["backend"] = backend_of(self.bench, job) or "as chosen"
            if "note" in row:
                self.failed.append(f"{name}: {row['note']}")
            self._add(job, row)
            release()

    def _add(self, job: Job, row: dict[str, Any]) -> None:
        """Adds a row to the report of its kind, and what it says of memory to the report of that."""
        for kind, source in WITHOUT_JOBS.items():
            if job.kind == source:
                memory = {key: row.pop(key) for key in list(row) if key.endswith(" MiB")}
                self.reports[kind].rows += [job.columns | memory] if memory else []
        self.reports[job.kind].rows.append(row)


def new_reports() -> dict[str, Report]:
    """Returns an empty report for each kind of row."""
    pair = {"ours": "ours ms", "eager": "eager ms"}
    peers = {"torch.compile": "compiled ms", **{name: f"{name} ms" for name in gpu_peers.PEERS}}
    charts = {
        "parity": Chart("error against float64", {"ours": "ours error", "eager": "eager error"}),
        "backends": Chart("ms, median (times ours)", {"ours": "ours ms", "cuda": "cuda ms", "triton": "triton ms"}),
        "host": Chart("us of the host a step (times ours)", {"ours": "ours host us", "eager": "eager host us"}),
        "contrastive": Chart("ms, median (times ours)", pair | peers),
        "memory": Chart("MiB, peak extra memory (times ours)", {"ours": "ours MiB", "eager": "eager MiB"}),
        "weights": Chart("ms, median (times ours)", {"ours": "ours ms", "sweep": "sweep ms", "weigh": "weigh ms"}),
        "losses": Chart("ms, median (times ours)", pair),
        "training": Chart("ms, median (times ours)", pair),
        "sigmoid": Chart("ms, median", {"our softmax": "ours ms", "their sigmoid": f"{gpu_peers.SIGMOID} ms"}),
    }
    facts = machine.facts() | gpu_peers.versions()
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
    print(machine.line())
    bench = Bench("cuda", args.repeats, Budget(args.seconds - AROUND_SECONDS), backends=tuple(backends_here()))
    conclude(Run(bench, new_reports()), args)


def backends_here(device: str = "cuda") -> list[str]:
    """Returns the names of our backends that run on a GPU, the preferred one first; says of each other why not."""
    found = []
    for backend in BACKENDS:
        if backend.device == "cuda":
            why_not = backend.why_not_on(device, True)
            if why_not is None:
                found.append(backend.name)
            else:
                print(f"the {backend.name} backend is not there: {why_not}")
    return found


def chosen(jobs: Iterable[Job], kinds: Sequence[str]) -> list[Job]:
    """Returns the jobs of some kinds that can run, and the checks of the peers that those are timed with."""
    with_peers = any(job.peers for job in jobs if job.kind in kinds)
    absent = () if machine.version(gpu_peers.SIGMOID) else ("sigmoid",)
    wanted = [kind for kind in kinds if kind not in absent]
    return [job for job in jobs if job.kind in wanted or (job.peer is not None and with_peers)]


def conclude(run_: Run, args: argparse.Namespace, jobs: Sequence[Job] | None = None) -> None:
    """Runs the jobs, prints and writes the reports; exits non-zero at the end if a row of ours failed."""
    bench = run_.bench
    bench.peers, bench.missing = gpu_peers.load()
    if jobs is None:
        jobs = chosen(plan(tuple(bench.peers), args.quick, bench.backends), args.kinds)
    for text in (gpu_peers.advice(bench.missing), compile_ahead(bench, jobs)):
        if text:
            print(text)
    with tqdm(jobs, file=sys.stderr) as progress:
        try:
            run_.run(progress, progress.set_description)
        except KeyboardInterrupt:
            print("interrupted: what was measured so far is written")
    for report in run_.reports.values():
        if report.rows:
            harness.finish(report, args.output, [])
    if run_.not_run:
        print("\nnot run: there was no time for it", *run_.not_run, sep="\n  ")
    if run_.failed:
        raise SystemExit("\n  ".join(["failed", *run_.failed]))
