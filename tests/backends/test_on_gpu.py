"""The kernels on a GPU, Triton's and the CUDA library's: what neither an interpreter nor a compiler can show.

Skipped where there is no GPU, or a backend does not serve it. Errors are taken against float64 on the same device and
the same rounded inputs, and bounded by those of eager torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import autocast as benchmark
from sbert_kernels import contrastive_loss, pairwise_similarity, ranking_loss, settings
from sbert_kernels.backends import BACKENDS, self_check
from sbert_kernels.machine import matmul_precision
from sbert_kernels.settings import MIB
from support import contrastive
from support.contrastive import ALL_DIRECTIONS
from support.gradients import input_gradients
from support.numbers import relative_errors
from support.problems import loss_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]

DEVICE = "cuda"
ROWS = 1000  # no multiple of any tile
ODD = 123
# A rounding of the softmax weights between the products, in the type and precision that the products have.
UNIT = {
    ("float32", "highest"): 2.0**-24,
    ("float32", "high"): 2.0**-11,
    ("bfloat16", "highest"): 2.0**-9,
    ("float16", "highest"): 2.0**-12,
}
KINDS = [*UNIT]
# What the CUDA library leaves to the Triton kernels.
NOT_BY_CUDA = ("dot", "positive", "guide", "learnable", "matryoshka")


@pytest.fixture(params=["triton by sweep", "triton by weigh", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each GPU backend, with each of its ways of making weights."""
    name, _, way = request.param.partition(" by ")
    skip_unless_served(name)
    with settings.override(weights=way or None):
        yield name


@pytest.fixture
def triton() -> str:
    skip_unless_served("triton")
    return "triton"


def skip_unless_served(name: str) -> None:
    (found,) = (backend for backend in BACKENDS if backend.name == name)
    reason = found.why_not_on(str(torch.empty(0, device=DEVICE).device), True)
    if reason is not None:
        pytest.skip(reason)


def skip_for_cuda(backend: str, unserved: bool) -> None:
    if backend == "cuda" and unserved:
        pytest.skip("the Triton kernels serve this")


# -- problems and what is computed of them ----------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Returns numbers on the GPU that every narrower type holds, too."""
    return contrastive.draw(*shape, seed=seed, device=DEVICE)


def width_for(backend: str) -> int:
    """A width that is no multiple of a tile; the CUDA library serves multiples of 8."""
    return 120 if backend == "cuda" else ODD


