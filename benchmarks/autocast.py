"""Benchmark: errors of the in-batch loss of float32 embeddings under autocast, beside those of stock's under autocast.

Each row is autocast's type, a batch and a scale; the numbers are root mean squares, over batches, of |x - exact| /
|exact| in the Euclidean norm, of the loss and of the gradients of queries and documents. `exact` is eager torch in
float64 on the same embeddings. In a batch that is "alike", any two embeddings have a cosine of about 0.8, as those of
an untrained encoder have; in a "random" one, of about 0.

    python -m benchmarks.autocast [--quick] [--backend NAME]
"""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor, nn
from tqdm import tqdm

from sbert_kernels import losses, machine, use_backend
from sbert_kernels.bench import arguments, harness
from sbert_kernels.bench.report import Chart, Report

DIM = 384
BATCHES = (512, 1024, 2048)
QUICK_BATCHES = (128,)
SCALES = (20.0, 100.0)
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# How long the direction that all embeddings share is, beside a part of length 1 of each one's own.
SHARED = {"random": 0.0, "alike": 2.0}
# As a gradient scaler has it: without one, float16 gradients of a whole batch's mean are subnormal numbers.
LOSS_FACTOR = 1024.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    parser.add_argument("--backend", help="of ours; default: as the library chooses")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch can use it")
    arguments.add_arguments(parser, quick=f"batches of {QUICK_BATCHES[0]}", repeats=5)


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes the report."""
    harness.begin(args)
    device = harness.device_of(args)
    batches = QUICK_BATCHES if args.quick else BATCHES
    by = f" by {args.backend}" if args.backend else ""
    report = Report(
        f"In-batch loss under autocast{by}: errors against float64, float32 embeddings, D={DIM}",
        f"accuracy-autocast{'-' if args.backend else ''}{args.backend or ''}",
        machine.facts(),
        machine.line(torch.float32),
        charts=(Chart("error of the query gradients", {"ours": "ours dQ", "stock": "stock dQ"}),),
    )
    for name, rows, kind, scale in tqdm(list(itertools.product(TYPES, batches, SHARED, SCALES))):
        how = {"repeats": args.repeats, "backend": args.backend, "device": device}
        errors = errors_of(TYPES[name], rows, kind, scale, **how)
        report.add(case=f"{name}, N={rows}, {kind}, scale {scale:g}", **errors)
    harness.finish(report, args.output, [])


def errors_of(
    dtype: torch.dtype,
    rows: int,
    kind: str,
    scale: float,
    *,
    repeats: int = 1,
    backend: str | None = None,
    device: str = "cpu",
    dim: int = DIM,
) -> dict[str, float]:
    """Returns the errors of ours and of stock's, by "ours loss", "stock loss", "ours dQ" and so on.

    Args:
        dtype: Autocast's type.
        rows: N.
        kind: One of `SHARED`.
        scale: Multiplies the cosines.
        repeats: So many batches.
        backend: Of ours; None lets the library choose.
        device: Where the embeddings are.
        dim: D.
    """
    model: Any = nn.Identity()  # nothing is encoded here
    sides = {
        "ours": losses.MultipleNegativesRankingLoss(model, scale=scale),
        "stock": stock.MultipleNegativesRankingLoss(model, scale=scale),
    }
    squares = {side: torch.zeros(3, dtype=torch.float64) for side in sides}
    for seed in range(repeats):
        leaves = [x.to(device).requires_grad_() for x in _batch(rows, dim, seed, SHARED[kind])]
        exact = _exact([leaf.detach().double().requires_grad_() for leaf in leaves], scale)
        for side, loss in sides.items():
            with use_backend(backend), torch.autocast(device, dtype):
                value = loss.compute_loss_from_embeddings(leaves, None)
            found = [value, *(g / LOSS_FACTOR for g in torch.autograd.grad(value * LOSS_FACTOR, leaves))]
            relative = [(x.double() - y).norm() / y.norm() for x, y in zip(found, exact, strict=True)]
            squares[side] += torch.stack(relative).detach().cpu() ** 2
    errors = {side: (total / repeats).sqrt().tolist() for side, total in squares.items()}
    return {
        f"{side} {quantity}": errors[side][index]
        for index, quantity in enumerate(("loss", "dQ", "dD"))
        for side in sides
    }


def _batch(rows: int, dim: int, seed: int, shared: float) -> list[Tensor]:
    """Returns queries and positives [N, D] in which the positive is about as close as the closest of the others."""
    generator = torch.Generator().manual_seed(seed)
    queries, noise = (torch.randn(rows, dim, generator=generator) for _ in range(2))
    cosine = math.sqrt(2 * math.log(rows) / dim)
    documents = cosine * queries + math.sqrt(1 - cosine**2) * noise
    direction = shared * torch.randn(dim, generator=generator)
    return [queries + direction, documents + direction]


def _exact(leaves: list[Tensor], scale: float) -> list[Tensor]:
    queries, documents = (F.normalize(leaf) for leaf in leaves)
    loss = F.cross_entropy(scale * queries @ documents.T, torch.arange(len(queries), device=queries.device))
    return [loss, *torch.autograd.grad(loss, leaves)]


if __name__ == "__main__":
    harness.command_line(__doc__, add_arguments, run)
