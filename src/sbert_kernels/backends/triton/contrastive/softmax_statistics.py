"""The kernel that turns the statistics of the sweeps into the loss of each row, and into what its gradient needs.

With l = the sum of exp(z) of all others, z' the positive's logit (there are two of them in a joint softmax over both
directions), c the number of positives and p' a positive's probability:

    lse = log(l + sum exp(z')),   loss = log(1 + (l + ...) / exp(z')) + z' - mean of the positives' logits
    d_positive = ((c - 1) p' - (p of all others)) / c          # exact near p' = 1, where 1 - p' would lose its digits

All of it is fp32, logits in base 2; the partial sums of the splits are added in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _log1p(u):
    """Returns log(1 + u) for u in [0, 1], to the last digits of a tiny u (Kahan)."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * u / tl.where(w == 1.0, 1.0, w - 1.0))


@triton.jit
def _probability(z, top, total):
    """Returns the probability of a logit, of which ``total`` is the sum of all exp2(z - top)."""
    return tl.exp2(z - top) / total


@triton.jit
def _of_splits(pointer, split, index, inside, k, n, K: tl.constexpr, present):
    """Loads the statistics of some splits for prefix k: (BLOCK_S, BLOCK_N)."""
    at = (split * K + k).to(tl.int64)[:, None] * n + index[None, :]
    return tl.load(pointer + at, mask=present[:, None] & inside[None, :], other=0.0)


