"""Other libraries' losses on a GPU, as peers of the in-batch loss; each runs as it comes, with its own defaults.

Most are fused cross-entropies for the last layer of a language model (hidden states, the weights of a vocabulary,
targets). Queries of unit length are the hidden states, documents of unit length times the scale the weights, and row
i's target is i. Normalising is part of the step, forward and backward, as it is of ours.

What each takes was read in its source, in these versions:

    liger-kernel 0.8.5       LigerFusedLinearCrossEntropyLoss()(weights, hidden, targets); keeps gradients in the
                             inputs' type unless accum_dtype says otherwise
    cut-cross-entropy 25.1.1 linear_cross_entropy(hidden, weights, targets); its backward takes half precision alone
    torch 2.13               torch.nn.functional.linear_cross_entropy(hidden, weights, targets, options=...): without
                             options all logits are in memory; LinearCrossEntropyOptions() takes chunks
    quack-kernels 0.6.5      quack.linear_cross_entropy.chunked_linear_cross_entropy(hidden, weights, targets); half
                             precision, N and D multiples of 8, sm_90 or newer. `tuned` measures dozens of tiles, which
                             takes minutes; its own pipeline for sm_90 has nothing to tune
    memeff 0.3.1             MemoryEfficientQwen3Loss: normalises, a softmax over each row. margin=2 excludes nothing;
                             stable=False, or gradients are multiplied by sqrt(N temperature). The CLIP loss is the mean
                             of both directions, the Matryoshka loss the sum over prefixes (ascending multiples of 64)
    inf_cl 1.2.1             cal_flash_loss(queries, documents, labels, head_dim=...): in float32, a loss a row; 18
                             times our time at N=65536
    siglip-kernel 0.1.2      fused_siglip_loss(queries, documents, log_temperature, bias), both 0-d tensors with
                             gradients: the sigmoid loss, another loss of the same three products
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbert_kernels import machine
from sbert_kernels.bench.cases.contrastive import SYMMETRIC, Case

# hidden states (N, D), weights (M, D) and targets (N,) to the mean cross-entropy of hidden @ weights.T
CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]
# a case to its loss, which is called as the losses of both libraries; or to why there is none
MakeLoss = Callable[[Case], "nn.Module | str"]

OTHER_LOSS, NOT_INSTALLED = "has no such loss", "not installed"


@dataclass(frozen=True)
class Peer:
    """Describes another library; `load` imports it and returns how to make its losses, or raises ImportError.

    Attributes:
        distribution: Its name on PyPI.
        load: See above.
        half_only: It takes float16 and bfloat16 alone.
        most_rows: It is not timed with more: it has been found many times slower.
    """

    distribution: str
    load: Callable[[], MakeLoss]
    half_only: bool = False
    most_rows: int | None = None

    def why_not(self, case: Case) -> str | None:
        """Returns why it is not timed for a case, or None."""
        if self.half_only and case.dtype == "float32":
            return "no float32"
        if self.most_rows is not None and case.batch > self.most_rows:
            return f"at most N={self.most_rows}: many times slower"
        return None


class InBatchLoss(nn.Module):
    """Computes the loss of (queries, documents) columns by a cross-entropy; called as the losses of both libraries."""

    def __init__(self, cross_entropy: CrossEntropy, scale: float) -> None:
        super().__init__()
        self.cross_entropy, self.scale = cross_entropy, scale

    def forward(self, features: list[dict[str, Tensor]], labels: None) -> Tensor:
        """Returns the mean loss over the rows."""
        queries, documents = (F.normalize(column["embedding"], dim=1) for column in features)
        return self.cross_entropy(queries, self.scale * documents, torch.arange(len(queries), device=queries.device))


class OfPairs(nn.Module):
    """Calls a loss of (queries, documents) with the columns that the losses of both libraries take."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, features: list[dict[str, Tensor]], labels: None) -> Tensor:
        """Returns the loss."""
        queries, documents = (column["embedding"] for column in features)
        return self.loss(queries, documents)


class SigmoidLoss(nn.Module):
    """Computes a sigmoid loss with temperature and bias; called as the losses of both libraries."""

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], device: str) -> None:
        super().__init__()
        self.loss = loss
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0), device=device))
        self.bias = nn.Parameter(torch.tensor(-10.0, device=device))

    def forward(self, features: list[dict[str, Tensor]], labels: None) -> Tensor:
        """Returns the loss."""
        queries, documents = (F.normalize(column["embedding"], dim=1) for column in features)
        return self.loss(queries, documents, self.log_temperature, self.bias)


