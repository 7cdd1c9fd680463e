"""The ranking operation in torch ops: a sort and two scans, O(n log n) time and O(n) memory, on any device.

With z = scale * s and the pairs sorted by label, the sum over pairs of pairs splits into a sum over pairs:

    u_i = logsumexp of log w_j - z_j over the labels above that of i       # a scan from the top
    v_i = logsumexp of log w_j + z_j over the labels below that of i       # a scan from the bottom
    L = log(1 + sum_i w_i exp(z_i + u_i))
    dL/dz_i = w_i (exp(z_i + u_i - L) - exp(v_i - z_i - L)),   dL/dw_i = exp(z_i + u_i - L) + exp(v_i - z_i - L)

The factorisation of the CoSENT sum is that of sentence-transformers' CoSENTLoss (6.2); that of its gradient follows.
Everything of size n is float64, where the device has it: it costs nothing beside the sort, and large scales need it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...problems.ranking import Needs, RankingProblem, RankingResult


def ranking(problem: RankingProblem, needs: Needs) -> RankingResult:
    """Returns loss and gradients of the ranking operation."""
    dtype = torch.float32 if problem.device.type == "mps" else torch.float64
    n = len(problem.scores)
    labels, order = problem.labels.sort(stable=True)
    scores = problem.scores.detach()[order].to(dtype)
    scale = problem.scale.factor(dtype, problem.device)
    z = scores * scale
    weights = None if problem.weights is None else problem.weights.detach()[order].to(dtype)
    # What each pair adds to the sums over higher and over lower labels: nothing without weight, whatever its score.
    to_higher, to_lower = -z, z
    if weights is not None:
        to_higher, to_lower = ((weights.log() + part).masked_fill(weights == 0, -torch.inf) for part in (-z, z))

    above = torch.searchsorted(labels, labels, right=True)  # first of the higher labels
    below = torch.searchsorted(labels, labels)  # one past the last of the lower ones
    nothing = z.new_full((1,), -torch.inf)
    u = torch.cat([torch.logcumsumexp(to_higher.flip(0), dim=0).flip(0), nothing])[above]
    # A pair without a higher label is in no sum, even at an infinite score.
    pull = torch.where(above < n, z + u, -torch.inf)
    # log(1 + e^total), exact to its last digit also where it is tiny.
    # Masked, not selected: a selection would have to wait for its own length.
    counted = pull if weights is None else (pull + weights.log()).masked_fill(weights == 0, -torch.inf)
    total = torch.logsumexp(counted, dim=0)
    loss = torch.logaddexp(total, z.new_zeros(()))
    undefined = z.isnan().any()
    if problem.device.type != "cpu" and labels.is_floating_point():
        undefined = undefined | labels.isnan().any()  # on the CPU they were refused
    loss = torch.where(undefined, torch.nan, loss)
    result = RankingResult(loss.to(problem.dtype))
    if not any(needs):
        return result
    v = torch.cat([nothing, torch.logcumsumexp(to_lower, dim=0)])[below]
    push = torch.where(below > 0, v - z, -torch.inf)
    pulled, pushed = torch.exp(pull - loss), torch.exp(push - loss)
    gradient = pulled - pushed
    if weights is not None:
        gradient = torch.where(weights == 0, 0.0, gradient * weights)
    if needs.scores:
        result = result._replace(scores=_unsorted(gradient * scale, order, problem.dtype))
    if needs.scale:
        result = result._replace(scale=torch.linalg.vecdot(gradient, scores).to(problem.dtype))
    if needs.weights:
        result = result._replace(weights=_unsorted(pulled + pushed, order, problem.dtype))
    return result


def _unsorted(values: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(values, dtype=dtype).scatter_(0, order, values.to(dtype))
