"""Benchmark: errors of the contrastive loss and its gradients against float64, beside those of eager torch.

Each row is a number format of the embeddings and of the products, at a scale; the numbers are root mean squares, over
batches, of |x - exact| / |exact| in the Euclidean norm. `exact` is eager torch in float64 on the same rounded
embeddings. The last rows are well-trained batches (p = 0.999 of the positives), where the gradient is of the size of a
bfloat16 rounding of p.

    python -m benchmarks.accuracy [--quick]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sbert_kernels import contrastive_loss, machine, settings
from sbert_kernels.bench import arguments, harness
from sbert_kernels.bench.report import Chart, Report

BATCH, DIM = 512, 384
QUICK_BATCH = 128
SCALES = (20.0, 50.0, 100.0, 1000.0)
# As a gradient scaler has it: without one, float16 gradients of a whole batch's mean are subnormal numbers.
LOSS_FACTOR = 1024.0


@dataclass(frozen=True)
class Format:
    """Names the type of the embeddings, and how the operation multiplies them; None leaves that to the library."""

    name: str
    dtype: torch.dtype
    products: str | None = None


FORMATS = (
    Format("float32", torch.float32, "float32"),
    Format("float32, bfloat16x3 products", torch.float32, "bfloat16x3"),
    Format("float32, bfloat16 products", torch.float32, "bfloat16"),
    Format("bfloat16", torch.bfloat16),
    Format("float16", torch.float16),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    arguments.add_arguments(parser, quick=f"batches of {QUICK_BATCH}", repeats=5)


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes the report."""
    harness.begin(args)
    rows = QUICK_BATCH if args.quick else BATCH
    report = Report(
        f"Contrastive loss: errors against float64, N={rows} D={DIM}{', quick run' if args.quick else ''}",
        "accuracy",
        machine.facts(),
        machine.line(torch.float32),
        charts=(Chart("error of the query gradients", {"ours": "ours dQ", "eager": "eager dQ"}),),
    )
    cases = [("hard", scale, number) for number in FORMATS for scale in SCALES]
    cases += [("p = 0.999", 20.0, number) for number in FORMATS]
    for kind, scale, number in tqdm(cases):
        report.rows.append(_row(kind, scale, number, rows, args.repeats))
    harness.finish(report, args.output, [])


def _row(kind: str, scale: float, number: Format, rows: int, repeats: int) -> dict[str, Any]:
    row: dict[str, Any] = {"case": f"{number.name}, scale {scale:g}{'' if kind == 'hard' else f', {kind}'}"}
    errors: dict[str, list[Tensor]] = {"ours": [], "eager": []}
    for seed in range(repeats):
        leaves = _batch(rows, seed, scale if kind == "hard" else None, number.dtype)
        exact = _eager([leaf.detach().double().requires_grad_() for leaf in leaves], scale)
        with settings.override(matmul=number.products):
            loss = contrastive_loss(*leaves, scale=scale)
        found = {"ours": [loss, *torch.autograd.grad(loss * LOSS_FACTOR, leaves)], "eager": _eager(leaves, scale)}
        for side, values in found.items():
            relative = [(value - wanted).norm() / wanted.norm() for value, wanted in zip(values, exact, strict=True)]
            errors[side].append(torch.stack(relative).detach())
    for index, quantity in enumerate(("loss", "dQ", "dD")):
        for side, samples in errors.items():
            row[f"{side} {quantity}"] = torch.stack(samples)[:, index].square().mean().sqrt().item()
    return row


def _batch(rows: int, seed: int, scale: float | None, dtype: torch.dtype) -> list[Tensor]:
    """Queries and positives [N, D]: as hard as in the middle of training at that scale, or with p = 0.999."""
    generator = torch.Generator().manual_seed(seed)
    queries, noise = (torch.randn(rows, DIM, generator=generator) for _ in range(2))
    # logsumexp_j(scale s_ij) of random columns is about log(N) + scale^2 / (2 D), or that of the largest s_ij alone.
    hard = math.log(rows) / (scale or 20.0) + (scale or 20.0) / (2 * DIM)
    cosine = min(hard, math.sqrt(2 * math.log(rows) / DIM)) if scale else hard + math.log(999) / 20.0
    documents = queries + math.sqrt(cosine**-2 - 1) * noise
    return [x.to(dtype).requires_grad_() for x in (queries, documents)]


def _eager(leaves: list[Tensor], scale: float) -> list[Tensor]:
    queries, documents = (F.normalize(leaf) for leaf in leaves)
    loss = F.cross_entropy(scale * queries @ documents.T, torch.arange(len(queries)))
    return [loss, *torch.autograd.grad(loss * LOSS_FACTOR, leaves)]


if __name__ == "__main__":
    harness.command_line(__doc__, add_arguments, run)
