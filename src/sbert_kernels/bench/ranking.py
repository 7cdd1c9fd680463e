"""Benchmark: forward and backward of the ranking losses CoSENT and AnglE, from embeddings to gradients.

It runs what users run: the real class, its real forward, loss.backward(), on a model that returns embeddings which
exist already. Each case checks parity first, against stock in float64, and is not timed without it; then times stock,
torch.compile(stock) and ours in one process, every step from gradients that are None, as optimizers leave them; then
reads the peak extra memory of stock and of ours, each in a process of its own.

The floor is the time that the case's bytes take at the bandwidth of a large copy: x and y read twice (for the scores,
then for the gradients), dx and dy written once; of scores that exist already, scores and labels read and gradients
written once. A batch that fits the cache can be faster than that.

    python -m sbert_kernels bench ranking [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import operator
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sbert_kernels import machine, pairwise_similarity, ranking_loss
from sbert_kernels.bench import harness
from sbert_kernels.bench.cases.ranking import CASES, LARGE, PEERS, QUICK_ROWS, Case
from sbert_kernels.bench.peers import Embedded, compiled, gradients_of, largest_error
from sbert_kernels.bench.report import Chart, Report
from sbert_kernels.workloads.recipes import OURS, STOCK


def run(args: argparse.Namespace) -> None:
    """Runs the cases, prints the table, writes the report; exits non-zero after it if a case failed parity."""
    cases = harness.begin(args, CASES, LARGE)
    device = harness.device_of(args)
    bandwidth = machine.copy_bandwidth(device)
    copies = f"copies move {bandwidth / 1e9:.3g} GB/s, read and written"
    report = Report(
        f"Ranking losses: forward + backward{', quick run' if args.quick else ''}",
        "ranking",
        machine.facts() | {"device": device, "copy_bytes_per_s": bandwidth},
        f"{machine.line()}; {copies}",
        charts=(
            Chart(
                "ms, median (times ours)",
                {"ours": "ours ms", "stock": "stock ms", "torch.compile": "compiled ms", "floor": "floor ms"},
            ),
            Chart("MiB, peak extra memory (times ours)", {"ours": "ours MiB", "stock": "stock MiB"}),
        ),
    )
    print(report.machine_line)
    failed = []
    with tqdm(cases.items(), file=sys.stderr) as progress:
        for name, case in progress:
            if args.quick:
                case = replace(case, rows=min(case.rows, QUICK_ROWS), uncompiled="quick run")
            row = _run_case(name, case, device, args.repeats * case.rounds, bandwidth, progress.set_description)
            if "ours ms" not in row:
                failed.append(name)
            report.rows.append(row)
    harness.finish(report, args.output, failed)


def _run_case(
    name: str, case: Case, device: str, repeats: int, bandwidth: float, say: Callable[[str], None]
) -> dict[str, Any]:
    row: dict[str, Any] = {"case": f"{name} {case.size}", "dtype": case.dtype}
    say(f"{name}: parity")
    error, stock_error, limit = parity(case, device)
    row |= {"parity": error, "stock's own error": stock_error}
    if not error <= limit:
        return row | {"note": f"not timed: parity error {error:.2g}, wanted at most {limit:.2g}"}
    say(f"{name}: time")
    timings, why_not = _timings(case, device, repeats)
    for peer in PEERS:
        timing = timings.get(peer, machine.Timing())
        row[f"{peer} ms"] = timing.error or timing.median_s * 1e3
        row[f"{peer} samples ms"] = [seconds * 1e3 for seconds in timing.samples]
    ours = timings["ours"].median_s
    for peer in PEERS[:-1]:
        row[f"{peer}/ours"] = timings.get(peer, machine.Timing()).median_s / ours
    floor = case.moved_bytes / bandwidth
    row |= {"floor MiB": case.moved_bytes / machine.MIB, "floor ms": floor * 1e3, "ours/floor": ours / floor}
    for peer, library in (("stock", STOCK), ("ours", OURS)):
        say(f"{name}: memory of {peer}")
        row[f"{peer} MiB"] = machine.run_in_process(prepare, library, case, device).cell
    return row | {"gradients MiB": case.gradient_bytes / machine.MIB, "note": why_not}


# -- what is run ------------------------------------------------------------------------------------------------------


class Summed(nn.Module):
    """Sums losses of the same embeddings, computed one after the other, as users of stock write it."""

    def __init__(self, losses: list[nn.Module]) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """Returns the sum of the losses."""
        return reduce(operator.add, [loss(features, labels) for loss in self.losses])


class Fused(nn.Module):
    """Computes CoSENT plus AnglE from one read of the embeddings, by the operations under our classes."""

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Returns the sum of both losses."""
        x, y = (column["embedding"] for column in features)
        cosines, angles = pairwise_similarity(x, y, ("cos", "angle"))
        return ranking_loss(cosines, labels) + ranking_loss(angles, labels)


