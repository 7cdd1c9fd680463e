"""Counts what the two ways of making the weights compute and move, to say which of them should be faster.

For N rows, M columns, D entries, K prefixes, b bytes a weight, and P passes (1, or 2 where a row's maximum or sum must
be known before its weights):

             FLOPs                        bytes from and to memory, beyond operands and gradients
    sweep    P 2 N M D, in Triton         b K N M: the weights, written
    weigh    2 N M D, by the vendor       4 N M written by the product (16 more for each further prefix, which adds to
                                          the one before), 4 P K N M read, b K N M written

Both are followed by the same two products with the weights: 4 N M D FLOPs, 2 b K N M bytes read, and for each chunk of
rows the columns' gradient, 8 M D bytes.

The rates were measured on an H200; other GPUs are taken to reach the same shares of their peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..targets import Gpu

# Shares of the peak that the vendor's products reach, those that write dot products in fp32, and products in Triton.
VENDOR_SHARE, DOTS_SHARE, SWEEP_SHARE = 0.75, 0.55, 0.65
BANDWIDTH_SHARE = 0.9
# The exponential of an entry and what belongs to it, which no product hides; of one multiprocessor.
ENTRY_SECONDS = 2.1e-10
LAUNCH_SECONDS = 2e-5


@dataclass(frozen=True)
class Work:
    """Counts floating-point operations in Triton and by the vendor, entries that are weighed, and bytes of memory."""

    sweep_flops: float
    dots_flops: float
    product_flops: float
    entries: float  # weighed by a sweep
    weighing_bytes: float  # moved by the kernels that weigh; the dot products' own writing is part of their rate
    product_bytes: float  # moved by the products with the weights
    launches: int

    @property
    def vendor_flops(self) -> float:
        """Operations of all products by the vendor's library."""
        return self.dots_flops + self.product_flops

    @property
    def bytes(self) -> float:
        """All bytes from and to memory."""
        return self.weighing_bytes + self.product_bytes

    def seconds(self, gpu: Gpu, rate: str) -> float:
        """Returns the seconds that it should take on a GPU at its peak rate of that name: "half", "tf32" or "fp32"."""
        peak, bandwidth = gpu.peak(rate), BANDWIDTH_SHARE * gpu.bandwidth
        swept = self.sweep_flops / (SWEEP_SHARE * peak) + self.entries * ENTRY_SECONDS / gpu.multiprocessors
        weighed = self.weighing_bytes / bandwidth
        # A sweep writes while it multiplies; a pass over dot products begins when they are there.
        first = max(swept, weighed) if self.sweep_flops else self.dots_flops / (DOTS_SHARE * peak) + weighed
        products = max(self.product_flops / (VENDOR_SHARE * peak), self.product_bytes / bandwidth)
        return first + products + self.launches * LAUNCH_SECONDS


def accounting(
    n: int,
    m: int,
    dims: tuple[int, ...],
    weight_bytes: int,
    way: str,
    *,
    passes: int = 1,
    gradients: bool = True,
    chunk_rows: int = 4096,
) -> Work:
    """Returns what one term of N rows and M columns costs by a way ("sweep" or "weigh"), for prefixes of these widths.

    Without gradients, one pass finds all sums.
    """
    entries, d, prefixes = float(n) * m, dims[-1], len(dims)
    passes = passes if gradients else 1
    chunks = -(-n // chunk_rows)
    operands, written = float(weight_bytes) * (n + m) * d, 0.0
    product_flops = product_bytes = 0.0
    if gradients:
        written = weight_bytes * entries * prefixes
        product_flops, product_bytes = 4.0 * entries * d, 2.0 * written + 8.0 * m * d * chunks
    if way == "sweep":
        flops, weighed = passes * 2.0 * entries * d, passes * prefixes * entries
        return Work(flops, 0.0, product_flops, weighed, written + operands, product_bytes, 4 + 5 * chunks)
    dots = (16.0 * prefixes - 16.0) * entries + 4.0 * passes * prefixes * entries
    return Work(0.0, 2.0 * entries * d, product_flops, 0.0, dots + written + operands, product_bytes, 5 + 5 * chunks)
