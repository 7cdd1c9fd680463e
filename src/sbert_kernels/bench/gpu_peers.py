"""Other libraries' fused cross-entropies on a GPU, fed with queries and documents, as peers of the in-batch loss.

They are written for the last layer of a language model (hidden states, the weights of a vocabulary, targets). Queries
of unit length are the hidden states, documents of unit length times the scale the weights, and row i's target is i.
Normalising is part of the step, forward and backward, as it is of ours. Each runs as it comes, with its own defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbert_kernels import machine

# hidden states (N, D), weights (M, D) and targets (N,) to the mean cross-entropy of hidden @ weights.T
CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """Names a distribution on PyPI; `load` imports it and returns its function, or raises ImportError."""

    distribution: str
    load: Callable[[], CrossEntropy]
    half_only: bool = False  # it takes float16 and bfloat16 alone


def _liger_kernel() -> CrossEntropy:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weights, targets: loss(weights, hidden, targets)


def _cut_cross_entropy() -> CrossEntropy:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _inf_cl() -> CrossEntropy:
    from inf_cl import cal_flash_loss

    def loss(hidden: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
        # It walks through the dimension in "heads" that must divide it; 256 is its own choice.
        return cal_flash_loss(hidden, weights, targets, head_dim=math.gcd(hidden.shape[1], 256)).mean()

    return loss


PEERS = {
    "liger-kernel": Peer("liger-kernel", _liger_kernel),
    "cut-cross-entropy": Peer("cut-cross-entropy", _cut_cross_entropy, half_only=True),
    "inf-cl": Peer("inf_cl", _inf_cl),
}


class InBatchLoss(nn.Module):
    """Computes the loss of (queries, documents) columns by a cross-entropy; called as the losses of both libraries."""

    def __init__(self, cross_entropy: CrossEntropy, scale: float) -> None:
        super().__init__()
        self.cross_entropy, self.scale = cross_entropy, scale

    def forward(self, features: list[dict[str, Tensor]], labels: None) -> Tensor:
        """Returns the mean loss over the rows."""
        queries, documents = (F.normalize(column["embedding"], dim=1) for column in features)
        return self.cross_entropy(queries, self.scale * documents, torch.arange(len(queries), device=queries.device))


def load() -> tuple[dict[str, CrossEntropy], dict[str, str]]:
    """Returns the peers that can be imported, and why each of the others cannot."""
    found: dict[str, CrossEntropy] = {}
    missing: dict[str, str] = {}
    for name, peer in PEERS.items():
        try:
            found[name] = peer.load()
        except Exception as error:  # whatever a package does at its import: it is not ours to mend
            absent = machine.version(peer.distribution) is None
            missing[name] = "not installed" if absent else f"import failed: {type(error).__name__}: {error}"
    return found, missing


def advice(missing: dict[str, str]) -> str | None:
    """Returns how to install the peers that are missing, or None if none is."""
    wanted = [PEERS[name].distribution for name, reason in missing.items() if reason == "not installed"]
    return f"more peers to compare with: pip install {' '.join(wanted)}" if wanted else None
