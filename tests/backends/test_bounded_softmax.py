"""Bounded logits up to a scale of 100: one shift for all rows, and rows that turn out to need a shift of their own.

A row needs one if all its logits lie far below the bound: its candidates all point away from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sbert_kernels import contrastive_loss, settings
from support.contrastive import eager
from support.contrastive import loss_and_gradients as of_pairs
from support.problems import DIRECTIONS, loss_and_gradients

ROWS, DIM = 40, 32


@pytest.fixture(params=["blockwise", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    if request.param != "triton":
        yield request.param
        return
    request.getfixturevalue("interpreted")
    with settings.override(
        weights="sweep"
    ):  # the way that subtracts one constant; the other one has each row's maximum
        yield "triton"


def vectors(rows: int = ROWS, seed: int = 0) -> Tensor:
    """Returns normal numbers that bfloat16 holds."""
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def pairs(kind: str, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Returns queries and documents whose cosines are near 0, or near 1 for pairs or for all, or all near -0.8."""
    queries, other, one = vectors(rows), vectors(rows, 1), vectors(1, 2)
    documents = {"random": other, "correlated": queries + other}.get(kind, 3 * one + other)
    if kind == "parallel":
        queries = 3 * one + queries
    elif kind == "opposite":
        queries = -3 * one + queries
    elif kind == "some opposite":
        queries = torch.where(torch.arange(rows)[:, None] % 3 == 1, -3 * one, 3 * one) + queries
    return queries.bfloat16().float(), documents.bfloat16().float()


@pytest.mark.parametrize("kind", ["random", "correlated", "parallel", "opposite", "some opposite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_at_most_twice_eagers_at_every_scale(backend: str, kind: str, dtype: torch.dtype) -> None:
    """And a loss that needs no gradient is the same number."""
    queries, documents = (x.to(dtype) for x in pairs(kind))
    # Interpreted, the two that may take the second pass; the others are in the kernels' own tests.
    for scale in (53.5, 100.0) if backend == "triton" else (20.0, 50.0, 53.5, 70.0, 100.0, 101.1, 1000.0):
        exact = of_pairs(queries, documents, "reference", torch.float64, scale=scale)
        ours = of_pairs(queries, documents, backend, scale=scale)
        rounding = 2.0**-24 * scale if dtype == torch.float32 else 2.0**-8
        for value, other, wanted in zip(ours, eager(queries, documents, scale), exact, strict=True):
            # float64, too, has no digits left of a loss below 1e-9 or so.
            limit = 2 * (other - wanted).norm() + rounding * max(wanted.norm().item(), 1e-9)
            assert (value - wanted).norm() <= limit, scale
        alone = contrastive_loss(queries, documents, scale=scale, backend=backend).item()
        # Without weights to write, Triton finds each row's maximum.
        assert alone == (pytest.approx(ours[0].item(), rel=1e-5) if backend == "triton" else ours[0].item())


@pytest.mark.parametrize(
    "options",
    [
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        {"directions": ("query_to_doc", *DIRECTIONS)},
        {"hardness_mode": "all_negatives", "hardness_strength": 7.0, "scale": 93.0},
        {"hardness_mode": "hard_negatives", "hardness_strength": 30.0, "scale": 70.0},
        {"duplicates": "mask", "document_ids": torch.zeros(2 * ROWS, dtype=torch.int64)},  # only the positive is left
        {"duplicates": "positive", "document_ids": torch.arange(2 * ROWS) % 7},
        {"matryoshka_dims": [8, 20, DIM], "matryoshka_weights": [1.0, 0.3, 0.5]},
        {"label_smoothing": 0.1},
        {"scale": torch.tensor(99.0), "weights": torch.arange(ROWS) % 5 + 1.0},
        {"guide_queries": vectors(seed=4), "guide_documents": [vectors(seed=5), vectors(seed=6)]},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("kind", ["opposite", "some opposite"])
def test_every_option_where_rows_need_their_own_shift(backend: str, options: dict[str, Any], kind: str) -> None:
    queries, positives = pairs(kind)
    _, negatives = pairs(kind)
    problem = {
        "queries": queries,
        "documents": [positives, negatives.flip(0)],
        "all_queries": None,
        "weights": None,
        "scale": 100.0,
        **options,
    }
    exact = loss_and_gradients("reference", problem, torch.float64)
    theirs = loss_and_gradients("reference", problem, torch.float32)
    for value, other, wanted in zip(loss_and_gradients(backend, problem, torch.float32), theirs, exact, strict=True):
        # Where all cancels, a rounding of the logits is left.
        assert (value - wanted).norm() <= 2 * (other - wanted).norm() + 2e-5 * max(wanted.norm().item(), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["parallel", "opposite"])
def test_tiny_norms(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Their inverses, up to 1e12, never meet the exponentials, up to exp(60), in one number past float32's range."""
    sizes = torch.tensor([1.0, 1e-6, 1e-10, 1e-30, 0.0]).repeat(ROWS // 5)[:, None]
    queries, documents = ((sizes * x).to(dtype) for x in pairs(kind))
    exact = of_pairs(queries, documents, "reference", torch.float64, scale=100.0)
    ours = of_pairs(queries, documents, backend, scale=100.0)
    theirs = of_pairs(queries, documents, "reference", torch.float32, scale=100.0)
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
    for value, other, wanted in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        for index in range(5):  # gradients of different norms are of different sizes
            size = wanted[index::5].norm()
            limit = 2 * (other - wanted)[index::5].norm() + (2e-5 if dtype == torch.float32 else 2e-2) * size
            assert (value - wanted)[index::5].norm() <= limit, sizes[index]


def test_small_weights_of_rows_with_large_sums(backend: str) -> None:
    """A weight of 1e-12 over a sum of exp(60) is no normal number of float32, and the gradient is one."""
    queries, documents = (20 * vectors(1, 2) + vectors(seed=seed) for seed in (0, 1))
    weights = torch.where(torch.arange(ROWS) % 2 == 0, 1.0, 1e-12)
    problem = {"queries": queries, "documents": [documents], "all_queries": None, "weights": weights, "scale": 100.0}
    exact, theirs, ours = (
        loss_and_gradients(name, problem, dtype)[1][1::2]
        for name, dtype in (("reference", torch.float64), ("reference", torch.float32), (backend, torch.float32))
    )
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_bad_row_among_rows_that_need_their_own_shift(backend: str, bad: float) -> None:
    """It spoils what it spoils in eager torch, and nothing else."""
    for which in (0, 1):
        embeddings = list(pairs("some opposite"))
        embeddings[which][4] = bad
        ours = of_pairs(*embeddings, backend, scale=100.0)
        theirs = eager(*embeddings, 100.0)
        for value, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(value, wanted, equal_nan=True, rtol=1e-3, atol=1e-5)


def test_a_row_does_not_depend_on_whether_others_need_their_own_shift(backend: str) -> None:
    """Not by a bit: the other query's gradient stays, in whichever way the first is computed."""
    queries, documents = pairs("parallel")
    turned = queries.clone()
    turned[0] = -turned[0]
    gradients = [of_pairs(rows, documents, backend, scale=100.0)[1][1:] for rows in (queries, turned)]
    assert torch.equal(*gradients)
