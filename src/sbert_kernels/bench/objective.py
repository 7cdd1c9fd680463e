"""Benchmark: AnglE's objective on a model, as one loss of ours and as what a user of stock writes for it.

The objective is CoSENT plus in-batch negatives plus AnglE's angle loss. Stock has the three losses but nothing that
shares their embeddings: run one after the other on the same batch and summed, each encodes it anew. Ours is
`AnglEObjective`: one encoding, and one read of the embeddings for both rankings. A step is forward and backward from
features that are tokenized already, from gradients that are None; the model is in training mode.

Each case checks parity first, on the gradients of the model's parameters, and is not timed without it: in evaluation
mode, because each of stock's encodings draws dropout masks of its own. Then it times both sides in turn in one process
and reads the peak extra memory of each in a process of its own. Texts are docstrings of the installed packages, labels
are random. On the CPU only.

    python -m sbert_kernels bench objective [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sbert_kernels import machine
from sbert_kernels.bench import harness
from sbert_kernels.bench.cases.objective import CASES, QUICK_BATCH, Case
from sbert_kernels.bench.cases.training import QUICK_DIM
from sbert_kernels.bench.peers import (
    PARITY_LIMIT,
    features_of,
    gradient_difference,
    loss_and_gradients,
    make_step,
)
from sbert_kernels.bench.report import Chart, Report
from sbert_kernels.bench.training import mixed_rows, read_pairs
from sbert_kernels.workloads import requirements
from sbert_kernels.workloads.recipes import OURS, STOCK
from sbert_kernels.workloads.requirements import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from sbert_kernels.workloads.texts import Pair

SIDES = {"stock": STOCK, "ours": OURS}
STOCK_TERMS = ("CoSENTLoss", "MultipleNegativesRankingLoss", "AnglELoss")
# What stock's three losses compute: every pair is a positive one, and equal texts are not looked for.
OPTIONS = {"positive_threshold": None, "duplicates": "keep"}


def run(args: argparse.Namespace) -> None:
    """Runs the cases, prints the table, writes the report; exits non-zero after it if a case failed parity."""
    cases = harness.begin(args, CASES)
    if args.quick:
        cases = {name: replace(case, batch=QUICK_BATCH, dim=case.dim and QUICK_DIM) for name, case in cases.items()}
    try:
        requirements.require_packages()
        pairs = read_pairs(args.quick)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    data = f"{len(pairs.pairs):,} pairs from {pairs.source}"
    report = Report(
        f"AnglE's objective on a model: forward + backward{', quick run' if args.quick else ''}",
        "objective",
        machine.facts() | {"dtype": "float32", "data": data},
        f"{machine.line(torch.float32)}\n{data}",
        charts=(
            Chart("ms of a step, median (times ours)", {side: f"{side} ms" for side in ("ours", "stock")}),
            Chart("MiB, peak extra memory (times ours)", {side: f"{side} MiB" for side in ("ours", "stock")}),
        ),
    )
    print(report.machine_line)
    failed = []
    with tqdm(cases.items(), file=sys.stderr) as progress:
        for name, case in progress:
            texts = mixed_rows(pairs.pairs, case.batch)
            row = _run_case(name, case, texts, args.repeats, progress.set_description)
            if "ours ms" not in row:
                failed.append(name)
            report.rows.append(row)
    harness.finish(report, args.output, failed)


def _run_case(name: str, case: Case, pairs: Sequence[Pair], repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    row: dict[str, Any] = {"case": f"{name} N={case.batch}{f' D={case.dim}' if case.dim else ''}"}
    say(f"{name}: parity")
    model = build_model(case)
    batch = make_batch(model, pairs)
    steps = {side: make_step(model, make_losses(model, library), *batch) for side, library in SIDES.items()}
    model.eval()
    loss, gradients = zip(*(loss_and_gradients(model, step) for step in steps.values()), strict=True)
    row["loss difference"] = (abs(loss[1] - loss[0]) / abs(loss[0])).item()
    row["gradient difference"] = error = gradient_difference(*gradients)
    if not max(error, row["loss difference"]) <= PARITY_LIMIT:  # nan is no parity either
        return row | {"note": f"not timed: the sides differ by more than {PARITY_LIMIT:.2g}"}
    del gradients
    say(f"{name}: time")
    model.train()
    timings = machine.measure(steps, repeats=repeats)
    for side, timing in timings.items():
        row[f"{side} ms"] = timing.error or timing.median_s * 1e3
        row[f"{side} samples ms"] = [seconds * 1e3 for seconds in timing.samples]
    row["stock/ours"] = timings["stock"].median_s / timings["ours"].median_s
    for side, library in SIDES.items():
        say(f"{name}: memory of {side}")
        row[f"{side} MiB"] = machine.run_in_process(prepare, library, case, pairs).cell
    return row | {"gradients MiB": sum(p.nbytes for p in model.parameters() if p.requires_grad) / machine.MIB}


# -- what is run ------------------------------------------------------------------------------------------------------


def build_model(case: Case) -> SentenceTransformer:
    """Returns the model of the case."""
    from sbert_kernels.workloads import models

    return models.minilm_model() if case.dim is None else models.static_model(case.dim, seed=0)


def make_batch(model: SentenceTransformer, pairs: Sequence[Pair]) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Returns the features of both columns, and labels (N,) in [0, 1]."""
    return features_of(model, pairs), torch.rand(len(pairs), generator=torch.Generator().manual_seed(0))


def make_losses(model: SentenceTransformer, library: str) -> list[nn.Module]:
    """Returns the losses that add up to the objective, all with their default scales of 20."""
    losses = importlib.import_module(library)
    if library == OURS:
        return [losses.AnglEObjective(model, **OPTIONS)]
    return [getattr(losses, name)(model) for name in STOCK_TERMS]


def prepare(library: str, case: Case, pairs: Sequence[Pair]) -> Callable[[], float]:
    """Imports, builds the model, warms up on a tiny batch; returns the call that `run_in_process` meters."""
    model = build_model(case).train()
    losses = make_losses(model, library)
    make_step(model, losses, *make_batch(model, pairs[:8]))()
    model.zero_grad(set_to_none=True)  # the gradients count
    step = make_step(model, losses, *make_batch(model, pairs))
    return lambda: step().item()
