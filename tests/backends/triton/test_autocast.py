"""What the Triton kernels multiply under autocast, by their plan and by their numbers in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import aot
from benchmarks import autocast as benchmark
from sbert_kernels import contrastive_loss, settings
from sbert_kernels.backends.triton.targets import Target
from sbert_kernels.problems.contrastive import Needs
from support.contrastive import ALL_DIRECTIONS, draw, loss_and_gradients
from support.numbers import relative_errors

pytestmark = pytest.mark.usefixtures("interpreted")

PLAIN, MATRYOSHKA = (next(case for case in aot.CASES if case.name == name) for name in ("plain", "matryoshka"))


def plan_of(case: aot.Case, dtype: torch.dtype, autocast: str | None, target: str) -> Any:
    from sbert_kernels.backends.triton.contrastive.planner import make_plan

    problem = aot.problem_of(case, dtype, 384, rows=1000)
    problem = replace(problem, spec=replace(problem.spec, autocast=autocast))
    return make_plan(problem, Needs(True, True), Target(*aot.TARGETS[target]))


@pytest.mark.parametrize("target", ["sm_75", "sm_90", "gfx942"])
@pytest.mark.parametrize("case", [PLAIN, MATRYOSHKA], ids=lambda case: case.name)
def test_autocast_gives_all_embeddings_its_type(case: aot.Case, target: str) -> None:
    """They are multiplied as embeddings that arrive in it are: what a GPU lacks is replaced in the same way."""
    for name in ("bfloat16", "float16"):
        arrived = plan_of(case, getattr(torch, name), None, target).precision
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            plan = plan_of(case, dtype, name, target)
            assert plan.precision == arrived
            # Tiles are sized for operands of this type.
            assert {plan.queries.dtype, plan.documents.dtype} == {arrived.dtype}
    assert plan_of(PLAIN, torch.float32, "float16", target).precision.name == "float16"
    with settings.override(matmul="float32"):
        assert plan_of(case, torch.float32, "bfloat16", target).precision.name == "float32"
    assert plan_of(case, torch.float32, None, target).precision.name == "float32"


@pytest.mark.parametrize(("kind", "scale"), [("random", 100.0), ("alike", 20.0)])
@pytest.mark.parametrize("dtype", benchmark.TYPES.values(), ids=benchmark.TYPES)
def test_errors_are_at_most_twice_those_of_stock_under_autocast(dtype: torch.dtype, kind: str, scale: float) -> None:
    errors = benchmark.errors_of(dtype, 33, kind, scale, backend="triton", dim=48)
    for quantity in ("loss", "dQ", "dD"):
        assert errors[f"ours {quantity}"] <= 2 * errors[f"stock {quantity}"], errors
    assert errors["ours dQ"] > torch.finfo(dtype).eps / 1000  # products of float32 would be more exact


@pytest.mark.parametrize(
    "options",
    [
        {"similarity": "dot", "scale": 0.5},
        {"directions": ALL_DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 3.0},
        {"matryoshka_dims": [8, 24]},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("dtype", benchmark.TYPES.values(), ids=benchmark.TYPES)
def test_embeddings_lose_no_more_than_by_a_cast(dtype: torch.dtype, options: dict[str, Any]) -> None:
    leaves = [torch.randn(20, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    exact = loss_and_gradients(*leaves, "reference", torch.float64, **options)
    cast = loss_and_gradients(*leaves, "triton", dtype, **options)
    with torch.autocast("cpu", dtype):
        found = loss_and_gradients(*leaves, "triton", **options)
    (loss, *ours), (_, *theirs) = (relative_errors(values, exact) for values in (found, cast))
    assert loss <= torch.finfo(dtype).eps / 8  # of one batch it may be nearly nothing after a cast
    assert all(x <= 2 * y for x, y in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("dtype", benchmark.TYPES.values(), ids=benchmark.TYPES)
def test_an_embedding_of_zeros_spoils_no_other(dtype: torch.dtype) -> None:
    """Its own gradient, over a norm of zero, is more than float16 products hold, and is zero with them."""
    queries, documents = draw(12, 16, seed=0), draw(12, 16, seed=1)
    queries[3], documents[5] = 0.0, 0.0

    def step(backend: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (queries, documents)]
        return list(torch.autograd.grad(contrastive_loss(*leaves, backend=backend), leaves))

    exact = step("reference")
    with torch.autocast("cpu", dtype):
        found = step("triton")
    for value, wanted, zeros in zip(found, exact, (3, 5), strict=True):
        if dtype == torch.float16:
            assert not value[zeros].any()
        else:
            torch.testing.assert_close(value[zeros], wanted[zeros], rtol=0, atol=0.05 * wanted[zeros].norm().item())
        value[zeros] = wanted[zeros] = 0
        assert (value - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()