def problem_of(option: str, rows: int = ROWS, dim: int = ODD) -> dict[str, Any]:
    """Arguments of contrastive_loss, in float32."""
    gathered = option == "gathered"
    world, offset = (rows + 70, 37) if gathered else (rows, 0)
    columns = 4 if option in ("negatives", "hardness") else 2 if option in ("directions", "mask", "positive") else 1
    documents = [draw(world, dim, seed=1 + k) for k in range(columns)]
    queries = draw(world, dim)
    documents[0] = (queries + 2 * documents[0]).bfloat16().float()  # positives that a model half knows
    ids = torch.arange(world * columns, device=DEVICE) // 3
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "online": {"scale": 100.0},
        "dot": {"similarity": "dot", "scale": 3.0 / dim},
        "negatives": {},
        "directions": {"directions": ALL_DIRECTIONS},
        "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        "hardness": {"hardness_mode": "in_batch_negatives", "hardness_strength": 3.0},
        "mask": {"duplicates": "mask", "document_ids": ids},
        "positive": {"duplicates": "positive", "document_ids": ids},
        "guide": {"guide_queries": draw(rows, 50, seed=8), "guide_documents": draw(rows, 50, seed=9), "margin": 0.1},
        "learnable": {"scale": torch.tensor(20.0, device=DEVICE)},
        "weights": {"weights": draw(rows, seed=7).abs()},
        "matryoshka": {"matryoshka_dims": (dim, dim // 2, dim // 4), "matryoshka_weights": (1.0, 0.5, 2.0)},
        "gathered": {"directions": ALL_DIRECTIONS, "all_queries": queries, "row_offset": offset},
    }
    return {"queries": queries[offset : offset + rows], "documents": documents, **options[option]}


OPTIONS = (
    "plain", "online", "dot", "negatives", "directions", "symmetric", "hardness", "mask", "positive", "guide",
    "learnable", "weights", "matryoshka", "gathered",
)  # fmt: skip


def batch(rows: int, dim: int, scale: float, seed: int, known: float = 0.0) -> dict[str, Any]:
    """Positives whose logits are ``known`` above the logsumexp of the others in their row."""
    queries, noise = draw(rows, dim, seed=2 * seed), draw(rows, dim, seed=2 * seed + 1)
    # logsumexp_j(scale s_ij) of random rows is about log(N) + scale^2 / (2 D), while that is above the largest's.
    others = math.log(rows) / scale + scale / (2 * dim)
    if scale > 20:
        others = min(others, math.sqrt(2 * math.log(rows) / dim))
    cosine = others + known / scale
    documents = (queries + math.sqrt(cosine**-2 - 1) * noise).bfloat16().float()
    return {"queries": queries, "documents": [documents], "scale": scale}


# -- parity -----------------------------------------------------------------------------------------------------------


def check_parity(backend: str, problem: dict[str, Any], dtype_name: str, precision: str) -> None:
    """Twice the error of eager float32 at most, and some roundings of the products' own."""
    exact = loss_and_gradients("reference", problem, torch.float64)
    with matmul_precision(precision):
        ours = loss_and_gradients(backend, problem, getattr(torch, dtype_name))
    theirs = loss_and_gradients("reference", problem, torch.float32)
    limits = 2 * relative_errors(theirs, exact) + 8 * UNIT[dtype_name, precision]
    if dtype_name == "float16" and problem.get("similarity") != "dot":
        limits += 2.0**-11 * problem_scale(problem)  # unit vectors are rounded, and the logits with them
    assert (relative_errors(ours, exact) <= limits).all(), (relative_errors(ours, exact), limits)


def problem_scale(problem: dict[str, Any]) -> float:
    return float(problem.get("scale", 20.0)) + problem.get("hardness_strength", 0.0)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_equals_the_reference(backend: str, option: str) -> None:
    skip_for_cuda(backend, option in NOT_BY_CUDA)
    check_parity(backend, problem_of(option, dim=width_for(backend)), "bfloat16", "highest")


@pytest.mark.parametrize("option", ["plain", "directions", "symmetric", "mask", "positive", "matryoshka"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] != "bfloat16"], ids="-".join)
def test_every_product_equals_the_reference(backend: str, kind: tuple[str, str], option: str) -> None:
    skip_for_cuda(backend, option in NOT_BY_CUDA or kind[0] == "float32")
    check_parity(backend, problem_of(option, dim=width_for(backend)), *kind)


@pytest.mark.parametrize("dim", [1, 16, 384, 768, 1024])
def test_every_dimension_equals_the_reference(backend: str, dim: int) -> None:
    skip_for_cuda(backend, dim % 8 > 0)
    option = "dot" if dim == 1 else "plain"  # the gradient of a cosine of numbers is zero
    check_parity(backend, problem_of(option, dim=dim), "bfloat16", "highest")


@pytest.mark.parametrize("rows", [1, 2, 31, 4096])
def test_every_number_of_rows_equals_the_reference(backend: str, rows: int) -> None:
    option = "negatives" if rows == 1 else "plain"  # or its loss is zero
    check_parity(backend, problem_of(option, rows=rows, dim=64), "bfloat16", "highest")


