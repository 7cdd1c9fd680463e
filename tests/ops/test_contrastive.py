"""contrastive_loss: its values, gradients and errors, whichever backend serves it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from sbert_kernels import contrastive_loss, use_backend
from support.contrastive import ALL_DIRECTIONS


@pytest.fixture(params=["blockwise", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def batch(rows: int, dim: int, columns: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(rows + 31 * dim)
    draw = [torch.randn(rows, dim, dtype=torch.float64, generator=generator) for _ in range(1 + columns)]
    queries, *documents = (x.to(dtype).requires_grad_() for x in draw)
    return queries, documents


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors, retain_graph=True))


def test_value_is_cross_entropy_of_cosines() -> None:
    queries, (documents,) = batch(11, 5)
    logits = 20 * F.normalize(queries) @ F.normalize(documents).T
    expected = F.cross_entropy(logits, torch.arange(11))
    torch.testing.assert_close(contrastive_loss(queries, documents), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"similarity": "dot", "scale": 1.5},
        {"directions": ALL_DIRECTIONS, "hardness_mode": "in_batch_negatives", "hardness_strength": 2.0},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        {"scale": 100.0, "hardness_mode": "all_negatives", "hardness_strength": 2.0},
        {"duplicates": "positive", "document_ids": torch.tensor([1, 2, 1, 3, 2, 2, 9, 9])},
        {"guide_queries": torch.eye(4)[:, :3] + 0.1, "guide_documents": [torch.ones(4, 3), torch.eye(4)[:, :3]]},
        {"matryoshka_dims": [2, 3], "matryoshka_weights": [0.5, -2.0], "directions": ALL_DIRECTIONS},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_gradients_pass_gradcheck(options: dict[str, Any]) -> None:
    """Finite differences of queries, both document columns, scale and weights; stop-gradient penalties left out."""
    queries, documents = batch(4, 3, columns=2)
    options = dict(options)
    scale = torch.tensor(options.pop("scale", 5.0), dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.1], dtype=torch.float64, requires_grad=True)

    def loss(q: Tensor, a: Tensor, b: Tensor, s: Tensor, w: Tensor) -> Tensor:
        return contrastive_loss(q, [a, b], scale=s, weights=w, **options)

    if options.get("hardness_mode") is None:
        assert torch.autograd.gradcheck(loss, (queries, *documents, scale, weights))
    else:
        # The penalty is a constant for the gradient, which finite differences of the loss cannot know: freeze it.
        value = loss(queries, *documents, scale, weights)
        frozen = frozen_penalty_loss(queries, documents, scale, weights, options)
        torch.testing.assert_close(value, frozen)
        for ours, exact in zip(
            gradients(value, queries, *documents, scale), gradients(frozen, queries, *documents, scale), strict=True
        ):
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def frozen_penalty_loss(
    queries: Tensor, documents: list[Tensor], scale: Tensor, weights: Tensor, options: dict[str, Any]
) -> Tensor:
    """The definition with hardness penalties, for two document columns, written out."""
    n = len(queries)
    q, d = F.normalize(queries), F.normalize(torch.cat(documents))
    own, eye = torch.eye(n, dtype=torch.bool).repeat(1, 2), torch.eye(n, dtype=torch.bool)
    to_doc = q @ d.T
    weighted = ~own
    if options["hardness_mode"] == "all_negatives":
        weighted[:, n:] = True
    logits = [scale * to_doc + options["hardness_strength"] * to_doc.detach() * weighted]
    if options.get("directions") == ALL_DIRECTIONS:
        logits.append((scale * q @ q.T).masked_fill(eye, -torch.inf))
        logits.append(scale * d[:n] @ q.T)
        logits.append((scale * d[:n] @ d.T).masked_fill(own, -torch.inf))
    losses = torch.logsumexp(torch.cat(logits, dim=1), dim=1) - logits[0].diagonal()
    return (weights * losses).sum() / weights.sum()


def test_gathered_columns_get_their_own_gradients() -> None:
    """Local rows against world-wide columns: finite differences in queries, all_queries and documents."""
    queries, (documents,) = batch(7, 3)
    local = queries[2:5].detach().clone().requires_grad_()

    def loss(q: Tensor, everyone: Tensor, d: Tensor) -> Tensor:
        return contrastive_loss(q, d, scale=5.0, directions=ALL_DIRECTIONS, all_queries=everyone, row_offset=2)

    assert torch.autograd.gradcheck(loss, (local, queries, documents))


def test_ranks_average_to_the_single_process_loss() -> None:
    queries, documents = batch(8, 4, columns=2)
    whole = contrastive_loss(queries, documents, directions=ALL_DIRECTIONS)
    parts = [
        contrastive_loss(queries[o : o + 4], documents, directions=ALL_DIRECTIONS, all_queries=queries, row_offset=o)
        for o in (0, 4)
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)
    for ours, exact in zip(
        gradients(sum(parts) / 2, queries, *documents), gradients(whole, queries, *documents), strict=True
    ):
        torch.testing.assert_close(ours, exact)


def test_two_backwards_are_equal_and_scale_with_grad_output() -> None:
    queries, (documents,) = batch(6, 4, dtype=torch.float32)
    loss = contrastive_loss(queries, documents)
    (once,) = gradients(loss, queries)
    (again,) = gradients(loss, queries)
    (scaled,) = gradients(loss * 1024, queries)
    assert torch.equal(once, again)
    assert torch.equal(scaled, once * 1024)


def test_the_last_backward_equals_the_ones_before_it() -> None:
    """It may use the memory of what was saved, which no other backward may."""
    queries, documents = batch(6, 4, columns=3, dtype=torch.float32)
    loss = contrastive_loss(queries, documents) * 3
    before = torch.autograd.grad(loss, [queries, *documents], retain_graph=True)
    again = torch.autograd.grad(loss, [queries, *documents], retain_graph=True)
    last = torch.autograd.grad(loss, [queries, *documents])
    assert all(map(torch.equal, before, again))
    assert all(map(torch.equal, before, last))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_accumulate_over_steps_without_touching_each_other() -> None:
    queries, documents = batch(6, 4, columns=2, dtype=torch.float32)
    contrastive_loss(queries, documents).backward()
    once = [x.grad.clone() for x in (queries, *documents)]
    (contrastive_loss(queries, documents) * 2).backward()
    for x, gradient in zip((queries, *documents), once, strict=True):
        torch.testing.assert_close(x.grad, 3 * gradient)


@pytest.mark.parametrize("how", ["backward", "backward to inputs", "grad", "hvp"])
def test_a_second_derivative_raises(how: str) -> None:
    """However it is asked for; it must never look like a zero."""
    queries, (documents,) = batch(6, 4)
    parameter = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(queries * parameter, documents)
    (gradient,) = torch.autograd.grad(loss, queries, create_graph=True)
    penalised = loss + gradient.square().sum()
    ways = {
        "backward": lambda: penalised.backward(),
        "backward to inputs": lambda: penalised.backward(inputs=[parameter]),
        "grad": lambda: torch.autograd.grad(penalised, parameter),
        "hvp": lambda: torch.autograd.functional.hvp(
            lambda q: contrastive_loss(q, documents), queries.detach(), torch.ones_like(queries)
        ),
    }
    with pytest.raises(RuntimeError, match="differentiable once"):
        ways[how]()


def test_a_loss_may_be_changed_in_place() -> None:
    """As gradient accumulation does it, before a backward pass and before a second derivative."""
    queries, (documents,) = batch(6, 4)
    (whole,) = gradients(contrastive_loss(queries, documents), queries)
    loss = contrastive_loss(queries, documents)
    loss /= 4
    (gradient,) = torch.autograd.grad(loss, queries, create_graph=True)
    torch.testing.assert_close(gradient.detach(), whole / 4)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


class Computed(TorchDispatchMode):
    """Lists the operations that compute something, which is a kernel each on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = str(function).removeprefix("aten.").partition(".")[0]
        if name not in ("detach", "new_empty", "empty", "split_with_sizes"):
            self.found.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_is_one_operation_for_queries_and_one_for_documents(dtype: torch.dtype, columns: int) -> None:
    """The product is float32, and rounded once: as where it is written and then rounded, in two operations."""
    queries, documents = batch(6, 4, columns=columns, dtype=dtype)
    loss, factor = contrastive_loss(queries, documents), torch.tensor(0.3)
    inputs = [queries, *documents]
    in_two = torch.autograd.grad(loss, inputs, factor, create_graph=True)
    with Computed() as computed:
        in_one = torch.autograd.grad(loss, inputs, factor)
    assert computed.found == (["mul_", "mul_"] if dtype == torch.float32 else ["mul", "mul"])
    assert all(map(torch.equal, in_one, in_two))


