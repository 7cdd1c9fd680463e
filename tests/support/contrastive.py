"""What the tests of ``contrastive_loss`` share: inputs, one pass forward and backward, and eager torch to compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sbert_kernels import contrastive_loss
from sbert_kernels.ops import _traced, contrastive

ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def draw(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Returns normal float32 numbers that bfloat16 and float16 hold without rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float().to(device)


def loss_and_gradients(
    queries: Tensor, documents: Tensor, backend: str | None = None, dtype: torch.dtype | None = None, **options: Any
) -> list[Tensor]:
    """Returns the loss and the gradients of queries and documents, in float64, computed in ``dtype``.

    Without ``dtype``, the inputs keep theirs; they keep their layout in any case.
    """
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (queries, documents)]
    loss = contrastive_loss(*leaves, backend=backend, **options)
    return [x.detach().double() for x in (loss, *torch.autograd.grad(loss, leaves))]


def eager(queries: Tensor, documents: Tensor, scale: float, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Returns the same as ``loss_and_gradients``, of the plain loss as a user writes it in torch's operations."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (queries, documents)]
    logits = scale * F.normalize(leaves[0]) @ F.normalize(leaves[1]).T
    loss = F.cross_entropy(logits, torch.arange(len(queries), device=queries.device))
    return [x.detach().double() for x in (loss, *torch.autograd.grad(loss, leaves))]


def autocast_types(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype | None]:
    """Returns a list that grows by autocast's type, or None, with each loss that a backend computes from now on."""
    types: list[torch.dtype | None] = []
    compute = contrastive.compute_with_smoothing

    def spy(backend: Any, problem: Any, needs: Any) -> Any:
        types.append(problem.autocast)
        return compute(backend, problem, needs)

    for module in (contrastive, _traced):  # eager calls, and those in a graph
        monkeypatch.setattr(module, "compute_with_smoothing", spy)
    return types


def memory_step(n: int, dim: int, backend: str, matryoshka_dims: Sequence[int] | None = None) -> Callable[[], bool]:
    """Returns one step on ``n`` float32 rows of ``dim`` entries, for the memory meter to run in a process of its own.

    A small batch has warmed up the backend by then. The step returns True if its gradient is finite.
    """
    torch.manual_seed(0)
    queries, documents = (torch.randn(n, dim, requires_grad=True) for _ in range(2))
    options: dict[str, Any] = {"matryoshka_dims": matryoshka_dims, "backend": backend}
    contrastive_loss(queries[:64], documents[:64], **options).backward()
    queries.grad = documents.grad = None

    def one_step() -> bool:
        contrastive_loss(queries, documents, **options).backward()
        return math.isfinite(queries.grad.sum().item())

    return one_step