@pytest.mark.parametrize("layout", ["rows far apart", "shifted", "transposed", "every second entry"])
def test_inputs_in_any_layout(backend: str, layout: str) -> None:
    """Pointers that are not aligned, strides that are no multiple of a line, entries that do not follow each other."""
    skip_for_cuda(backend, layout == "shifted")
    beyond = 8 if backend == "cuda" else 5  # its rows begin at multiples of 16 bytes

    def laid_out(x: Tensor) -> Tensor:
        n, dim = x.shape
        if layout == "transposed":
            return x.T.contiguous().T
        wide = torch.full((n + 3, 2 * dim + beyond), math.nan, dtype=x.dtype, device=x.device)
        view = wide[3:, 1 : 2 * dim : 2] if layout == "every second entry" else wide[3:, 1 : dim + 1]
        if layout == "rows far apart":
            view = wide[:n, :dim]
        return view.copy_(x)

    plain = problem_of("plain", dim=width_for(backend))
    moved = {
        "queries": laid_out(plain["queries"].bfloat16()),
        "documents": [laid_out(plain["documents"][0].bfloat16())],
    }
    assert not moved["queries"].is_contiguous()
    ours = loss_and_gradients(backend, moved, torch.bfloat16)
    assert relative_errors(ours, loss_and_gradients(backend, plain, torch.bfloat16)).max() < 1e-3
    assert relative_errors(ours, loss_and_gradients("reference", plain, torch.float64)).max() < 0.02


@pytest.mark.parametrize("scale", [20.0, 100.0, 1000.0])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_errors_are_at_most_twice_those_of_eager_in_the_same_type(
    backend: str, kind: tuple[str, str], scale: float
) -> None:
    """Root mean squares over batches: one batch of eager's may be lucky."""
    skip_for_cuda(backend, kind[0] == "float32" or scale > 100 or (kind[0] == "float16" and scale > 20))
    dtype, sums = getattr(torch, kind[0]), []
    with matmul_precision(kind[1]):
        for seed in range(4):
            problem = batch(ROWS, 384, scale, seed)
            exact = loss_and_gradients("reference", problem, torch.float64)
            theirs = contrastive.eager(problem["queries"], problem["documents"][0], scale, dtype)
            ours = loss_and_gradients(backend, problem, dtype)
            sums.append(torch.stack([relative_errors(ours, exact), relative_errors(theirs, exact)]).square())
    ours, theirs = torch.stack(sums).mean(0).sqrt()
    assert (ours <= 2 * theirs + torch.finfo(torch.float32).eps).all(), (ours, theirs)


def test_the_gradient_of_a_well_trained_batch_is_right_within_a_percent(backend: str) -> None:
    """p = 0.999 of the positive: the gradient is of the size of a bfloat16 rounding of it."""
    problem = batch(ROWS, 384, 20.0, seed=0, known=math.log(999))
    exact = loss_and_gradients("reference", problem, torch.float64)
    assert 5e-4 < exact[0] < 5e-3
    assert relative_errors(loss_and_gradients(backend, problem, torch.bfloat16), exact).max() < 0.01


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("n", [0, 1, 2, 33, 1000, 8192, 8193, 100_000])
@pytest.mark.parametrize("levels", [3, 1_000_000])
def test_ranking_equals_float64(n: int, levels: int) -> None:
    scores = torch.rand(n, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    labels = torch.randint(levels, (n,), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "blockwise")):
        leaf = scores.to(dtype).requires_grad_()
        loss = ranking_loss(leaf, labels, backend=backend)
        results.append([x.double() for x in (loss.detach(), *torch.autograd.grad(loss, leaf))])
    for value, exact in zip(*results, strict=True):
        assert (value - exact).norm() <= 1e-5 * exact.norm() + 1e-12


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 1000, 100_000])
def test_pairwise_equals_float64(n: int, dtype: torch.dtype) -> None:
    names = ("cos", "dot", "angle")
    x, y = draw(n, ODD), draw(n, ODD, seed=1)
    flowing = [draw(n, seed=2 + k).double() for k in range(3)]
    results = []
    for kind, backend in ((dtype, "triton"), (torch.float64, "blockwise")):
        leaves = [v.to(kind).requires_grad_() for v in (x, y)]
        scores = pairwise_similarity(*leaves, names, backend=backend)
        total = sum((score.double() * weight).sum() for score, weight in zip(scores, flowing, strict=True))
        results.append([v.detach().double() for v in (*scores, *torch.autograd.grad(total, leaves))])
    unit = torch.finfo(dtype).eps
    for index, (value, exact) in enumerate(zip(*results, strict=True)):
        # Scores are float32's; gradients are rounded to the embeddings' type.
        assert (value - exact).norm() <= (1e-5 if index < len(names) else max(1e-5, unit)) * exact.norm() + 1e-12


