"""Backends equal the reference for every option: blockwise in float64, cpu in every product that it has."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sbert_kernels import contrastive_loss
from sbert_kernels import settings as library
from sbert_kernels.backends.cpu import contrastive as cpu
from sbert_kernels.backends.cpu.contrastive import MatmulPrecision
from support.problems import DIRECTIONS, loss_and_gradients, problem_of, problems, scale_of


@pytest.fixture(params=["blockwise", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    return request.param


@pytest.fixture(params=["blockwise", "cpu", "triton"])
def every_backend(request: pytest.FixtureRequest) -> str:
    if request.param != "blockwise":
        request.getfixturevalue({"cpu": "compiled", "triton": "interpreted"}[request.param])
    return request.param


@settings(max_examples=300)
@given(problem=problems(rows=12, width=9), block_rows=st.integers(1, 14))
def test_blockwise_equals_the_reference(problem: dict[str, Any], block_rows: int) -> None:
    row_bytes = 8 * 4 * sum(map(len, problem["documents"]))
    with library.override(block_bytes=block_rows * row_bytes):
        ours = loss_and_gradients("blockwise", problem)
    for value, exact in zip(ours, loss_and_gradients("reference", problem), strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-11)


# A product's rounding of its operands, and of the softmax weights between the products.
UNIT = {MatmulPrecision.FLOAT32: 2.0**-24, MatmulPrecision.BFLOAT16X3: 2.0**-16, MatmulPrecision.BFLOAT16: 2.0**-8}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (MatmulPrecision.FLOAT32, torch.float32),
        (MatmulPrecision.BFLOAT16X3, torch.float32),
        (MatmulPrecision.BFLOAT16, torch.float32),
        (MatmulPrecision.BFLOAT16, torch.bfloat16),
    ],
    ids=["float32", "bfloat16x3", "bfloat16 of float32", "bfloat16"],
)
@settings(max_examples=100, derandomize=True)  # limits on rounding errors have tails
@given(
    # Cosines of few dimensions have gradients that nearly cancel, and roundings that do not.
    problem=st.one_of(
        problems(rows=20, width=24, narrowest_cosine=8), problems(rows=300, width=1100, narrowest_cosine=8)
    ),
    block_bytes=st.sampled_from([1, 10_000, 200_000, 64 * library.MIB]),
)
def test_cpu_equals_the_reference(
    kind: MatmulPrecision, dtype: torch.dtype, problem: dict[str, Any], block_bytes: int
) -> None:
    """Errors of at most twice those of eager float32, and some roundings of the products' own."""
    reason = cpu.why_not_precision(kind)
    if reason is not None:
        pytest.skip(reason)
    with library.override(block_bytes=block_bytes, matmul=kind.name.lower()):
        ours = loss_and_gradients("cpu", problem, dtype)
    # Vectors are made of bfloat16 numbers, which every format holds: only the softmax weights are rounded to one.
    check_errors(ours, problem, UNIT[kind], logits_are_rounded=kind != MatmulPrecision.BFLOAT16)


def check_errors(ours: list[torch.Tensor], problem: dict[str, Any], unit: float, logits_are_rounded: bool) -> None:
    """Errors of at most twice those of eager float32, and some roundings of the products' own."""
    eager = loss_and_gradients("reference", problem, torch.float32)
    exact = loss_and_gradients("reference", problem)
    largest_logit = float(problem["scale"]) + problem["hardness_strength"]
    if problem["similarity"] == "dot":
        largest_logit *= math.sqrt(problem["queries"].shape[1]) * 4
    largest_logit = max(1.0, largest_logit) if logits_are_rounded else 1.0
    total = sum(map(abs, problem.get("matryoshka_weights", [1.0])))
    for value, other, wanted in zip(ours, eager, exact, strict=True):
        # Of a gradient that nearly cancels, what cancelled sets the rounding: it is of the size of the loss.
        size = max(wanted.norm().item(), 1e-2 * total)
        limit = 2 * (other - wanted).norm().item() + 8 * unit * largest_logit * size
        assert (value - wanted).norm().item() <= limit


# Type of the embeddings, type that float32 is multiplied in, and a rounding of the products' operands in it.
TRITON_KINDS = {
    "float32": (torch.float32, "float32", 2.0**-24),
    "bfloat16 of float32": (torch.float32, "bfloat16", 2.0**-8),
    "bfloat16": (torch.bfloat16, None, 2.0**-8),
    "float16": (torch.float16, None, 2.0**-11),
}