def test_create_graph_alone_changes_nothing() -> None:
    queries, (documents,) = batch(6, 4)
    loss = contrastive_loss(queries, documents)
    (expected,) = gradients(loss, queries)
    (gradient,) = torch.autograd.grad(loss, queries, create_graph=True)
    assert torch.equal(gradient.detach(), expected)


def test_a_forward_mode_derivative_raises() -> None:
    queries, (documents,) = (batch(6, 4)[0].detach(), [batch(6, 4)[1][0].detach()])
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: contrastive_loss(q, documents), (queries,), (torch.ones_like(queries),))


def test_embeddings_are_not_kept_alive() -> None:
    queries, (documents,) = batch(6, 4)
    embeddings = queries * 2
    kept = weakref.ref(embeddings)
    loss = contrastive_loss(embeddings, documents)
    del embeddings
    assert kept() is None
    loss.backward()
    assert queries.grad is not None


def test_a_compiled_caller_gets_the_same_gradients(backend: str) -> None:
    """In one graph, without breaks."""
    queries, (documents,) = batch(8, 4, dtype=torch.float32)
    compiled = torch.compile(lambda q, d: contrastive_loss(q * 2, d), backend="aot_eager", fullgraph=True)
    if backend == "reference":
        with pytest.raises(RuntimeError, match="'reference' differentiates by autograd, which is off"):
            compiled(queries, documents)
        return
    expected = gradients(contrastive_loss(queries * 2, documents), queries, documents)
    torch.testing.assert_close(gradients(compiled(queries, documents), queries, documents), expected)