@triton.jit(do_not_specialize=["positive_stride", "second_positive_stride", "d_positive_stride", "n", "splits"])
def softmax_statistics(
    sums,  # Sums of all terms' splits
    shift,  # what was subtracted from all logits if no maximum was; natural units
    positive,  # (K, .): similarity of the positive pair
    positive_stride,
    second_positive,  # (K, .): that of a second positive pair
    second_positive_stride,
    row_weight,  # (n,); None: 1
    scale,
    scale_tensor,
    n,
    splits,
    losses,  # (n,): sum over the prefixes of weight * loss
    logsumexp,  # (K, n), base 2
    coefficient,  # (K, n): row weight times prefix weight; None: not wanted
    positive_share,  # (K, n): 1 / number of positives
    d_positive,  # (K, .): gradient of `positive`; None: not wanted
    d_second_positive,  # (K, .): of `second_positive`; None: that is the same pair
    d_positive_stride,  # from one prefix to the next, of both
    scale_gradient,  # (n,): row weight times prefix weight times d loss / d scale
    WEIGHTS: tl.constexpr,  # of the K prefixes
    ADD: tl.constexpr,  # to losses and scale gradient of another softmax
    ADD_D_POSITIVE: tl.constexpr,  # to d_positive of another softmax
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the sweeps' splits and the positives up to losses, logsumexps and the gradients of the positives."""
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
        if sums.maximum is not None:
            for begin in range(0, splits, BLOCK_S):
                split = begin + tl.arange(0, BLOCK_S)
                split_at = (split * K + k).to(tl.int64)[:, None] * n + index[None, :]
                found = tl.load(
                    sums.maximum + split_at, mask=(split < splits)[:, None] & inside[None, :], other=-float("inf")
                )
                peak = tl.maximum(peak, tl.max(found, 0))
        least = tl.where(peak == -float("inf"), 0.0, tl.minimum(peak, 3.0e38))
        others = tl.zeros((BLOCK_N,), tl.float32)
        similarity = tl.zeros((BLOCK_N,), tl.float32)
        count = tl.zeros((BLOCK_N,), tl.float32)
        duplicate_similarity = tl.zeros((BLOCK_N,), tl.float32)
        for begin in range(0, splits, BLOCK_S):
            split = begin + tl.arange(0, BLOCK_S)
            present = split < splits
            totals = _of_splits(sums.total, split, index, inside, k, n, K, present)
            factor = tl.full((BLOCK_S, BLOCK_N), 1.0, tl.float32)
            if sums.maximum is not None:
                found = _of_splits(sums.maximum, split, index, inside, k, n, K, present)
                lower = tl.where(found == -float("inf"), 0.0, tl.minimum(found, 3.0e38))
                empty = (found == -float("inf")) | ~present[:, None]
                factor = tl.where(empty, 0.0, tl.exp2(lower - least[None, :]))
            others += tl.sum(totals * factor, 0)
            if sums.similarity_total is not None:
                parts = _of_splits(sums.similarity_total, split, index, inside, k, n, K, present)
                similarity += tl.sum(parts * factor, 0)
            if sums.duplicate_count is not None:
                count += tl.sum(_of_splits(sums.duplicate_count, split, index, inside, k, n, K, present), 0)
                duplicate_similarity += tl.sum(
                    _of_splits(sums.duplicate_similarity_total, split, index, inside, k, n, K, present), 0
                )
        if sums.maximum is None:
            least = tl.zeros((BLOCK_N,), tl.float32) + shift * LOG2E
        rest = tl.where(others > 0.0, tl.log2(tl.where(others > 0.0, others, 1.0)), -float("inf")) + least
        rest = tl.where(others == others, rest, others)  # not a number stays so

        positive_s = tl.load(positive + k * positive_stride + index, mask=inside, other=0.0)
        z = positive_s * (scale * LOG2E)
        second_s = tl.zeros((BLOCK_N,), tl.float32)
        second_z = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        positives = 1.0 + count
        if second_positive is not None:
            second_s = tl.load(second_positive + k * second_positive_stride + index, mask=inside, other=0.0)
            second_z = second_s * (scale * LOG2E)
            positives += 1.0
        # Finite logits of a row have no share beside an infinite one: not inf - inf.
        infinite = (tl.maximum(tl.maximum(rest, second_z), z) == float("inf")) & (rest == rest) & (z == z)
        finite_rest = tl.where(rest == float("inf"), 3.0e38, rest)
        top = tl.maximum(tl.maximum(finite_rest, second_z), z)
        sum_of_all = tl.exp2(finite_rest - top) + tl.exp2(second_z - top) + tl.exp2(z - top)
        lse = tl.where(infinite, float("inf"), tl.log2(sum_of_all) + top)
        # log(sum of all others / the positive's exp(z)), and log(1 + its exponential).
        both = tl.maximum(rest, second_z)
        base = tl.where(both == -float("inf"), 0.0, both)
        both += tl.log2(1.0 + tl.exp2(tl.minimum(rest, second_z) - base))
        both = tl.where((rest == rest) & (second_z == second_z), both, float("nan"))  # maximum() would drop a NaN
        ratio = (both - z) * LN2
        excess = tl.maximum(ratio, 0.0) + _log1p(tl.exp(-tl.abs(ratio)))
        mean = (positive_s + second_s + duplicate_similarity) / positives
        loss_sum += WEIGHTS[k] * (excess + scale * (positive_s - mean))
        p_rest, p_positive, p_second = (
            _probability(finite_rest, top, sum_of_all),
            _probability(z, top, sum_of_all),
            _probability(second_z, top, sum_of_all),
        )
        weighted = weight * WEIGHTS[k]
        at = k * n + index
        d_at = k * d_positive_stride + index
        if logsumexp is not None:
            tl.store(logsumexp + at, lse, mask=inside)
        if coefficient is not None:
            tl.store(coefficient + at, weighted, mask=inside)
        if positive_share is not None:
            tl.store(positive_share + at, 1.0 / positives, mask=inside)
        if d_positive is not None:
            strength = weighted * ((positives - 1.0) * p_positive - p_rest - p_second) / positives
            if second_positive is not None:
                second_strength = weighted * ((positives - 1.0) * p_second - p_rest - p_positive) / positives
                if d_second_positive is None:
                    strength += second_strength
                else:
                    tl.store(d_second_positive + d_at, second_strength, mask=inside)
            if ADD_D_POSITIVE:
                strength += tl.load(d_positive + d_at, mask=inside, other=0.0)
            tl.store(d_positive + d_at, strength, mask=inside)
        if scale_gradient is not None:
            expected = p_positive * positive_s + p_second * second_s
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
