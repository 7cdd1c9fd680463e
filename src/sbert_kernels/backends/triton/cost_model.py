"""Which of the two strategies is faster, from what they compute and move, and how much that is.

For N rows, M columns, D entries, b bytes a number, S slices of a gradient (`tuning.slice_width`), and one prefix:

              FLOPs                              bytes from memory, beyond operands and gradients
    tiled     (2 + 2 (S + 1)) N M D, rows, and   none that grows with N M
              2 (S + 1) N M D, columns; without
              the first 2 N M D where the softmax
              is bounded and S = 1
    chunked   6 N M D; 8 N M D where the         3 b N M: weights written once, read by two products;
              softmax is not bounded             12 M D for each chunk of rows

Of K prefixes, tiled does the same for each; chunked computes similarities twice for all of them together, and keeps K
weights.

Rates are shares of a card's peak: those of a vendor's matrix product, and of a product in Triton with an exponential
for each entry. They are estimates until `bench gpu` has measured them, and only their ratio decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import tuning
from .launching import Target

# Shares of the peak that a vendor's products and the sweeps reach, and the seconds that a launch takes at least.
VENDOR_SHARE, SWEEP_SHARE, LAUNCH_SECONDS = 0.75, 0.5, 2e-5


@dataclass(frozen=True)
class Card:
    """Peak FLOP/s of half-precision, tf32 and plain fp32 products (dense), and bytes/s of memory."""

    half: float
    tf32: float
    fp32: float
    bandwidth: float


CARDS = {
    "T4": Card(65e12, 8e12, 8e12, 0.32e12),
    "A100": Card(312e12, 156e12, 19.5e12, 2.0e12),
    "L4": Card(121e12, 60e12, 30e12, 0.3e12),
    "RTX 4090": Card(165e12, 82e12, 82e12, 1.0e12),
    "H100": Card(989e12, 495e12, 67e12, 3.35e12),
    "H200": Card(989e12, 495e12, 67e12, 4.8e12),
    "B200": Card(2250e12, 1100e12, 80e12, 8.0e12),
    "MI300X": Card(1307e12, 653e12, 163e12, 5.3e12),
}
_OF_TARGET = {
    75: "T4", 80: "A100", 86: "L4", 89: "L4", 90: "H100", 100: "B200", 120: "RTX 4090", "gfx942": "MI300X",
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Floating-point operations of the sweeps and of the vendor's products, and bytes through memory."""

    sweep_flops: float
    vendor_flops: float
    bytes: float
    launches: int

    def seconds(self, card: Card, kind: str) -> float:
        """On a card, for products of a ``kind``: "half", "tf32" or "fp32"."""
        peak = getattr(card, kind)
        busy = self.sweep_flops / (SWEEP_SHARE * peak) + self.vendor_flops / (VENDOR_SHARE * peak)
        return max(busy, self.bytes / card.bandwidth) + self.launches * LAUNCH_SECONDS


def accounting(
    n: int,
    m: int,
    dims: tuple[int, ...],
    element_bytes: int,
    strategy: str,
    *,
    bounded: bool = True,
    gradients: bool = True,
    fma: bool = False,
    crowded: bool = False,
    chunk_rows: int = 4096,
) -> Work:
    """What one term of N rows and M columns costs by a strategy, for prefixes of these widths (see `tuning`)."""
    d, prefixes = dims[-1], len(dims)
    edges = 3.0 * (n + m) * d * (element_bytes + 4)
    if not gradients:
        return Work(2.0 * n * m * d, 0.0, element_bytes * (n + m) * d, 3)
    if strategy == "tiled":
        flops = 0.0
        for width in dims:
            slices = -(-width // tuning.slice_width(width, fma, crowded))
            passes = 2 * (slices + 1) + (0 if bounded and slices == 1 else 1)
            flops += passes * 2.0 * n * m * width
        return Work(flops, 0.0, prefixes * edges, 6 * prefixes)
    chunks = -(-n // chunk_rows)
    moved = 3.0 * element_bytes * n * m * prefixes + 12.0 * m * d * chunks + edges
    sweeps = 1 if bounded and prefixes == 1 else 2
    return Work(sweeps * 2.0 * n * m * d, 2 * 2.0 * n * m * d, moved, 4 + 5 * chunks)


def card_of(target: Target) -> Card:
    """The card that a target's code is judged by."""
    return CARDS[_OF_TARGET.get(target.arch, "H100")]
