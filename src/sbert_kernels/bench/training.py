"""Benchmark: whole training steps as a user runs them, with the stock losses and with ours, and what a step is made of.

The real SentenceTransformerTrainer trains a static-embedding model on the docstrings of the installed packages; the
demo's own model, text and Trainer arguments. Where the data is short of a batch for each step, it is repeated, and the
report says so. Each case checks parity first: the loss curves of both sides, from the same seed. Then it times short
trainings in the order A B A B ... in one process, and reads the peak extra memory of one in a process of its own. In
the "overlapped" cases a worker process tokenizes beside the step, as the Trainer's options allow. On the CPU only.

    python -m sbert_kernels bench training [--quick]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from sbert_kernels import machine
from sbert_kernels.bench import harness
from sbert_kernels.bench.cases.training import CASES, QUICK_BATCH, QUICK_DIM, QUICK_PACKAGES, Case
from sbert_kernels.bench.report import Report, StackedChart
from sbert_kernels.workloads import requirements
from sbert_kernels.workloads.recipes import LEARNING_RATES, SIDES, default_matryoshka_dims
from sbert_kernels.workloads.requirements import UserError

if TYPE_CHECKING:
    from sbert_kernels.workloads.steps import Recording
    from sbert_kernels.workloads.texts import Pair, Pairs

PARITY_STEPS = 2
# Rounding differs by parts in a million; what is wrong in a loss shows in percents.
PARITY_LIMIT = 1e-3


def run(args: argparse.Namespace) -> None:
    """Runs the cases, prints the table, writes the report; exits non-zero after it if a case failed parity."""
    if args.steps < 2:
        raise SystemExit(f"argument --steps: got {args.steps}, wanted at least 2, since the first warms up")
    cases = harness.begin(args, CASES)
    if args.quick:
        cases = {name: _quick(case) for name, case in cases.items()}
    try:
        requirements.require_packages()
        pairs = read_pairs(args.quick)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error

    from sbert_kernels.workloads.steps import PARTS

    rows = (args.steps + 1) * max(case.batch for case in cases.values())
    data = f"{len(pairs.pairs):,} pairs from {pairs.source}"
    if rows > len(pairs.pairs):
        data += f", repeated to {rows:,} rows"
    report = Report(
        f"Training steps, static-embedding model{', quick run' if args.quick else ''}",
        "training",
        machine.facts() | {"dtype": "float32", "data": data, "parts": PARTS},
        f"{machine.line(torch.float32)}\n{data}",
        charts=(StackedChart("ms of a step, median", {part: f"{part} ms" for part in PARTS}, ("case", "side")),),
    )
    print(report.machine_line)
    failed = []
    with tqdm(cases.items(), file=sys.stderr) as progress:
        for name, case in progress:
            texts = mixed_rows(pairs.pairs, (args.steps + 1) * case.batch)
            found = _run_case(name, case, texts, args, progress.set_description)
            if not all("step ms" in row for row in found):
                failed.append(name)
            report.rows += found
    harness.finish(report, args.output, failed)


def _quick(case: Case) -> Case:
    return replace(
        case,
        batch=QUICK_BATCH,
        dim=QUICK_DIM,
        matryoshka=default_matryoshka_dims(QUICK_DIM) if case.matryoshka else (),
    )


def read_pairs(quick: bool) -> Pairs:
    """Returns the docstring pairs of the installed packages, or of few of them."""
    from sbert_kernels.workloads import texts

    return texts.docstring_pairs(QUICK_PACKAGES) if quick else texts.docstring_pairs()


def mixed_rows(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Returns so many rows in a mixed order, repeated where there are too few.

    A training takes one batch fewer than they hold: the Trainer loads a batch ahead, in the last step as in any other.
    """
    shuffled = random.Random(0).sample(pairs, len(pairs))
    return list(itertools.islice(itertools.cycle(shuffled), count))


def _run_case(
    name: str, case: Case, pairs: list[Pair], args: argparse.Namespace, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    from sbert_kernels.workloads.steps import difference, median_step, whole

    rows: dict[str, dict[str, Any]] = {
        side: {"case": f"{name} N={case.batch} D={case.dim}", "side": side} for side in SIDES
    }
    say(f"{name}: parity")
    recordings, _ = _train_in_turn(case, pairs, PARITY_STEPS, 1, args.output)
    if all(recordings.values()):
        (stock,), (ours,) = recordings.values()
        error = difference(stock, ours)
        rows["sbert-kernels"]["parity"] = error
        if not error <= PARITY_LIMIT:
            note = f"not timed: the loss curves differ by {error:.2g}, wanted at most {PARITY_LIMIT:.2g}"
            return [row | {"note": note} for row in rows.values()]
    say(f"{name}: time")
    recordings, errors = _train_in_turn(case, pairs, args.steps, args.repeats, args.output)
    seconds = {}
    for side, row in rows.items():
        if errors[side]:
            row["step ms"] = errors[side]
            continue
        steps = [step for recording in recordings[side] for step in recording.warm_steps]
        step = median_step(steps)
        seconds[side] = whole(step)
        row |= {"step ms": whole(step) * 1e3, "stock/this": seconds.get("stock", math.nan) / whole(step)}
        row |= {f"{part} ms": value * 1e3 for part, value in step.items()}
        row |= {"pairs/s": case.batch / whole(step), "step samples ms": [whole(step) * 1e3 for step in steps]}
    if not case.workers:  # the worker's memory is the same on both sides, and not this process's
        for side, row in rows.items():
            say(f"{name}: memory of {side}")
            result = machine.run_in_process(prepare, side, case, pairs, PARITY_STEPS, args.output)
            row["peak extra MiB"] = result.cell
    return list(rows.values())


def _train_in_turn(
    case: Case, pairs: list[Pair], steps: int, repeats: int, output: Path
) -> tuple[dict[str, list[Recording]], dict[str, str | None]]:
    """Trains each side so often, in the order A B A B, from fresh models; returns also why a side stopped, if any."""

    recordings: dict[str, list[Recording]] = {side: [] for side in SIDES}

    def train(side: str) -> None:
        recordings[side].append(prepare(side, case, pairs, steps, output)())

    contenders = {side: functools.partial(train, side) for side in SIDES}
    timings = machine.measure(contenders, repeats=repeats, warmup=0)  # the first step of each training warms up
    return recordings, {side: timing.error for side, timing in timings.items()}


def prepare(side: str, case: Case, pairs: list[Pair], steps: int, output: Path) -> Callable[[], Recording]:
    """Returns a training of so many steps, ready to go; `run_in_process` meters it from its first step on."""
    from sbert_kernels.workloads import training
    from sbert_kernels.workloads.losses import in_batch_loss
    from sbert_kernels.workloads.models import static_model

    training.quiet_libraries()
    model = static_model(case.dim, seed=0)
    loss = in_batch_loss(model, SIDES[side], case.matryoshka)
    settings = training.Settings(case.batch, steps, LEARNING_RATES["static"], 0, output, case.workers)
    return training.prepare(model, loss, pairs, settings)
