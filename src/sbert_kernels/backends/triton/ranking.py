"""The ranking operation in one Triton kernel: a sort, two running sums, and gradients; one launch for up to 8192 pairs.

The formulas are those of `backends/blockwise/ranking.py`. Five phases, each of which needs all of the one before:

    sort       the labels as integers that keep their order, the pair's index in their last bits, in one block
    sums       of each chunk of sorted pairs: (maximum, sum of the exponentials below it) of z and of -z
    scan       of the chunk, from what the chunks before (after) it add up to: u and v of each place
    terms      z + u and v - z, read at the ends of the run of equal labels, which a search finds; their sum
    finish     loss and gradients

Up to 8192 pairs one block does them all, with barriers between them: there, launches would cost more than more blocks
gain. For more pairs, and for labels that are not float32, `torch.sort` sorts, and each phase is a launch with a block a
chunk.

z, maxima and sums are float64, exponentials of their differences float32: large scales need the former, and on most
cards the latter are many times as fast. Sums of exponentials stay pairs of maximum and sum, so that no logarithm is
taken but the loss's. Memory: 60 bytes a pair. Deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problems.ranking import Needs, RankingProblem, RankingResult
from .launching import Config, cdiv, launch

MOST_IN_ONE_LAUNCH = 8192
# Pairs that a block has in registers at once, in one launch of many warps and in many blocks of few.
CHUNK_OF_ONE, CHUNK_OF_MANY = 512, 512
SORT, SUMS, SCAN, TERMS, FINISH = range(5)


@triton.jit
def _exponential(x):
    """Returns exp(x) of float64 numbers, to float32's digits: 2^whole 2^fraction, the fraction found in float64."""
    power = x * 1.4426950408889634
    power = tl.where(power < -1000.0, -1000.0, tl.where(power > 1000.0, 1000.0, power))  # infinite ones, too
    whole = tl.floor(power)
    return (tl.exp2((power - whole).to(tl.float32)) * tl.exp2(whole.to(tl.float32))).to(tl.float64)


@triton.jit
def _base(top):
    """Returns what to subtract from numbers of at most ``top`` before exp(); 0 for infinite ones (inf - inf is NaN)."""
    return tl.where(tl.abs(top) == float("inf"), 0.0, top)


@triton.jit
def _add(a_max, a_sum, b_max, b_sum):
    """Returns the total of two sums of exponentials; each of them is sum * exp(max)."""
    top = tl.maximum(a_max, b_max)
    base = _base(top)
    return top, a_sum * _exponential(a_max - base) + b_sum * _exponential(b_max - base)


@triton.jit
def _sum(x, weight):
    """Returns the sum of weight exp(x) over a chunk, as (maximum, sum)."""
    top = tl.max(x, 0)
    return top, tl.sum(weight * _exponential(x - _base(top)), 0)


@triton.jit
def _sum_of_chunks(maxima, sums, begin, end, PARTS: tl.constexpr):
    """Returns the total of the sums of the chunks begin .. end, as (maximum, sum)."""
    top, total = tl.full((), -float("inf"), tl.float64), tl.full((), 0.0, tl.float64)
    for first in range(begin, end, PARTS):
        chunk = first + tl.arange(0, PARTS)
        found = tl.load(maxima + chunk, mask=chunk < end, other=-float("inf"))
        part_top, part = _sum(found, tl.load(sums + chunk, mask=chunk < end, other=0.0))
        top, total = _add(top, total, part_top, part)
    return top, total


@triton.jit
def _sorted_pairs(scores, weights, order, place, inside):
    """Loads pair, score and weight at these places of the order, (CHUNK,) each; places beyond the end weigh 0."""
    pair = tl.load(order + place, mask=inside, other=0)
    score = tl.load(scores + pair, mask=inside, other=0.0).to(tl.float64)
    weight = tl.where(inside, 1.0, 0.0).to(tl.float64)
    if weights is not None:
        weight = tl.load(weights + pair, mask=inside, other=0.0).to(tl.float64)
    return pair, score, weight