def test_a_compiled_caller_is_compiled_twice_at_most_whatever_the_number_of_rows(backend: str) -> None:
    """Once for the first batch, once for any number of rows; torch gives up after eight."""
    if backend == "reference":
        pytest.skip("cannot be compiled")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, d: contrastive_loss(q, d), backend=counter, fullgraph=True)
    for rows in range(3, 15):
        queries, documents = (torch.randn(rows, 5, requires_grad=True) for _ in range(2))
        compiled(queries, documents).backward()
        assert queries.grad.shape == (rows, 5)
    assert counter.frame_count <= 2


def test_a_compiled_caller_may_give_a_tensor_two_roles() -> None:
    (queries, _), scale = batch(8, 4, dtype=torch.float32), torch.tensor(5.0, requires_grad=True)

    def loss(x: Tensor, s: Tensor) -> Tensor:
        return contrastive_loss(x, [x, x], scale=s)

    with use_backend("blockwise"):
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        expected = gradients(loss(queries, scale), queries, scale)
        torch.testing.assert_close(gradients(compiled(queries, scale), queries, scale), expected)
        with torch.no_grad():
            scale.fill_(-1.0)
        with pytest.raises(ValueError, match=r"scale must be a positive finite number, got -1\.0"):
            compiled(queries, scale)


def test_only_what_requires_grad_gets_one() -> None:
    queries, documents = batch(6, 4, columns=2)
    documents[0].requires_grad_(False)
    contrastive_loss(queries, documents).backward()
    assert queries.grad is not None
    assert documents[0].grad is None
    assert documents[1].grad is not None
    with torch.no_grad():
        assert not contrastive_loss(queries, documents).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [20.0, 100.0, 1000.0])
