"""Counts what each of the two strategies computes and moves, to say which of them is faster.

For N rows, M columns, D entries, b bytes a number, S slices of a gradient (`slice_width`), and one prefix:

              FLOPs                              bytes from memory, beyond operands and gradients
    tiled     (2 + 2 (S + 1)) N M D, rows, and   none that grows with N M
              2 (S + 1) N M D, columns; without
              the first 2 N M D where the softmax
              is bounded and S = 1
    chunked   6 N M D; 8 N M D where the         3 b N M: weights written once, read by two products;
              softmax is not bounded             12 M D for each chunk of rows

Of K prefixes, tiled does the same for each; chunked computes similarities twice for all of them together, and keeps K
weights.

Rates are shares of a GPU's peak: those of a vendor's matrix product, and of a product in Triton with an exponential
for each entry. They are estimates until `bench gpu` has measured them, and only their ratio decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..targets import Gpu
from .tiles import slice_width

# Shares of the peak that a vendor's products and the sweeps reach, and the seconds that a launch takes at least.
VENDOR_SHARE, SWEEP_SHARE, LAUNCH_SECONDS = 0.75, 0.5, 2e-5


@dataclass(frozen=True)
class Work:
    """Counts floating-point operations of the sweeps and of the vendor's products, and bytes through memory."""

    sweep_flops: float
    vendor_flops: float
    bytes: float
    launches: int

    def seconds(self, gpu: Gpu, rate: str) -> float:
        """Returns the seconds that it should take on a GPU at its peak rate of that name: "half", "tf32" or "fp32"."""
        peak = gpu.peak(rate)
        busy = self.sweep_flops / (SWEEP_SHARE * peak) + self.vendor_flops / (VENDOR_SHARE * peak)
        return max(busy, self.bytes / gpu.bandwidth) + self.launches * LAUNCH_SECONDS


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
    high_register_pressure: bool = False,
    chunk_rows: int = 4096,
) -> Work:
    """Returns what one term of N rows and M columns costs by a strategy, for prefixes of these widths."""
    d, prefixes = dims[-1], len(dims)
    norms = 3.0 * (n + m) * d * (element_bytes + 4)
    if not gradients:
        return Work(2.0 * n * m * d, 0.0, element_bytes * (n + m) * d, 3)
    if strategy == "tiled":
        flops = 0.0
        for width in dims:
            slices = -(-width // slice_width(width, fma, high_register_pressure))
            passes = 2 * (slices + 1) + (0 if bounded and slices == 1 else 1)
            flops += passes * 2.0 * n * m * width
        return Work(flops, 0.0, prefixes * norms, 6 * prefixes)
    chunks = -(-n // chunk_rows)
    moved = 3.0 * element_bytes * n * m * prefixes + 12.0 * m * d * chunks + norms
    sweeps = 1 if bounded and prefixes == 1 else 2
    return Work(sweeps * 2.0 * n * m * d, 2 * 2.0 * n * m * d, moved, 4 + 5 * chunks)
