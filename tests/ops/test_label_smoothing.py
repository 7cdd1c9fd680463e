"""Label smoothing beside torch's; test_against_reference.py compares it with the reference for every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sbert_kernels import contrastive_loss
from support.numbers import assert_close


def vectors(rows: int, width: int, count: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator) for _ in range(count)]


def torch_s(x: Tensor, y: Tensor, smoothing: float) -> Tensor:
    logits = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T * 20
    return F.cross_entropy(logits, torch.arange(len(x)), label_smoothing=smoothing)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_cross_entropy_s_in_every_number_format(dtype: torch.dtype) -> None:
    """Errors of at most twice those of eager torch in the same format."""
    given = [v.to(dtype) for v in vectors(60, 32)]

    def run(kind: torch.dtype, ours: bool) -> list[Tensor]:
        x, y = (v.to(kind).requires_grad_() for v in given)
        loss = contrastive_loss(x, y, label_smoothing=0.2) if ours else torch_s(x, y, 0.2)
        return [t.double() for t in (loss.detach(), *torch.autograd.grad(loss, (x, y)))]

    for value, eager, exact in zip(run(dtype, True), run(dtype, False), run(torch.float64, False), strict=True):
        assert (value - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_columns_that_are_masked_are_no_candidates(backend: str) -> None:
    """Equal to cross-entropy over each row's remaining columns."""
    (x, y), ids = vectors(5, 4), torch.tensor([0, 1, 0, 2, 0])
    logits = (F.normalize(x, dim=1) @ F.normalize(y, dim=1).T * 20).double()
    rows = []
    for i in range(5):
        left = [j for j in range(5) if j == i or ids[j] != ids[i]]
        rows.append(F.cross_entropy(logits[i, left], torch.tensor(left.index(i)), label_smoothing=0.3))
    options: dict[str, Any] = {"duplicates": "mask", "document_ids": ids, "label_smoothing": 0.3}
    loss = contrastive_loss(x.double(), y.double(), backend=backend, **options)
    torch.testing.assert_close(loss, torch.stack(rows).mean(), rtol=1e-6, atol=0)


def test_gives_the_same_bits_each_time() -> None:
    (x, y), ids = vectors(1024, 64), torch.arange(1024) % 300
    found = []
    for _ in range(4):
        leaves = [v.clone().requires_grad_() for v in (x, y)]
        loss = contrastive_loss(*leaves, label_smoothing=0.1, duplicates="positive", document_ids=ids)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_is_compiled_into_the_graph() -> None:
    queries, documents = (v.requires_grad_() for v in vectors(6, 4))
    ids = torch.tensor([0, 1, 1, 2, 3, 3])

    def loss(q: Tensor, d: Tensor) -> Tensor:
        return contrastive_loss(q, d, label_smoothing=0.3, duplicates="positive", document_ids=ids)

    expected = torch.autograd.grad(loss(queries, documents), (queries, documents))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_close(list(torch.autograd.grad(compiled(queries, documents), (queries, documents))), list(expected))


@pytest.mark.usefixtures("interpreted")
def test_a_zero_row_of_float16_gets_no_infinite_gradient_on_a_gpu() -> None:
    """Its gradient over the least norm is more than float16 holds; the kernels give 0, and smoothing adds none."""
    x, y = (v.half() for v in vectors(4, 16))
    x[1] = 0
    x.requires_grad_()
    contrastive_loss(x, y, label_smoothing=0.1, backend="triton").backward()
    assert torch.equal(x.grad[1], torch.zeros(16, dtype=torch.float16))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan")])
def test_what_is_no_part_is_refused(wrong: float) -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"label_smoothing must be in 0 \.\. 1, got"):
        contrastive_loss(x, x, label_smoothing=wrong)


def test_a_guide_is_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 cannot be combined with guide_queries"):
        contrastive_loss(x, x, label_smoothing=0.1, guide_queries=x, guide_documents=x)