def check_triton(problem: dict[str, Any], kind: str, way: str) -> None:
    dtype, products, unit = TRITON_KINDS[kind]
    with library.override(weights=way, matmul=products):
        ours = loss_and_gradients("triton", problem, dtype)
    # Unit vectors are rounded to float16.
    check_errors(ours, problem, unit, logits_are_rounded=kind in ("float32", "float16"))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", TRITON_KINDS)
@settings(max_examples=4, derandomize=True)  # limits on rounding errors have tails
@given(problem=problems(rows=40, width=40, narrowest_cosine=8), way=st.sampled_from(library.WEIGHTS))
def test_triton_equals_the_reference(kind: str, problem: dict[str, Any], way: str) -> None:
    check_triton(problem, kind, way)


MATRIX = {
    "similarity": ("cos", "dot"),
    "directions": (("query_to_doc",), ("query_to_doc", *DIRECTIONS), ("query_to_doc", "doc_to_query")),
    "hardness_mode": (None, "in_batch_negatives", "hard_negatives", "all_negatives"),
    "duplicates": ("keep", "mask", "positive"),
    "guided": (False, True),
    "matryoshka_dims": (None, (33, 16, 9)),
    "logit": (19.9, 97.0),  # with hardness, on both sides of where one constant serves all rows
}