@pytest.mark.parametrize("kind", self_check.KINDS, ids=str)
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_the_kernels_pass_their_own_check(name: str, kind: self_check.Kind) -> None:
    skip_unless_served(name)
    (found,) = (backend for backend in BACKENDS if backend.name == name)
    _, wrong = self_check._compare(found, kind, torch.empty(0, device=DEVICE).device)
    assert wrong is None


# -- what only a GPU does ---------------------------------------------------------------------------------------------


def step_of(backend: str, name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """One of `STEPS`: a loss, and the tensors that it takes and has gradients of."""
    skip_for_cuda(backend, name in ("options", "ranking"))
    labels = draw(ROWS, seed=5)
    plain = problem_of("positive", dim=width_for(backend))
    ids = plain["document_ids"]
    scale = torch.tensor(20.0, device=DEVICE)

    def in_batch(queries: Tensor, positives: Tensor, negatives: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
        options = {"duplicates": "positive", "document_ids": ids, "backend": backend}
        return contrastive_loss(queries, [positives, negatives], scale=scale, weights=weights, **options)

    def plain_loss(queries: Tensor, documents: Tensor) -> Tensor:
        return contrastive_loss(queries, documents, backend=backend)

    def symmetric(queries: Tensor, documents: Tensor) -> Tensor:
        directions = ("query_to_doc", "doc_to_query")
        options = {"directions": directions, "partition_mode": "per_direction", "backend": backend}
        return contrastive_loss(queries, documents, **options)

    def ranked(x: Tensor, y: Tensor) -> Tensor:
        cos, angle = pairwise_similarity(x, y, ("cos", "angle"), backend=backend)
        return ranking_loss(cos, labels, backend=backend) + ranking_loss(angle, labels, backend=backend)

    queries, (positives, negatives) = plain["queries"].bfloat16(), (d.bfloat16() for d in plain["documents"])
    found: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "plain": (plain_loss, [queries, positives]),
        "symmetric": (symmetric, [queries, positives]),
        "options": (in_batch, [queries, positives, negatives, scale, draw(ROWS, seed=7).abs()]),
        "ranking": (ranked, [queries, positives]),
    }
    return found[name]


STEPS = ("plain", "symmetric", "options", "ranking")


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_the_same_bits_each_time(backend: str, name: str) -> None:
    step = step_of(backend, name)
    first = input_gradients(*step)
    assert all(equal(input_gradients(*step), first) for _ in range(10))


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", STEPS)
def test_nothing_waits_for_the_device(backend: str, name: str) -> None:
    step = step_of(backend, name)
    expected = input_gradients(*step)  # compiled by now
    with no_waiting():
        found = input_gradients(*step)
    assert equal(found, expected)


@pytest.mark.parametrize("name", STEPS)
def test_a_cuda_graph_replays_what_eager_computes(backend: str, name: str) -> None:
    function, inputs = step_of(backend, name)
    static = [x.clone() for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            input_gradients(function, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = input_gradients(function, static)
    others = [(1.25 * x).abs() if x.dim() < 2 else -x.roll(1, 0) for x in inputs]
    for values in (inputs, others):
        for kept, value in zip(static, values, strict=True):
            kept.copy_(value)
        graph.replay()
        assert equal(captured, input_gradients(function, values))
    assert not equal(input_gradients(function, inputs), input_gradients(function, others))


@pytest.mark.parametrize("name", STEPS)
def test_kernels_run_in_the_current_stream(backend: str, name: str) -> None:
    """Where their inputs are made, after a product that takes a while; in any other they would read zeros."""
    function, inputs = step_of(backend, name)
    expected = input_gradients(function, inputs)
    late = [torch.zeros_like(x) for x in inputs]
    busy = torch.randn(8192, 8192, device=DEVICE)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(4):
            busy = busy @ busy / 8192
        for kept, value in zip(late, inputs, strict=True):
            kept.copy_(value)
        found = input_gradients(function, late)
    side.synchronize()
    assert equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", STEPS)
def test_kernels_run_on_the_device_of_their_inputs(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "DEVICE", "cuda:1")
    with torch.cuda.device(1):
        expected = input_gradients(*step_of(backend, name))
    with torch.cuda.device(0):
        found = input_gradients(*step_of(backend, name))
    assert all(x.device == torch.device("cuda:1") for x in found)
    assert equal(found, expected)


@pytest.mark.parametrize("name", STEPS)
def test_a_compiled_step_computes_the_same(backend: str, name: str) -> None:
    function, inputs = step_of(backend, name)
    compiled = torch.compile(function, fullgraph=True)
    # Sums of several losses may be taken in another order by the compiler.
    found, wanted = ([x.double() for x in input_gradients(f, inputs)] for f in (compiled, function))
    assert relative_errors(found, wanted).max() < 1e-5


def test_memory_is_that_of_gradients_and_one_chunk(backend: str) -> None:
    """2 GiB would be one bfloat16 matrix of similarities; eager torch holds several."""
    n, dim = 32768, 768
    inputs = [torch.randn(n, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    function = step_of(backend, "plain")[0]
    input_gradients(function, [x[:512] for x in inputs])  # compiled by now, and the vendor's workspace there
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    input_gradients(function, inputs)
    torch.cuda.synchronize()
    # Both gradients in float32, what a chunk adds to them, both again in bfloat16; a chunk's weights.
    limit = 6 * n * dim * 4 + 512 * MIB
    assert torch.cuda.max_memory_allocated() - before < limit < 2 * n * n


@pytest.mark.parametrize("scale", benchmark.SCALES)
@pytest.mark.parametrize("kind", benchmark.SHARED)
@pytest.mark.parametrize("dtype", benchmark.TYPES.values(), ids=benchmark.TYPES)
def test_errors_under_autocast_are_at_most_twice_those_of_stock_under_it(
    backend: str, dtype: torch.dtype, kind: str, scale: float
) -> None:
    skip_for_cuda(backend, dtype == torch.float16 and scale > 20)
    errors = benchmark.errors_of(dtype, ROWS, kind, scale, repeats=3, backend=backend, device=DEVICE)
    for quantity in ("loss", "dQ", "dD"):
        assert errors[f"ours {quantity}"] <= 2 * errors[f"stock {quantity}"], errors


def test_more_entries_than_a_32_bit_index_counts(backend: str) -> None:
    """65536^2 > 2^31: the first and the last rows of each gradient, against torch ops on blocks of rows."""
    problem = batch(65536, 64, 20.0, seed=0)
    dtype, limit = (torch.bfloat16, 0.02) if backend == "cuda" else (torch.float32, 1e-4)
    ours = loss_and_gradients(backend, problem, dtype)
    exact = loss_and_gradients("blockwise", problem, torch.float32)
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
    for rows in (slice(None, 8), slice(-8, None)):
        parts = [[x[rows] for x in side[1:]] for side in (ours, exact)]
        assert relative_errors(*parts).max() < limit


@pytest.mark.usefixtures("triton")
def test_vectors_beyond_a_32_bit_offset() -> None:
    """Row 2^21 of vectors that are 1024 entries wide begins at entry 2^31."""
    rows, width = 2**21 + 64, 1024
    if torch.cuda.mem_get_info()[0] < 5 * rows * width:
        pytest.skip("needs 10 GiB of free memory")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    x[-64:] = draw(64, width)
    y = torch.ones(1, width, dtype=torch.bfloat16, device=DEVICE).expand(rows, width)
    (scores,) = pairwise_similarity(x, y, ("dot",), backend="triton")
    torch.testing.assert_close(scores[-64:], x[-64:].float().sum(1), rtol=1e-4, atol=1e-3)
    assert not scores[:-64].any()
