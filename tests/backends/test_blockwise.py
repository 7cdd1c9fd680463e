"""What is blockwise's own: blocks of any size, products of any rounding, bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sbert_kernels import contrastive_loss, machine, use_backend
from sbert_kernels import settings as library
from support.contrastive import memory_step


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    with use_backend("blockwise"):
        yield


def test_copies_of_the_positive_tie_with_it_whatever_the_product_rounds_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a guide's product does on TF32 tensor cores. All texts are equal here: none may be excluded."""
    n, product = 64, torch.mm
    generator = torch.Generator().manual_seed(0)
    queries, guide_queries = (torch.randn(n, 24, generator=generator) for _ in range(2))
    text, guide_text = (torch.randn(1, 24, generator=generator).expand(n, 24) for _ in range(2))

    def rounded(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        return product(a.bfloat16().float(), b.bfloat16().float(), **options)

    monkeypatch.setattr(torch, "mm", rounded)
    loss = contrastive_loss(queries, text, guide_queries=guide_queries, guide_documents=guide_text)
    assert loss.item() == pytest.approx(math.log(n), rel=1e-2)


def test_block_size_does_not_change_the_result() -> None:
    torch.manual_seed(0)
    queries, documents = torch.randn(700, 32), torch.randn(700, 32)
    whole = contrastive_loss(queries, documents)
    with library.override(block_bytes=700 * 4 * 9):
        parts = contrastive_loss(queries, documents)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("matryoshka_dims", [None, (64, 48, 32, 16)])
def test_memory_is_a_block_and_some_copies_of_the_inputs(matryoshka_dims: tuple[int, ...] | None) -> None:
    """N x N fp32 logits alone would take 576 MiB; a block is 32 MiB and an operand 3. More prefixes take no more."""
    n, dim = 12_288, 64
    result = machine.run_in_process(memory_step, n, dim, "blockwise", matryoshka_dims)
    assert result.value is True
    assert result.peak_extra_bytes < (32 + 8 * 3 + 16) * library.MIB
