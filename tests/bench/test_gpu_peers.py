"""The libraries that a GPU's benchmark compares with: each computes the loss that stock does, or is told apart."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbert_kernels.bench import gpu_peers, gpu_steps
from sbert_kernels.bench.gpu_jobs import FOUR, Job, gist, in_batch, symmetric
from sbert_kernels.bench.peers import largest_error
from sbert_kernels.workloads.recipes import STOCK
from support.peers import plain


def of_documents(temperature: float, queries: Tensor, documents: Tensor) -> Tensor:
    queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    return plain(queries / temperature, documents, torch.arange(len(queries)))


class MemoryEfficientQwen3Loss(nn.Module):
    """memeff's losses with its signatures and its defaults, of torch's cross-entropy."""

    def __init__(self, temperature: float = 0.07, margin: float = 0.1, stable: bool = True) -> None:
        super().__init__()
        assert margin >= 2  # else it excludes negatives
        assert not stable  # else its gradients have a factor
        self.temperature = temperature

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        return of_documents(self.temperature, queries, documents)


class MemoryEfficientMatryoshkaQwen3Loss(MemoryEfficientQwen3Loss):
    def __init__(self, dims: list[int], **options: Any) -> None:
        super().__init__(**options)
        assert list(dims) == sorted(dims)
        self.dims = dims

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        parts = [of_documents(self.temperature, queries[:, :dim], documents[:, :dim]) for dim in self.dims]
        return torch.stack(parts).sum()


class MemoryEfficientCLIPLoss(nn.Module):
    def __init__(self, temperature: float = 0.07, stable: bool = True) -> None:
        super().__init__()
        assert not stable
        self.temperature = temperature

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return (of_documents(self.temperature, images, texts) + of_documents(self.temperature, texts, images)) / 2


@pytest.fixture
def fake_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers' modules with their signatures, of torch's cross-entropy; torch's own is what it is."""

    class LigerFusedLinearCrossEntropyLoss(nn.Module):
        def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor) -> Tensor:
            return plain(_input, lin_weight, target)

    def linear_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(e @ c.T, targets, reduction=reduction)

    def chunked_linear_cross_entropy(
        x: Tensor, weight: Tensor, target: Tensor, chunk_size: int = 4096, tuned: bool = True
    ) -> Tensor:
        return plain(x, weight, target)

    def cal_flash_loss(
        q: Tensor, k: Tensor, labels: Tensor | None = None, scale: float | None = None, head_dim: int = 256
    ) -> Tensor:
        q, k = (x.view(len(x), -1, head_dim).flatten(1).float() for x in (q, k))
        return F.cross_entropy((scale or 1.0) * q @ k.T, labels, reduction="none")

    for path, attributes in {
        "liger_kernel": (),
        "liger_kernel.transformers": (LigerFusedLinearCrossEntropyLoss,),
        "cut_cross_entropy": (linear_cross_entropy,),
        "quack": (),
        "quack.linear_cross_entropy": (chunked_linear_cross_entropy,),
        "memeff": (MemoryEfficientQwen3Loss, MemoryEfficientMatryoshkaQwen3Loss, MemoryEfficientCLIPLoss),
        "inf_cl": (cal_flash_loss,),
    }.items():
        module = types.ModuleType(path)
        for attribute in attributes:
            setattr(module, attribute.__name__, attribute)
        monkeypatch.setitem(sys.modules, path, module)


def error_of(name: str, case: Any) -> float:
    """The largest error of a peer's loss and gradients against stock's."""
    job = Job("contrastive", case)
    found, missing = gpu_peers.load()
    assert missing == {}
    loss = found[name](case)
    assert isinstance(loss, nn.Module)
    stock = gpu_steps.loss_and_gradients(gpu_steps.loss_of(STOCK, job, "cpu"), job, "cpu")
    return largest_error(gpu_steps.loss_and_gradients(loss, job, "cpu"), stock)


needs_linear_cross_entropy = pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyOptions"), reason="torch has no chunked linear_cross_entropy before 2.13"
)


@needs_linear_cross_entropy
@pytest.mark.usefixtures("fake_peers")
@pytest.mark.parametrize("dim", [384, 123])
@pytest.mark.parametrize("name", gpu_peers.PEERS)
def test_peers_compute_the_loss_that_stock_does(name: str, dim: int) -> None:
    assert error_of(name, in_batch(20, dim, dtype="float32")) < 1e-5


@needs_linear_cross_entropy
@pytest.mark.usefixtures("fake_peers")
@pytest.mark.parametrize("case", [symmetric(20, 16, "float32"), in_batch(20, 16, dtype="float32", dims=(16, 8))])
def test_memeff_computes_other_losses_of_stock_too(case: Any) -> None:
    assert error_of("memeff", case) < 1e-5


@pytest.mark.usefixtures("fake_peers")
def test_peers_without_a_loss_are_not_timed_for_it() -> None:
    found, _ = gpu_peers.load()
    cases = {
        "symmetric": symmetric(8, 8),
        "matryoshka": in_batch(8, 8, dims=(8, 4)),
        "negatives": in_batch(8, 8, negatives=1),
        "gist": gist(8, 8),
        "four": in_batch(8, 8, **FOUR),
    }
    served = {
        name: [what for what, case in cases.items() if not isinstance(make(case), str)] for name, make in found.items()
    }
    assert served.pop("memeff") == ["symmetric", "matryoshka"]
    assert not any(served.values())


def test_peers_that_are_not_there_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peers.machine, "version", lambda name: "1" if name in ("inf_cl", "torch") else None)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    for module in ("liger_kernel", "liger_kernel.transformers", "cut_cross_entropy", "inf_cl", "memeff", "quack"):
        monkeypatch.setitem(sys.modules, module, None)
    found, missing = gpu_peers.load()
    assert found == {}
    assert {name for name, why in missing.items() if why == "not installed"} == {
        "liger-kernel",
        "cut-cross-entropy",
        "memeff",
        "quack",
    }
    assert missing["inf-cl"].startswith("import failed: ModuleNotFoundError")
    assert missing["torch"].startswith("import failed: ImportError: torch 2.")
    wanted = "liger-kernel cut-cross-entropy memeff quack-kernels siglip-kernel"
    assert gpu_peers.advice(missing) == f"more peers to compare with: pip install {wanted}"
    monkeypatch.setattr(gpu_peers.machine, "version", lambda name: "1")
    assert gpu_peers.advice({"inf-cl": "import failed: ImportError: no GPU"}) is None
