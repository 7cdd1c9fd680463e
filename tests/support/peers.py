"""What stands for the libraries that a GPU's benchmark compares with, where they are not installed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sbert_kernels.bench import gpu_peers


def plain(hidden: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of logits that are products of two matrices, as such libraries compute it."""
    return F.cross_entropy(hidden @ weights.T, targets)


def in_batch_loss(factor: float) -> gpu_peers.MakeLoss:
    """Returns what makes a peer's in-batch loss, times a factor: a peer that is wrong, unless it is 1."""
    return lambda case: gpu_peers.InBatchLoss(lambda *args: factor * plain(*args), case.scale)