def test_error_is_at_most_twice_that_of_eager_torch(dtype: torch.dtype, scale: float) -> None:
    """Against fp64, on the inputs as rounded to the dtype; eager takes cosines as sentence-transformers does."""
    queries, (documents,) = batch(64, 96, dtype=dtype)

    def eager(q: Tensor, d: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = scale * F.normalize(q.to(wide)) @ F.normalize(d.to(wide)).T
        return F.cross_entropy(logits, torch.arange(len(q)))

    exact_inputs = [x.detach().double().requires_grad_() for x in (queries, documents)]
    exact_loss = eager(*exact_inputs)
    exact = [exact_loss.detach(), *gradients(exact_loss, *exact_inputs)]
    theirs, ours = eager(queries, documents), contrastive_loss(queries, documents, scale=scale)
    assert ours.dtype == torch.float32
    for reference, eager_value, value in zip(
        exact,
        [theirs.detach(), *gradients(theirs, queries, documents)],
        [ours.detach(), *gradients(ours, queries, documents)],
        strict=True,
    ):
        size, eps = reference.abs().max(), torch.finfo(value.dtype).eps
        error = (value.double() - reference).abs().max() / size
        eager_error = (eager_value.double() - reference).abs().max() / size
        assert error <= max(2 * eager_error, 2 * eps)


def test_gradient_of_a_well_trained_row_is_exact_in_bfloat16() -> None:
    """At p = 0.999 the gradient is of the size of a bf16 rounding of p; it must still be right within 1%."""
    dim, rows = 64, 32
    documents = torch.eye(rows, dim)
    queries = documents + 0.35 * torch.eye(rows, dim).roll(1, 0)
    queries, documents = (x.bfloat16().requires_grad_() for x in (queries, documents))
    exact = [x.detach().double().requires_grad_() for x in (queries, documents)]
    logits = 12 * F.normalize(exact[0]) @ F.normalize(exact[1]).T
    assert 0.998 < torch.softmax(logits, dim=1).diagonal().mean() < 0.9999
    reference = gradients(F.cross_entropy(logits, torch.arange(rows)), *exact)
    for ours, wanted in zip(
        gradients(contrastive_loss(queries, documents, scale=12.0), queries, documents), reference, strict=True
    ):
        assert (ours.double() - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("poison", [math.nan, math.inf, 0.0])
def test_a_bad_row_contaminates_what_eager_contaminates_and_nothing_else(poison: float) -> None:
    queries, (documents,) = batch(6, 4, dtype=torch.float32)
    with torch.no_grad():
        queries[2] = poison
    eager = F.cross_entropy(20 * F.normalize(queries) @ F.normalize(documents).T, torch.arange(6))
    ours = contrastive_loss(queries, documents)
    for value, expected in zip(gradients(ours, queries, documents), gradients(eager, queries, documents), strict=True):
        torch.testing.assert_close(value, expected, equal_nan=True, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_document_spoils_the_rows_that_eager_spoils(value: float) -> None:
    queries, (documents,) = batch(9, 6, dtype=torch.float32)
    with torch.no_grad():
        documents[2, 1] = value
    logits = queries @ documents.T
    eager = (logits.logsumexp(dim=1) - logits.diagonal()).mean()
    ours = contrastive_loss(queries, documents, similarity="dot", scale=1.0)
    found = gradients(ours, documents)[0].isnan().any(dim=1)
    assert not (found & ~gradients(eager, documents)[0].isnan().any(dim=1)).any()


def test_views_of_any_stride() -> None:
    queries, (documents,) = batch(6, 8)
    expected = contrastive_loss(queries, documents)
    strided = torch.empty(8, 12, dtype=torch.float64).T[::2]
    strided.copy_(queries.detach())
    assert not strided.is_contiguous()
    torch.testing.assert_close(contrastive_loss(strided, documents), expected)
    one = documents[:1].detach()
    torch.testing.assert_close(
        contrastive_loss(queries, one.expand(6, 8), similarity="dot"), torch.tensor(math.log(6), dtype=torch.float64)
    )


def test_a_row_whose_candidates_are_all_masked_has_no_loss_and_no_gradient() -> None:
    queries, (documents,) = batch(5, 4)
    ids = torch.zeros(5, dtype=torch.int64)
    loss = contrastive_loss(queries, documents, duplicates="mask", document_ids=ids)
    assert loss.item() == 0
    for gradient in gradients(loss, queries, documents):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_duplicates_of_the_positive() -> None:
    """keep: a negative; mask: gone; positive: the mean over both, and both stay candidates."""
    queries, (documents,) = batch(4, 5)
    ids = torch.tensor([7, 8, 7, 9])
    logits = 20 * F.normalize(queries) @ F.normalize(documents).T
    twin = torch.tensor([2, 1, 0, 3])
    masked = logits.clone()
    masked[0, 2] = masked[2, 0] = -torch.inf
    rows = torch.arange(4)
    expected = {
        "keep": F.cross_entropy(logits, rows),
        "mask": F.cross_entropy(masked, rows),
        "positive": (torch.logsumexp(logits, 1) - (logits[rows, rows] + logits[rows, twin]) / 2).mean(),
    }
    for duplicates, value in expected.items():
        loss = contrastive_loss(queries, documents, duplicates=duplicates, document_ids=ids)
        torch.testing.assert_close(loss, value)
        torch.testing.assert_close(gradients(loss, queries), gradients(value, queries))


def test_half_and_single_precision_columns_mix() -> None:
    """As the columns of a router under autocast do: each is widened, and gets its gradient in its own dtype."""
    queries, (documents, negatives) = batch(6, 4, columns=2, dtype=torch.float32)
    half = negatives.detach().bfloat16().requires_grad_()
    loss = contrastive_loss(queries, [documents, half])
    wide = half.detach().float().requires_grad_()
    expected = contrastive_loss(queries, [documents, wide])
    assert torch.equal(loss, expected)
    (gradient,), (wanted,) = gradients(loss, half), gradients(expected, wide)
    assert torch.equal(gradient, wanted.bfloat16())


def test_negatives_columns_of_different_lengths() -> None:
    queries, (documents, negatives) = batch(6, 4, columns=2)
    logits = 20 * F.normalize(queries) @ F.normalize(torch.cat([documents, negatives[:2]])).T
    loss = contrastive_loss(queries, [documents, negatives[:2]])
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(6)))
    with pytest.raises(ValueError, match=r"documents have \[6, 2\] rows: 'doc_to_doc'"):
        contrastive_loss(queries, [documents, negatives[:2]], directions=("query_to_doc", "doc_to_doc"))


PREFIXES = [
    {},
    {"similarity": "dot", "scale": 0.7},
    {"directions": ALL_DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 2.0},
    {"duplicates": "mask", "document_ids": torch.arange(14) % 5},
    {"weights": torch.linspace(0.1, 2.0, 7, dtype=torch.float64)},
    {"guide_queries": torch.eye(7), "guide_documents": [torch.eye(7).roll(2, 0), torch.eye(7)], "margin": 0.1},
]


@pytest.mark.parametrize("options", PREFIXES, ids=lambda options: "-".join(options) or "plain")
def test_matryoshka_is_the_weighted_sum_over_prefixes(options: dict[str, Any]) -> None:
    """Of everything, in any order, a repeated width counted twice; the columns beyond the widest have no gradient."""
    queries, documents = batch(7, 9, columns=2)
    dims, weights = [3, 8, 5, 3], [0.5, 1, -2.0, 0.25]
    ours = contrastive_loss(queries, documents, matryoshka_dims=dims, matryoshka_weights=weights, **options)
    parts = [
        weight * contrastive_loss(queries[:, :dim], [column[:, :dim] for column in documents], **options)
        for dim, weight in zip(dims, weights, strict=True)
    ]
    torch.testing.assert_close(ours, sum(parts), rtol=1e-12, atol=1e-12)
    for found, wanted in zip(
        gradients(ours, queries, *documents), gradients(sum(parts), queries, *documents), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        assert not found[:, 8:].any()


def test_matryoshka_weights_are_one_by_default_and_the_whole_width_is_no_prefix() -> None:
    queries, (documents,) = batch(6, 4, dtype=torch.float32)
    whole = contrastive_loss(queries, documents)
    assert torch.equal(contrastive_loss(queries, documents, matryoshka_dims=(4,)), whole)
    both = contrastive_loss(queries, documents, matryoshka_dims=(2, 4))
    torch.testing.assert_close(both - whole, contrastive_loss(queries[:, :2], documents[:, :2]))


def test_matryoshka_sums_the_gradients_of_scale_and_weights() -> None:
    queries, (documents,) = batch(6, 5)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(0.5, 1.5, 6, dtype=torch.float64, requires_grad=True)
    ours = contrastive_loss(queries, documents, scale=scale, weights=weights, matryoshka_dims=(5, 2))
    parts = [contrastive_loss(queries[:, :dim], documents[:, :dim], scale=scale, weights=weights) for dim in (5, 2)]
    torch.testing.assert_close(gradients(ours, scale, weights), gradients(sum(parts), scale, weights))


@pytest.mark.parametrize("poison", [math.nan, math.inf, 0.0])
def test_a_bad_entry_spoils_the_prefixes_that_hold_it(poison: float) -> None:
    """And of those what eager spoils; a slice of zeros gives zero vectors, not NaN."""
    queries, (documents,) = batch(6, 4, dtype=torch.float32)
    with torch.no_grad():
        queries[2, 2:] = poison
        queries[3, :2] = 0.0 if poison == 0 else queries[3, :2]

    def eager(dim: int) -> Tensor:
        return F.cross_entropy(20 * F.normalize(queries[:, :dim]) @ F.normalize(documents[:, :dim]).T, torch.arange(6))

    ours, theirs = contrastive_loss(queries, documents, matryoshka_dims=(2, 4)), eager(2) + eager(4)
    for value, expected in zip(gradients(ours, queries, documents), gradients(theirs, queries, documents), strict=True):
        torch.testing.assert_close(value, expected, equal_nan=True, rtol=1e-4, atol=1e-6)