class Ranked(nn.Module):
    """Ranks scores that exist already, by our operation."""

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Returns the loss of scores that stand in the place of embeddings."""
        return ranking_loss(features[0]["embedding"], labels)


def given_scores(x: Tensor, _: Tensor) -> Tensor:
    """Returns its first argument: a similarity function for stock whose "embeddings" are the scores."""
    return x


def make_loss(library: str, case: Case) -> nn.Module:
    """The loss of the case out of a library (the name of a module), on a model that returns its inputs."""
    if library == OURS and case.dim is None:
        return Ranked()
    if library == OURS and len(case.losses) > 1:
        return Fused()
    module = importlib.import_module(library)
    options = {"similarity_fct": given_scores} if case.dim is None else {}
    losses = [getattr(module, name)(Embedded("embedding"), **options) for name in case.losses]
    return losses[0] if len(losses) == 1 else Summed(losses)


def make_inputs(case: Case, device: str) -> tuple[list[Tensor], Tensor | None]:
    """Columns of embeddings [N, D], or one of scores [N], and labels [N] in [0, 1] that they know something about.

    The cosine of a pair is 0.6 times its label plus noise of up to a tenth, as in the middle of training: at scale 20,
    pairs whose labels are far apart are in order, and the loss is made by those that are close.
    """
    generator = torch.Generator(device).manual_seed(0)
    labels = torch.rand(case.rows, device=device, generator=generator)
    if case.levels:
        labels = (labels * case.levels).floor() / case.levels

    def cosines_of(labels: Tensor | float) -> Tensor:
        return 0.6 * labels + 0.1 * torch.rand(case.rows, device=device, generator=generator)

    if case.dim is None:
        return [cosines_of(labels).to(getattr(torch, case.dtype))], labels

    shape = (case.rows, case.dim)

    def draw() -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    anchors = draw()
    columns = [anchors]
    # Of a triplet the positive counts as labelled 1 and the negatives as 0.
    wanted = [labels] if case.columns == 2 else [1.0, *[0.0] * (case.columns - 2)]
    for target in wanted:
        cosines = cosines_of(target)[:, None]
        columns.append(cosines * anchors + (1 - cosines.square()).sqrt() * draw())
    return [column.to(getattr(torch, case.dtype)) for column in columns], labels if case.columns == 2 else None


def make_step(
    loss: nn.Module, columns: list[Tensor], labels: Tensor | None
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Returns a call that runs forward and backward and returns the loss, and the leaves whose `.grad` it fills."""
    leaves = [column.clone().requires_grad_() for column in columns]
    features = [{"embedding": leaf} for leaf in leaves]
    if len(features) == 1:  # scores, which a loss of pairs takes for both of their columns
        features *= 2

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = loss(features, labels)
        value.backward()
        return value.detach()

    return step, leaves


def prepare(library: str, case: Case, device: str) -> Callable[[], float]:
    """Imports, warms up on a tiny batch, makes the inputs; returns the call that `run_in_process` meters."""
    loss = make_loss(library, case)
    make_step(loss, *make_inputs(replace(case, rows=64), device))[0]()
    step, _ = make_step(loss, *make_inputs(case, device))
    return lambda: step().item()


# -- what is measured -------------------------------------------------------------------------------------------------


def parity(case: Case, device: str) -> tuple[float, float, float]:
    """Returns (error of ours, error of stock, limit), against stock in float64 on the same rounded inputs.

    An error is the largest of the loss's and of each column's gradients, relative, in the Euclidean norm.
    """
    columns, labels = make_inputs(case, device)
    exact = _loss_and_gradients(STOCK, case, [column.double() for column in columns], labels)
    errors = {
        library: largest_error(_loss_and_gradients(library, case, columns, labels), exact) for library in (STOCK, OURS)
    }
    limit = 1e-3 if case.dtype == "float32" else max(2e-2, errors[STOCK])
    return errors[OURS], errors[STOCK], limit


def _loss_and_gradients(library: str, case: Case, columns: list[Tensor], labels: Tensor | None) -> list[Tensor]:
    step, leaves = make_step(make_loss(library, case), columns, labels)
    return [step().double(), *(gradient.double() for gradient in gradients_of(leaves))]


def _timings(case: Case, device: str, repeats: int) -> tuple[dict[str, machine.Timing], str | None]:
    """Returns the seconds of each of `PEERS` that there is; and why one is missing, if it is worth a note."""
    columns, labels = make_inputs(case, device)
    contenders = {"stock": make_step(make_loss(STOCK, case), columns, labels)[0]}
    if case.dtype != "float32":  # most who train in low precision have a loss in float32 to compare with
        wide = [column.float() for column in columns]
        contenders["stock float32"] = make_step(make_loss(STOCK, case), wide, labels)[0]
    why_not = f"not compiled: {case.uncompiled}" if case.uncompiled else None
    if not case.uncompiled:
        step, why_not = compiled(make_loss(STOCK, case), lambda loss: make_step(loss, columns, labels)[0])
        contenders |= {"compiled": step} if step else {}
    contenders["ours"] = make_step(make_loss(OURS, case), columns, labels)[0]
    return machine.measure(contenders, repeats=repeats), why_not