def is_plain(case: Case) -> bool:
    """Returns True for query-to-document losses over two columns, which a cross-entropy can compute."""
    return not (case.dims or case.negatives or case.guided or case.terms > 1)


def _by(cross_entropy: CrossEntropy) -> MakeLoss:
    """Returns how to make the plain loss by a cross-entropy."""
    return lambda case: InBatchLoss(cross_entropy, case.scale) if is_plain(case) else OTHER_LOSS


def _liger_kernel() -> MakeLoss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return _by(lambda hidden, weights, targets: loss(weights, hidden, targets))


def _cut_cross_entropy() -> MakeLoss:
    from cut_cross_entropy import linear_cross_entropy

    return _by(linear_cross_entropy)


def _torch() -> MakeLoss:
    linear_cross_entropy = getattr(F, "linear_cross_entropy", None)
    options = getattr(nn, "LinearCrossEntropyOptions", None)
    if linear_cross_entropy is None or options is None:
        raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy, 2.13 has")
    return _by(lambda hidden, weights, targets: linear_cross_entropy(hidden, weights, targets, options=options()))


def _quack() -> MakeLoss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _by(lambda hidden, weights, targets: chunked_linear_cross_entropy(hidden, weights, targets, tuned=False))


def _memeff() -> MakeLoss:
    import memeff

    def make(case: Case) -> nn.Module | str:
        options = {"temperature": 1 / case.scale, "stable": False}
        if case.negatives or case.guided:
            return OTHER_LOSS
        if case.dims:
            loss = memeff.MemoryEfficientMatryoshkaQwen3Loss(sorted(case.dims), margin=2.0, **options)
        elif dict(case.options) == SYMMETRIC:
            loss = memeff.MemoryEfficientCLIPLoss(**options)
        elif case.terms > 1:
            return OTHER_LOSS
        else:
            loss = memeff.MemoryEfficientQwen3Loss(margin=2.0, **options)
        return OfPairs(loss)

    return make


def _inf_cl() -> MakeLoss:
    from inf_cl import cal_flash_loss

    def loss(hidden: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
        # It walks through the dimension in "heads" that must divide it; 256 is its own choice.
        return cal_flash_loss(hidden, weights, targets, head_dim=math.gcd(hidden.shape[1], 256)).mean()

    return _by(loss)


PEERS = {
    "liger-kernel": Peer("liger-kernel", _liger_kernel),
    "cut-cross-entropy": Peer("cut-cross-entropy", _cut_cross_entropy, half_only=True),
    "torch": Peer("torch", _torch),
    "memeff": Peer("memeff", _memeff),
    "quack": Peer("quack-kernels", _quack, half_only=True),
    "inf-cl": Peer("inf_cl", _inf_cl, most_rows=4096),
}
SIGMOID = "siglip-kernel"


def sigmoid_loss(device: str) -> SigmoidLoss:
    """Returns siglip-kernel's loss; raises ImportError where it is not installed."""
    from siglip_kernel import fused_siglip_loss

    return SigmoidLoss(fused_siglip_loss, device)


def load() -> tuple[dict[str, MakeLoss], dict[str, str]]:
    """Returns the peers that can be imported, and why each of the others cannot."""
    found: dict[str, MakeLoss] = {}
    missing: dict[str, str] = {}
    for name, peer in PEERS.items():
        try:
            found[name] = peer.load()
        except Exception as error:  # whatever a package does at its import: it is not ours to mend
            absent = machine.version(peer.distribution) is None
            missing[name] = NOT_INSTALLED if absent else f"import failed: {type(error).__name__}: {error}"
    return found, missing


def advice(missing: dict[str, str]) -> str | None:
    """Returns how to install the peers that are missing, or None if none is."""
    wanted = [PEERS[name].distribution for name, reason in missing.items() if reason == NOT_INSTALLED]
    wanted += [] if machine.version(SIGMOID) else [SIGMOID]
    return f"more peers to compare with: pip install {' '.join(wanted)}" if wanted else None


def versions() -> dict[str, str | None]:
    """Returns the installed version of each distribution."""
    return {name: machine.version(name) for name in (*(peer.distribution for peer in PEERS.values()), SIGMOID)}
