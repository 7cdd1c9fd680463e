"""The cases of ``bench ranking``, and the options of its command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sbert_kernels.bench import arguments
from sbert_kernels.bench.cases import ITEM_BYTES

QUICK_ROWS = 256
COSENT, ANGLE = "CoSENTLoss", "AnglELoss"


@dataclass(frozen=True)
class Case:
    """Describes one line of the report: the classes (of both libraries) whose sum is the loss, and their inputs."""

    losses: tuple[str, ...]
    rows: int
    dim: int | None = 384  # None: the scores exist already, and only their ranking is on the clock
    columns: int = 2  # more are anchors, positives and negatives; they have no labels
    levels: int | None = None  # different labels; None: about as many as rows
    dtype: str = "float32"
    rounds: int = 1  # how many for each of --repeats: short calls need more samples
    uncompiled: str | None = None  # why torch.compile is no peer here

    @property
    def size(self) -> str:
        """Returns the size as the report shows it."""
        columns = f" x {self.columns} columns" if self.columns > 2 else ""
        return f"N={self.rows}{columns}{f' D={self.dim}' if self.dim else ''}"

    @property
    def gradient_bytes(self) -> int:
        """Returns the bytes of all gradients."""
        if self.dim is None:
            return self.rows * ITEM_BYTES[self.dtype]
        return self.columns * self.rows * self.dim * ITEM_BYTES[self.dtype]

    @property
    def moved_bytes(self) -> int:
        """Returns the bytes that any implementation has to read and write; ``bench.ranking`` says which these are."""
        return 3 * self.gradient_bytes  # labels are of the size of scores


CASES = {
    "cosent": Case((COSENT,), 8192),
    "angle": Case((ANGLE,), 8192),
    "both": Case((COSENT, ANGLE), 8192),
    "cosent-5-labels": Case((COSENT,), 8192, levels=5),
    "triplets": Case((ANGLE,), 4096, columns=3),
    "cosent-1024": Case((COSENT,), 1024, dim=768, rounds=4),
    "angle-1024": Case((ANGLE,), 1024, dim=768, rounds=4),
    "cosent-256": Case((COSENT,), 256, dim=768, rounds=20),
    "angle-256": Case((ANGLE,), 256, dim=768, rounds=20),
    "scores-65536": Case((COSENT,), 65536, dim=None),
    "scores-1024": Case((COSENT,), 1024, dim=None, rounds=20),
    "cosent-large": Case((COSENT,), 65536),
    "angle-large": Case((ANGLE,), 65536),
    "both-large": Case((COSENT, ANGLE), 65536),
    "cosent-bfloat16": Case((COSENT,), 65536, dtype="bfloat16"),
    "angle-bfloat16": Case((ANGLE,), 65536, dtype="bfloat16"),
    "scores-large": Case((COSENT,), 1_000_000, dim=None),
}
LARGE = ("cosent-large", "angle-large", "both-large", "cosent-bfloat16", "angle-bfloat16", "scores-large")
PEERS = ("stock", "stock float32", "compiled", "ours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch can use it")
    quick = f"{QUICK_ROWS} rows at most, no compiled peer"
    takes = "some minutes on two cores"
    arguments.add_arguments(parser, quick=quick, repeats=9, cases=CASES, large=LARGE, large_takes=takes)
