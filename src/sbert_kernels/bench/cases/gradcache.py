"""The cases of ``bench gradcache``, and the options of its command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sbert_kernels.bench import arguments
from sbert_kernels.bench.cases.training import QUICK_PACKAGES


@dataclass(frozen=True)
class Case:
    """Describes one row of the report for each of its peers."""

    pairs: int  # a step
    length: int  # tokens of a row, at most
    peers: tuple[str, ...]
    equal: bool = False  # only pairs that fill the length on both sides
    steps: int = 0  # of the Trainer; 0: one step without an optimizer
    mini_batch: int = 32  # rows

    @property
    def tokens(self) -> tuple[int, ...]:
        """Returns the token budgets of a mini-batch that stock gets to choose from; ours gets the middle one."""
        return tuple(self.mini_batch * length for length in (64, 128, 256))

    @property
    def tried_pairs(self) -> int:
        """Returns the number of pairs, of several mini-batches, on which parity and stock's budgets are tried."""
        return min(self.pairs, self.mini_batch + self.mini_batch // 4)


PEERS = ("stock", "stock by tokens", "stock uncached", "ours", "ours by tokens", "ours, half kept")
CASES = {
    "text": Case(512, 256, PEERS),
    "equal": Case(256, 64, ("stock", "stock uncached", "ours", "ours, half kept"), equal=True),
    "few": Case(48, 256, ("stock", "stock uncached", "ours", "ours, half kept")),
    "trainer": Case(32, 128, ("stock", "ours"), steps=50, mini_batch=8),
}
QUICK = {"pairs": 10, "length": 32, "mini_batch": 4}
QUICK_STEPS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    quick = (
        f"{QUICK['pairs']} pairs of at most {QUICK['length']} tokens, docstrings of {', '.join(QUICK_PACKAGES)} alone, "
        "all in this process, hence no memory"
    )
    steps = CASES["trainer"].steps
    parser.add_argument(
        "--steps", type=int, help=f"steps of the Trainer (default: {steps}; in a quick run {QUICK_STEPS})"
    )
    arguments.add_arguments(parser, quick=quick, repeats=1, cases=CASES)
