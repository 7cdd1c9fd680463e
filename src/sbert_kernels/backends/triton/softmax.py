"""From the statistics of the sweeps to the loss of each row, and to what its gradient needs.

With l = the others' sum of exp(z), z' the own logit (two of them in a joint softmax over both directions), c positives:

    lse = log(l + sum exp(z')),   loss = log(1 + (l + ...) / exp(z')) + z' - mean of the positives' logits
    pull = gradient of an own similarity = ((c - 1) p' - (p of all others)) / c          # no 1 - p near p = 1

All of it is fp32, logits in base 2; the partial sums of the splits are added in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _log1p(u):
    """log(1 + u) for u in [0, 1], to the last digits of a tiny one (Kahan)."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * u / tl.where(w == 1.0, 1.0, w - 1.0))


@triton.jit
def _share(z, top, sum):
    return tl.exp2(z - top) / sum


@triton.jit
def _partial_sum(pointer, split, index, inside, k, n, K: tl.constexpr, present):
    at = (split * K + k).to(tl.int64)[:, None] * n + index[None, :]
    return tl.load(pointer + at, mask=present[:, None] & inside[None, :], other=0.0)


@triton.jit(do_not_specialize=["own_stride", "own_again_stride", "n", "splits", "rows_stride"])
def combine(
    maximum,  # (splits, K, n): base 2; None: nothing was subtracted
    total,  # (splits, K, n): sums of exp2(z - maximum)
    similarity_total,  # (splits, K, n)
    further_count,  # (splits, K, n)
    further_total,  # (splits, K, n)
    own,  # (K, .): own similarity; None: no own pair in this softmax
    own_stride,
    own_again,  # (K, .): that of a second own pair
    own_again_stride,
    row_weight,  # (n,); None: 1
    scale,
    scale_tensor,
    n,
    splits,
    losses,  # (n,): sum over the prefixes of weight * loss
    logsumexp,  # (K, .), base 2
    coefficient,  # (K, .): row weight times prefix weight; None: not wanted
    row_coefficient,  # (K, .): the same over the sum of exp(z)
    further_share,  # (K, .)
    pull,  # (K, .): gradient of `own`
    pull_again,  # (K, .): of `own_again`; None: that is the same pair
    scale_gradient,  # (n,): row weight times prefix weight times d loss / d scale
    rows_stride,  # of the (K, .) outputs
    WEIGHTS: tl.constexpr,  # of the K prefixes
    ADD: tl.constexpr,  # to losses and scale gradient of another softmax
    ADD_PULL: tl.constexpr,  # and to its pulls
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    K: tl.constexpr = len(WEIGHTS)
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = index < n
    if scale_tensor is not None:
        scale = tl.load(scale_tensor)
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)
    if row_weight is not None:
        weight = tl.load(row_weight + index, mask=inside, other=0.0)
    loss_sum = tl.zeros((BLOCK_N,), tl.float32)
    scale_sum = tl.zeros((BLOCK_N,), tl.float32)
    for k in tl.static_range(K):
        peak = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        if maximum is not None:
            for begin in range(0, splits, BLOCK_S):
                split = begin + tl.arange(0, BLOCK_S)
                at = (split * K + k).to(tl.int64)[:, None] * n + index[None, :]
                found = tl.load(maximum + at, mask=(split < splits)[:, None] & inside[None, :], other=-float("inf"))
                peak = tl.maximum(peak, tl.max(found, 0))
        least = tl.where(peak == -float("inf"), 0.0, tl.minimum(peak, 3.0e38))
        others = tl.zeros((BLOCK_N,), tl.float32)
        similarity = tl.zeros((BLOCK_N,), tl.float32)
        count = tl.zeros((BLOCK_N,), tl.float32)
        further = tl.zeros((BLOCK_N,), tl.float32)
        for begin in range(0, splits, BLOCK_S):
            split = begin + tl.arange(0, BLOCK_S)
            present = split < splits
            sums = _partial_sum(total, split, index, inside, k, n, K, present)
            factor = tl.full((BLOCK_S, BLOCK_N), 1.0, tl.float32)
            if maximum is not None:
                found = _partial_sum(maximum, split, index, inside, k, n, K, present)
                lower = tl.where(found == -float("inf"), 0.0, tl.minimum(found, 3.0e38))
                empty = (found == -float("inf")) | ~present[:, None]
                factor = tl.where(empty, 0.0, tl.exp2(lower - least[None, :]))
            others += tl.sum(sums * factor, 0)
            if similarity_total is not None:
                parts = _partial_sum(similarity_total, split, index, inside, k, n, K, present)
                similarity += tl.sum(parts * factor, 0)
            if further_count is not None:
                count += tl.sum(_partial_sum(further_count, split, index, inside, k, n, K, present), 0)
                further += tl.sum(_partial_sum(further_total, split, index, inside, k, n, K, present), 0)
        if maximum is None:
            least = tl.zeros((BLOCK_N,), tl.float32)
        rest = tl.where(others > 0.0, tl.log2(tl.where(others > 0.0, others, 1.0)), -float("inf")) + least
        rest = tl.where(others == others, rest, others)  # not a number stays so

        own_s = tl.load(own + k * own_stride + index, mask=inside, other=0.0)
        z = own_s * (scale * LOG2E)
        again_s = tl.zeros((BLOCK_N,), tl.float32)
        again = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        positives = 1.0 + count
        if own_again is not None:
            again_s = tl.load(own_again + k * own_again_stride + index, mask=inside, other=0.0)
            again = again_s * (scale * LOG2E)
            positives += 1.0
        # Finite logits of a row have no share beside an infinite one: not inf - inf.
        infinite = (tl.maximum(tl.maximum(rest, again), z) == float("inf")) & (rest == rest) & (z == z)
        finite_rest = tl.where(rest == float("inf"), 3.0e38, rest)
        top = tl.maximum(tl.maximum(finite_rest, again), z)
        sum_of_all = tl.exp2(finite_rest - top) + tl.exp2(again - top) + tl.exp2(z - top)
        lse = tl.where(infinite, float("inf"), tl.log2(sum_of_all) + top)
        # The logarithm of all others over the own one, and log(1 + its exponential).
        both = tl.maximum(rest, again)
        base = tl.where(both == -float("inf"), 0.0, both)
        both += tl.log2(1.0 + tl.exp2(tl.minimum(rest, again) - base))
        both = tl.where((rest == rest) & (again == again), both, float("nan"))  # which a maximum drops
        ratio = (both - z) * LN2
        excess = tl.maximum(ratio, 0.0) + _log1p(tl.exp(-tl.abs(ratio)))
        mean = (own_s + again_s + further) / positives
        loss_sum += WEIGHTS[k] * (excess + scale * (own_s - mean))
        p_rest, p_own, p_again = (
            _share(finite_rest, top, sum_of_all),
            _share(z, top, sum_of_all),
            _share(again, top, sum_of_all),
        )
        weighted = weight * WEIGHTS[k]
        at = k * rows_stride + index
        if logsumexp is not None:
            tl.store(logsumexp + at, lse, mask=inside)
        if coefficient is not None:
            tl.store(coefficient + at, weighted, mask=inside)
        if row_coefficient is not None:
            tl.store(row_coefficient + at, weighted * tl.exp2(-lse), mask=inside)
        if further_share is not None:
            tl.store(further_share + at, 1.0 / positives, mask=inside)
        if pull is not None:
            strength = weighted * ((positives - 1.0) * p_own - p_rest - p_again) / positives
            if own_again is not None:
                strength_again = weighted * ((positives - 1.0) * p_again - p_rest - p_own) / positives
                if pull_again is None:
                    strength += strength_again
                else:
                    tl.store(pull_again + at, strength_again, mask=inside)
            if ADD_PULL:
                strength += tl.load(pull + at, mask=inside, other=0.0)
            tl.store(pull + at, strength, mask=inside)
        if scale_gradient is not None:
            expected = p_own * own_s + p_again * again_s
            # similarity / others is the others' mean similarity; without others it is 0 / 0
            expected += tl.where(others > 0.0, p_rest * similarity / tl.where(others > 0.0, others, 1.0), 0.0)
            scale_sum += weighted * (expected - mean)
    if ADD:
        loss_sum += tl.load(losses + index, mask=inside, other=0.0)
    tl.store(losses + index, loss_sum, mask=inside)
    if scale_gradient is not None:
        if ADD:
            scale_sum += tl.load(scale_gradient + index, mask=inside, other=0.0)
        tl.store(scale_gradient + index, scale_sum, mask=inside)