@triton.jit
def _count_below(labels, label, inside, n, steps, OR_EQUAL: tl.constexpr):
    """Returns how many of the n sorted labels are less than each label (OR_EQUAL: or equal to it)."""
    low, high = tl.zeros_like(label).to(tl.int32), tl.zeros_like(label).to(tl.int32) + n
    for _ in range(steps):
        middle = (low + high) >> 1
        found = tl.load(labels + middle, mask=inside & (low < high), other=0)
        if OR_EQUAL:
            below = found <= label
        else:
            below = found < label
        searching = low < high
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & ~below, middle, high)
    return low


@triton.jit
def _sort(
    labels,  # (n,) float32
    n,
    order,  # (n,) int64
    sorted_labels,  # (n,)
    BLOCK: tl.constexpr,
):
    """Sorts the labels of at most BLOCK pairs, stably."""
    INDEX_BITS: tl.constexpr = BLOCK.bit_length() - 1
    place = tl.arange(0, BLOCK)
    label = tl.load(labels + place, mask=place < n, other=0.0) + 0.0  # -0 is 0
    bits = label.to(tl.int32, bitcast=True)
    whole = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)  # integers in the order of the floats
    key = tl.sort(tl.where(place < n, (whole << INDEX_BITS) + place, 0x7FFFFFFFFFFFFFFF))
    tl.store(order + place, key & (BLOCK - 1), mask=place < n)
    bits = (key >> INDEX_BITS).to(tl.int32)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    tl.store(sorted_labels + place, bits.to(tl.float32, bitcast=True), mask=place < n)


class Scans(NamedTuple):
    """What the scans leave at each place for the gradients: exponents, (n,) float64, and factors, (n,) fp32."""

    up: Any  # up_sums exp(up) is the sum of exp(-z) from this place on
    up_sums: Any
    down: Any  # the same of exp(z) up to this place
    down_sums: Any
    above: Any  # exp(z + u); None: no gradients
    above_sums: Any
    below: Any  # exp(v - z)
    below_sums: Any