@pytest.mark.interpreter_matrix
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("index", "choice"),
    list(enumerate(itertools.product(*MATRIX.values()))),
    ids=lambda value: "" if isinstance(value, int) else "-".join(map(str, value)),
)
def test_every_combination_of_triton_s_options(index: int, choice: tuple[Any, ...]) -> None:
    """All of them; the two ways, number formats, learnable scales, row weights and gathered batches take turns."""
    options = dict(zip(MATRIX, choice, strict=True))
    way, dim = library.WEIGHTS[index.bit_count() % 2], 33  # any two values of options meet in both
    options["scale"] = scale_of(options.pop("logit"), options["similarity"], dim, index // 2 % 7 < 2)
    if options["matryoshka_dims"] is None:
        del options["matryoshka_dims"]
    else:
        options["matryoshka_weights"] = (1.0, 0.3, -2.0)
    gathered = index // 2 % 3 == 0
    problem = problem_of(
        37,
        dim,
        3,
        index,
        offset=5 if gathered else 0,
        beyond=6 if gathered else 0,
        gathered=gathered,
        weighted=index // 2 % 5 == 0,
        partition_mode="per_direction" if len(options["directions"]) == 2 else "joint",
        hardness_strength=0.0 if options["hardness_mode"] is None else 3.0,
        **options,
    )
    check_triton(problem, list(TRITON_KINDS)[index // 2 % len(TRITON_KINDS)], way)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("options", [{}, {"directions": ("query_to_doc", *DIRECTIONS)}, {"similarity": "dot"}])
def test_every_prefix_at_once_equals_the_reference(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    problem = {
        "queries": torch.randn(9, 40, dtype=torch.float64),
        "documents": [torch.randn(9, 40, dtype=torch.float64) for _ in range(2)],
        "all_queries": None,
        "scale": torch.tensor(20.0, dtype=torch.float64),
        "weights": None,
        "matryoshka_dims": range(1, 41),
        **options,
    }
    exact = loss_and_gradients("reference", problem)
    for value, wanted in zip(loss_and_gradients("blockwise", problem), exact, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11 * wanted.abs().max().item())
    eager = loss_and_gradients("reference", problem, torch.float32)
    for value, other, wanted in zip(loss_and_gradients("cpu", problem, torch.float32), eager, exact, strict=True):
        assert (value - wanted).norm() <= 2 * (other - wanted).norm() + 2.0**-22 * wanted.norm()


def test_prefixes_of_very_different_norms_keep_their_digits(every_backend: str) -> None:
    """Twice eager's error at most: an accumulator may carry one prefix's gradient in units of another's norms."""
    torch.manual_seed(0)
    sizes = torch.cat([torch.full((8,), 1e-3), torch.full((24,), 1e3)])
    problem = {
        "queries": torch.randn(50, 32) * sizes,
        "documents": [torch.randn(50, 32) * sizes],
        "all_queries": None,
        "scale": 20.0,
        "weights": None,
        "matryoshka_dims": [8, 16, 32],
    }
    ours, eager, exact = (
        loss_and_gradients(name, problem, dtype)[1:]
        for name, dtype in ((every_backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    )
    for tensors in zip(ours, eager, exact, strict=True):
        for value, other, wanted in zip(*(tensor.split(8, dim=1) for tensor in tensors), strict=True):
            assert (value - wanted).norm() <= 2 * (other - wanted).norm()


def test_is_deterministic(backend: str) -> None:
    torch.manual_seed(0)
    problem = {
        "queries": torch.randn(600, 48),
        "documents": [torch.randn(600, 48)],
        "all_queries": None,
        "scale": torch.tensor(20.0),
        "weights": torch.rand(600),
        "directions": ("query_to_doc", *DIRECTIONS),
    }
    first = loss_and_gradients(backend, problem)
    for _ in range(20):
        assert all(map(torch.equal, first, loss_and_gradients(backend, problem)))


def test_more_entries_than_a_32_bit_index_counts(backend: str) -> None:
    """46400^2 > 2^31: the last row, which the weights single out, against its own logsumexp."""
    n = 46_400
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(n, 2, generator=generator) for _ in range(2))
    weights = torch.zeros(n)
    weights[-1] = 1.0
    loss = contrastive_loss(queries, documents, similarity="dot", scale=1.0, weights=weights, backend=backend)
    logits = documents.double() @ queries[-1].double()
    expected = torch.logsumexp(logits, 0) - logits[-1]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("scale", [30.0, 80.0])
def test_tiny_losses_keep_their_digits(every_backend: str, scale: float) -> None:
    """loss = log(1 + x) and gradient = -x / (1 + x) for x = exp(-scale): eager fp32 gives 0 for both."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = contrastive_loss(queries, queries.detach().clone(), scale=scale, backend=every_backend)
    (gradient,) = torch.autograd.grad(loss, queries)
    assert loss.item() == pytest.approx(math.exp(-scale), rel=1e-4)
    assert gradient[0, 1].item() == pytest.approx(scale / 2 * math.exp(-scale), rel=1e-4)


def test_an_infinite_logit_leaves_the_finite_ones_of_its_row_a_gradient(every_backend: str) -> None:
    """Their share is zero, and what they pull is pulled by nothing: not by 0 x inf."""
    torch.manual_seed(0)
    queries, documents = torch.rand(6, 4, requires_grad=True), torch.rand(6, 4) + 30.0
    documents[5, 0] = math.inf
    documents.requires_grad_()
    loss = contrastive_loss(queries, documents, scale=5.0, similarity="dot", backend=every_backend)
    (ours,) = torch.autograd.grad(loss, documents)
    logits = 5.0 * queries @ documents.T
    (exact,) = torch.autograd.grad((torch.logsumexp(logits, 1) - logits.diagonal()).mean(), documents)
    assert exact[:5].isfinite().all()
    torch.testing.assert_close(ours[:5], exact[:5])


def test_a_guided_row_below_eps(every_backend: str) -> None:
    """Guided, the least norm is that of torch's CosineSimilarity, 1e-8: a norm of 1e-10 is divided by it."""
    torch.manual_seed(0)
    queries, documents, guide = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 3)
    queries[2] *= 1e-10
    options = {"guide_queries": guide, "guide_documents": guide, "margin": -2.0}  # excludes nothing
    loss = contrastive_loss(queries, documents, backend=every_backend, **options)
    logits = 20 * F.normalize(queries, eps=1e-8) @ F.normalize(documents).T
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(6)), rtol=1e-5, atol=0)


def test_texts_that_are_all_equal_exclude_none(every_backend: str) -> None:
    """Copies of the positive tie with it in the guide's eyes, in whichever tile they lie."""
    n = 300
    generator = torch.Generator().manual_seed(0)
    queries, guide_queries = (torch.randn(n, 24, generator=generator) for _ in range(2))
    text, guide_text = (torch.randn(1, 24, generator=generator).expand(n, 24) for _ in range(2))
    loss = contrastive_loss(
        queries, text, guide_queries=guide_queries, guide_documents=guide_text, backend=every_backend
    )
    assert loss.item() == pytest.approx(math.log(n), rel=1e-6)
