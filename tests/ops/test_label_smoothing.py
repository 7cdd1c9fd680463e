"""Label smoothing of the contrastive loss against its definition, from whole matrices of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbert_kernels import contrastive_loss
from sbert_kernels.backends.reference.contrastive import direction_logits
from sbert_kernels.ops import contrastive as operation
from sbert_kernels.problems.contrastive import DIRECTIONS, ContrastiveProblem
from support.numbers import assert_close
from support.problems import loss_and_gradients, problems


def by_definition(problem: ContrastiveProblem, smoothing: float) -> Tensor:
    """Returns the loss from logits with exclusions at -inf, which the reference derives from the options."""
    given = [d for d in DIRECTIONS if d in problem.spec.directions]
    total = torch.zeros((), dtype=problem.dtype)
    for dim, weight in zip(problem.dims, problem.dim_weights, strict=True):
        queries, documents = problem.queries[:, :dim], torch.cat([column[:, :dim] for column in problem.documents])
        everyone = None if problem.all_queries is None else problem.all_queries[:, :dim]
        scale = torch.as_tensor(problem.scale.given, dtype=problem.dtype)
        matrices = [direction_logits(problem, d, queries, documents, everyone, scale) for d in given]
        groups = [matrices] if problem.spec.partition_mode == "joint" else [[matrix] for matrix in matrices]
        for group in groups:
            z, positives = (torch.cat(parts, dim=1) for parts in zip(*group, strict=True))
            positive, candidate = positives.to(z.dtype), (z > -torch.inf).to(z.dtype)
            target = (1 - smoothing) * positive / positive.sum(dim=1, keepdim=True)
            target = target + smoothing * candidate / candidate.sum(dim=1, keepdim=True)
            rows = torch.logsumexp(z, dim=1) - (target * z.masked_fill(candidate == 0, 0)).sum(dim=1)
            weights = torch.ones_like(rows) if problem.weights is None else problem.weights
            total = total + weight * (weights * rows).sum() / weights.sum() / len(groups)
    return total


@settings(max_examples=150, deadline=None)
@given(
    problem=problems(rows=9, width=7).filter(lambda p: "guide_queries" not in p),
    smoothing=st.sampled_from([0.1, 0.5, 1.0]),
    data=st.data(),
)
def test_label_smoothing_is_its_definition_for_every_option(
    problem: dict[str, Any], smoothing: float, data: st.DataObject
) -> None:
    backend = data.draw(st.sampled_from(["blockwise", "reference"]))
    ours = loss_and_gradients(backend, problem | {"label_smoothing": smoothing})

    names = ("queries", "all_queries", "scale", "weights")
    leaves = {n: problem[n].clone().requires_grad_() for n in names if isinstance(problem[n], Tensor)}
    documents = [column.clone().requires_grad_() for column in problem["documents"]]
    defaults = {"margin_strategy": "absolute", "margin": 0.0, "guide_queries": None, "guide_documents": None}
    defaults |= {"matryoshka_dims": None, "matryoshka_weights": None}
    checked = operation._validated(**(defaults | problem | leaves | {"documents": documents}))
    loss = by_definition(checked, smoothing)
    order = [leaves["queries"], *documents, *(leaves[n] for n in names[1:] if n in leaves)]
    gradients = torch.autograd.grad(loss, order, allow_unused=True, materialize_grads=True)
    for value, exact in zip(ours, (loss, *gradients), strict=True):
        torch.testing.assert_close(value, exact.detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_label_smoothing_equals_cross_entropy_s_in_every_number_format(dtype: torch.dtype) -> None:
    """Errors of at most twice those of eager torch in the same format."""
    torch.manual_seed(0)
    vectors = [torch.randn(60, 32).to(dtype) for _ in range(2)]

    def run(kind: torch.dtype, ours: bool) -> list[Tensor]:
        x, y = (v.to(kind).requires_grad_() for v in vectors)
        if ours:
            loss = contrastive_loss(x, y, label_smoothing=0.2)
        else:
            logits = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T * 20
            loss = F.cross_entropy(logits, torch.arange(60), label_smoothing=0.2)
        return [t.double() for t in (loss.detach(), *torch.autograd.grad(loss, (x, y)))]

    for value, eager, exact in zip(run(dtype, True), run(dtype, False), run(torch.float64, False), strict=True):
        assert (value - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.norm()


def test_label_smoothing_is_compiled_into_the_graph() -> None:
    queries, documents = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    ids = torch.tensor([0, 1, 1, 2, 3, 3])

    def loss(q: Tensor, d: Tensor) -> Tensor:
        return contrastive_loss(q, d, label_smoothing=0.3, duplicates="positive", document_ids=ids)

    expected = torch.autograd.grad(loss(queries, documents), (queries, documents))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(queries, documents), (queries, documents))
    for value, exact in zip(found, expected, strict=True):
        assert_close(value, exact)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan")])
def test_label_smoothing_that_is_no_part_is_refused(wrong: float) -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"label_smoothing must be in 0 \.\. 1, got"):
        contrastive_loss(x, x, label_smoothing=wrong)


def test_label_smoothing_with_a_guide_is_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 cannot be combined with guide_queries"):
        contrastive_loss(x, x, label_smoothing=0.1, guide_queries=x, guide_documents=x)


def test_without_label_smoothing_nothing_is_added() -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(contrastive_loss(x, y, label_smoothing=0.0), contrastive_loss(x, y))
