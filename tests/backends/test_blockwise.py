"""The blockwise backend equals the reference for every option and block size, in bounded memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbert_kernels import contrastive_loss
from sbert_kernels import settings as library
from sbert_kernels.benchmarks import harness

DIRECTIONS = ("query_to_query", "doc_to_query", "doc_to_doc")


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of contrastive_loss over its whole option space, in fp64."""
    n, dim, columns = draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    guided, gathered = draw(st.booleans()), draw(st.booleans())
    offset, beyond = (draw(st.integers(0, 3)), draw(st.integers(0, 3))) if gathered else (0, 0)
    world = offset + n + beyond
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def vectors(rows: int, width: int = dim) -> torch.Tensor:
        return torch.randn(rows, width, dtype=torch.float64, generator=generator)

    def ids(rows: int) -> torch.Tensor:
        return torch.randint(0, 1 + n // 2, (rows,), generator=generator)

    partition = draw(st.sampled_from(["joint", "per_direction"]))
    extra = draw(st.sets(st.sampled_from(DIRECTIONS if partition == "joint" else DIRECTIONS[1:2])))
    everyone = vectors(world) if gathered and not guided else None
    scale = draw(st.sampled_from([0.5, 19.9, 40.1, 150.0]))
    problem = {
        "queries": vectors(n),
        "documents": [vectors(world) for _ in range(columns)],
        "all_queries": everyone,
        "row_offset": offset,
        "scale": torch.tensor(scale, dtype=torch.float64) if draw(st.booleans()) else scale,
        "similarity": draw(st.sampled_from(["cos", "dot"])),
        "directions": ("query_to_doc", *sorted(extra)),
        "partition_mode": partition,
        "hardness_mode": draw(st.sampled_from([None, "in_batch_negatives", "hard_negatives", "all_negatives"])),
        "hardness_strength": draw(st.sampled_from([0.0, 3.0])),
        "weights": torch.rand(n, dtype=torch.float64, generator=generator) if draw(st.booleans()) else None,
        "duplicates": draw(st.sampled_from(["keep", "mask", "positive"])),
        "query_ids": ids(n if everyone is None else world),
        "document_ids": ids(world * columns),
    }
    if guided:
        problem |= {
            "guide_queries": vectors(n, 4),
            "guide_documents": [vectors(world, 4) for _ in range(columns)],
            "margin_strategy": draw(st.sampled_from(["absolute", "relative"])),
            "margin": draw(st.sampled_from([0.0, 0.2, -0.5])),
        }
    return problem


def loss_and_gradients(backend: str, problem: dict[str, Any]) -> list[torch.Tensor]:
    def leaf(value: Any) -> Any:
        return value.clone().requires_grad_() if isinstance(value, torch.Tensor) else value

    problem = {key: leaf(value) if "ids" not in key and "guide" not in key else value for key, value in problem.items()}
    documents = [leaf(column) for column in problem.pop("documents")]
    queries = problem.pop("queries")
    loss = contrastive_loss(queries, documents, backend=backend, **problem)
    others = [problem[key] for key in ("all_queries", "scale", "weights") if isinstance(problem[key], torch.Tensor)]
    return [loss.detach(), *torch.autograd.grad(loss, [queries, *documents, *others])]


@settings(max_examples=300, deadline=None)
@given(problem=problems(), block_rows=st.integers(1, 14))
def test_equals_the_reference(problem: dict[str, Any], block_rows: int) -> None:
    row_bytes = 8 * 4 * sum(map(len, problem["documents"]))
    with library.override(block_bytes=block_rows * row_bytes):
        ours = loss_and_gradients("blockwise", problem)
    for value, exact in zip(ours, loss_and_gradients("reference", problem), strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-11)


def test_tiny_losses_keep_their_digits() -> None:
    """loss = log(1 + x) and gradient = -x / (1 + x) for x = exp(-30): eager fp32 gives 0 for both."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = contrastive_loss(queries, queries.detach().clone(), scale=30.0)
    (gradient,) = torch.autograd.grad(loss, queries)
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-4)
    assert gradient[0, 1].item() == pytest.approx(15 * math.exp(-30), rel=1e-4)


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


def test_is_deterministic() -> None:
    torch.manual_seed(0)
    problem = {
        "queries": torch.randn(600, 48),
        "documents": [torch.randn(600, 48)],
        "all_queries": None,
        "scale": torch.tensor(20.0),
        "weights": torch.rand(600),
    }
    first = loss_and_gradients("blockwise", problem)
    for _ in range(3):
        assert all(map(torch.equal, first, loss_and_gradients("blockwise", problem)))


def test_more_entries_than_a_32_bit_index_counts() -> None:
    """46400^2 > 2^31: the last row, which the weights single out, against its own logsumexp."""
    n = 46_400
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(n, 2, generator=generator) for _ in range(2))
    weights = torch.zeros(n)
    weights[-1] = 1.0
    loss = contrastive_loss(queries, documents, similarity="dot", scale=1.0, weights=weights)
    logits = documents.double() @ queries[-1].double()
    expected = torch.logsumexp(logits, 0) - logits[-1]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def forward_backward(n: int, dim: int) -> Any:
    """Target of the memory meter: warm up on a small batch, then one step of the wanted size."""
    torch.manual_seed(0)
    queries, documents = (torch.randn(n, dim, requires_grad=True) for _ in range(2))
    contrastive_loss(queries[:64], documents[:64]).backward()
    queries.grad = documents.grad = None

    def step() -> bool:
        contrastive_loss(queries, documents).backward()
        return math.isfinite(queries.grad.sum().item())

    return step


def test_memory_is_a_block_and_some_copies_of_the_inputs() -> None:
    """N x N fp32 logits alone would take 576 MiB; a block is 32 MiB and an operand 3."""
    n, dim = 12_288, 64
    result = harness.run_in_process(forward_backward, n, dim)
    assert result.value is True
    assert result.peak_extra_bytes < (32 + 8 * 3 + 16) * library.MIB