@triton.jit(do_not_specialize=["n", "chunks", "steps"])
def rank(
    scores,  # (n,)
    labels,  # (n,) float32, in the pairs' order; None: they are sorted already
    weights,  # (n,), or None
    scale,
    scale_tensor,  # (), or None
    n,
    chunks,
    steps,  # of a search among n
    order,  # (n,) int64: the pair at each place
    sorted_labels,  # (n,)
    sums,  # (6, chunks) float64: maximum and sum of z, of -z, of z + u
    scans,  # Scans
    loss,  # ()
    score_gradient,  # (n,) or None
    scale_gradient,  # (chunks,): parts of it; or None
    weight_gradient,  # (n,) or None
    FIRST: tl.constexpr,  # phases of this launch
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of 2, at least n where this launch sorts
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Runs the phases FIRST .. LAST; see the module's docstring."""
    MINUS: tl.constexpr = -float("inf")
    up, up_sums, down, down_sums = scans.up, scans.up_sums, scans.down, scans.down_sums
    above, above_sums, below, below_sums = scans.above, scans.above_sums, scans.below, scans.below_sums
    if scale_tensor is not None:
        scale = tl.load(scale_tensor)
    if FIRST == 0:
        _sort(labels, n, order, sorted_labels, BLOCK)
        tl.debug_barrier()

    if FIRST <= 1 and LAST >= 1:
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            place = chunk * CHUNK + tl.arange(0, CHUNK)
            _, score, weight = _sorted_pairs(scores, weights, order, place, place < n)
            z = score * scale
            top, total = _sum(tl.where(weight > 0.0, z, MINUS), weight)
            tl.store(sums + chunk, top)
            tl.store(sums + chunks + chunk, total)
            top, total = _sum(tl.where(weight > 0.0, -z, MINUS), weight)
            tl.store(sums + 2 * chunks + chunk, top)
            tl.store(sums + 3 * chunks + chunk, total)
        tl.debug_barrier()

    if FIRST <= 2 and LAST >= 2:
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            place = chunk * CHUNK + tl.arange(0, CHUNK)
            inside = place < n
            _, score, weight = _sorted_pairs(scores, weights, order, place, inside)
            z = score * scale
            before, before_sum = _sum_of_chunks(sums, sums + chunks, 0, chunk, PARTS)
            top, total = tl.associative_scan((tl.where(weight > 0.0, z, MINUS), weight), 0, _add)
            top, total = _add(top, total, before, before_sum)
            tl.store(down + place, top, mask=inside)
            tl.store(down_sums + place, total.to(tl.float32), mask=inside)
            after, after_sum = _sum_of_chunks(sums + 2 * chunks, sums + 3 * chunks, chunk + 1, chunks, PARTS)
            top, total = tl.associative_scan((tl.where(weight > 0.0, -z, MINUS), weight), 0, _add, reverse=True)
            top, total = _add(top, total, after, after_sum)
            tl.store(up + place, top, mask=inside)
            tl.store(up_sums + place, total.to(tl.float32), mask=inside)
        tl.debug_barrier()

    if FIRST <= 3 and LAST >= 3:
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            place = chunk * CHUNK + tl.arange(0, CHUNK)
            inside = place < n
            _, score, weight = _sorted_pairs(scores, weights, order, place, inside)
            z = score * scale
            label = tl.load(sorted_labels + place, mask=inside, other=0)
            end = _count_below(sorted_labels, label, inside, n, steps, True)  # first of the higher labels
            begin = _count_below(sorted_labels, label, inside, n, steps, False)  # one past the last lower one
            # A pair without a higher label is in no sum, even at an infinite score.
            higher, lower = inside & (end < n), inside & (begin > 0)
            above_here = tl.where(higher, z + tl.load(up + end, mask=higher, other=MINUS), MINUS)
            above_sum = tl.load(up_sums + end, mask=higher, other=0.0)
            if above is not None:
                below_here = tl.where(lower, tl.load(down + begin - 1, mask=lower, other=MINUS) - z, MINUS)
                tl.store(above + place, above_here, mask=inside)
                tl.store(above_sums + place, above_sum, mask=inside)
                tl.store(below + place, below_here, mask=inside)
                tl.store(below_sums + place, tl.load(down_sums + begin - 1, mask=lower, other=0.0), mask=inside)
            counts = weight > 0.0
            top, total = _sum(tl.where(counts, above_here, MINUS), tl.where(counts, weight * above_sum, 0.0))
            undefined = tl.max(tl.where(inside & ((z != z) | (label != label) | ~(weight >= 0.0)), 1, 0), 0) > 0
            tl.store(sums + 4 * chunks + chunk, top)
            tl.store(sums + 5 * chunks + chunk, tl.where(undefined, float("nan"), total))
        tl.debug_barrier()

    if LAST >= 4:
        top, total = _sum_of_chunks(sums + 4 * chunks, sums + 5 * chunks, 0, chunks, PARTS)
        # log(1 + total exp(top)), to float32's last digits also of a tiny sum.
        base = _base(top)
        small = total * tl.exp(tl.minimum(base, 0.0))
        value = tl.maximum(base, 0.0) + tl.log(small + tl.exp(-tl.maximum(base, 0.0)))
        value = tl.where((base <= 0.0) & (small < 1e-8), small, value)
        if tl.program_id(0) == 0:
            tl.store(loss, value.to(loss.dtype.element_ty))
        if above is not None:
            for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
                place = chunk * CHUNK + tl.arange(0, CHUNK)
                inside = place < n
                pair, score, weight = _sorted_pairs(scores, weights, order, place, inside)
                p_above = _exponential(tl.load(above + place, mask=inside, other=MINUS) - value)
                p_above *= tl.load(above_sums + place, mask=inside, other=0.0)
                p_below = _exponential(tl.load(below + place, mask=inside, other=MINUS) - value)
                p_below *= tl.load(below_sums + place, mask=inside, other=0.0)
                gradient = tl.where(weight > 0.0, weight * (p_above - p_below), 0.0)
                gradient = tl.where(value == value, gradient, value)
                if score_gradient is not None:
                    tl.store(score_gradient + pair, (gradient * scale).to(tl.float32), mask=inside)
                if scale_gradient is not None:
                    part = tl.where(weight > 0.0, gradient * score, 0.0)
                    tl.store(scale_gradient + chunk, tl.sum(tl.where(value == value, part, value), 0).to(tl.float32))
                if weight_gradient is not None:
                    tl.store(weight_gradient + pair, (p_above + p_below).to(tl.float32), mask=inside)


def why_not(problem: RankingProblem | None) -> str | None:
    """Returns why these kernels cannot serve a problem (None: the most usual one) where Triton runs, or None."""
    if problem is None:
        return None
    if len(problem.scores) >= 2**24:
        return "2^24 pairs and more are ranked in torch ops"
    return "float64 is computed in torch ops" if problem.dtype == torch.float64 else None


@dataclass(frozen=True)
class RankingPlan:
    """Holds what is decided about a call, from its sizes and types alone."""

    config: Config
    chunks: int
    phases: tuple[tuple[int, int], ...]  # first and last of each launch
    grid: tuple[int]

    @property
    def sorts(self) -> bool:
        """True if the kernel sorts, not torch."""
        return self.phases[0][0] == SORT


def make_plan(pairs: int, label_dtype: torch.dtype) -> RankingPlan:
    """Returns the plan for so many pairs with labels of a type."""
    if pairs <= MOST_IN_ONE_LAUNCH and label_dtype == torch.float32:
        block = max(32, triton.next_power_of_2(pairs))
        chunk, warps = min(block, CHUNK_OF_ONE), max(1, min(16, block // 128))
        phases: tuple[tuple[int, int], ...] = ((SORT, FINISH),)
    else:
        block = chunk = CHUNK_OF_MANY
        warps = 4
        phases = tuple((phase, phase) for phase in (SUMS, SCAN, TERMS, FINISH))
    chunks = cdiv(pairs, chunk)
    config = Config((("BLOCK", block), ("CHUNK", chunk), ("PARTS", 128)), warps, 1, registers=min(255, 2048 // warps))
    return RankingPlan(config, chunks, phases, (1 if len(phases) == 1 else max(1, chunks),))


def ranking(problem: RankingProblem, needs: Needs) -> RankingResult:
    """Returns loss and gradients of the ranking operation."""
    n, device, labels = len(problem.scores), problem.device, problem.labels
    plan = make_plan(n, labels.dtype)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    if plan.sorts:
        order, sorted_labels = empty(n, dtype=torch.int64), torch.empty_like(labels)
    else:
        sorted_labels, order = labels.sort(stable=True)
    scale_tensor = problem.scale.on_device
    scans = Scans(*[None] * 8)
    exponents = empty(4 if any(needs) else 2, n, dtype=torch.float64).unbind()
    factors = empty(len(exponents), n).unbind()
    of_names = dict(zip(("up", "down", "above", "below"), zip(exponents, factors, strict=True), strict=False))
    for name, (exponent, factor) in of_names.items():
        scans = scans._replace(**{name: exponent, f"{name}_sums": factor})
    sums = empty(6, plan.chunks, dtype=torch.float64)
    loss = empty()
    scores = empty(n) if needs.scores else None
    weights = empty(n) if needs.weights else None
    scale_parts = empty(plan.chunks) if needs.scale else None
    given_scores = problem.scores.detach().contiguous()
    given_labels = labels.contiguous() if plan.sorts else None
    given_weights = None if problem.weights is None else problem.weights.detach().contiguous()
    for first, last in plan.phases:
        launch(
            rank,
            plan.grid,
            config=plan.config,
            scores=given_scores,
            labels=given_labels,
            weights=given_weights,
            scale=1.0 if problem.scale.value is None else problem.scale.value,
            scale_tensor=None if scale_tensor is None else scale_tensor.float(),
            n=n,
            chunks=plan.chunks,
            steps=n.bit_length(),
            order=order,
            sorted_labels=sorted_labels,
            sums=sums,
            scans=scans,
            loss=loss,
            score_gradient=scores,
            scale_gradient=scale_parts,
            weight_gradient=weights,
            FIRST=first,
            LAST=last,
        )
    return RankingResult(loss, scores, None if scale_parts is None else scale_parts.sum(), weights)
