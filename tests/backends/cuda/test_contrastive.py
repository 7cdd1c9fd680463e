"""What the CUDA backend makes of the contrastive operation: numbers, launches, plans, and what it declines."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sbert_kernels import contrastive_loss, settings
from sbert_kernels.backends.triton.targets import Target
from sbert_kernels.problems.contrastive import ContrastiveProblem, ContrastiveSpec, Needs, Term
from sbert_kernels.problems.scale import Scale
from support.contrastive import ALL_DIRECTIONS, draw
from support.contrastive import loss_and_gradients as of_pairs
from support.problems import loss_and_gradients, problem_of

pytestmark = pytest.mark.usefixtures("emulated")

ROWS, DIM = 136, 64  # of more than one tile of 128, and no multiple of it
FEW = 40
H100 = Target("cuda", 90)
NEEDS = Needs(True, True)
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Of a gradient, by type: some roundings of weights to it, which are 2^-9 and 2^-12 at most. Of a loss, which has none
# of these; but float16 rounds vectors of unit length.
LIMITS = {torch.bfloat16: (8e-3, 1e-6), torch.float16: (1e-3, 1e-4)}


def problem(columns: int = 1, **options: Any) -> dict[str, Any]:
    """Returns arguments of contrastive_loss, of vectors that every type holds."""
    given = {"offset": 0, "beyond": 0, "guided": False, "gathered": False, "weighted": False, "scale": 20.0} | options
    return problem_of(ROWS, DIM, columns, 0, **given)


def check(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    """Fails unless loss and gradients are right to the roundings of the weights."""
    limit, of_loss = LIMITS[dtype]
    ours = loss_and_gradients("cuda", arguments, dtype)
    exact = loss_and_gradients("reference", arguments)
    for index, (value, wanted) in enumerate(zip(ours, exact, strict=True)):
        assert (value - wanted).norm() <= (limit if index else of_loss) * wanted.norm(), index


# -- numbers ----------------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": problem(),
    "hard negatives, weights": problem(3, weighted=True),
    "in-batch negatives are hard": problem(2, hardness_mode="in_batch_negatives", hardness_strength=3.0),
    "hard negatives are": problem(3, hardness_mode="hard_negatives", hardness_strength=3.0),
    "all are": problem(2, hardness_mode="all_negatives", hardness_strength=3.0),
    "ids": problem(2, duplicates="mask"),
    "gathered columns": problem(2, gathered=True, offset=9, beyond=5, duplicates="mask", **SYMMETRIC),
    "four directions": problem(2, directions=ALL_DIRECTIONS, duplicates="mask", weighted=True),
    "label smoothing": problem(2, label_smoothing=0.2),
    "one prefix": problem(matryoshka_dims=[40], matryoshka_weights=[-2.0]),
    "symmetric": problem(**SYMMETRIC),
    "symmetric, hard negatives, weights": problem(2, weighted=True, **SYMMETRIC),
    "symmetric, ids": problem(duplicates="mask", **SYMMETRIC),  # each direction by itself
}


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    check(OPTIONS[name], dtype)


def turned(kind: str) -> list[Tensor]:
    """Returns queries and documents whose cosines are all near -0.8, or only those of every third query."""
    queries, documents, one = draw(FEW, DIM, seed=0), draw(FEW, DIM, seed=1), 3 * draw(1, DIM, seed=2)
    away = torch.arange(FEW)[:, None] % 3 == 1 if kind == "some" else torch.tensor(True)
    return [(torch.where(away, -one, one) + queries).bfloat16().float(), (one + documents).bfloat16().float()]


@pytest.mark.parametrize("kind", ["all", "some"])
@pytest.mark.parametrize("options", [{}, SYMMETRIC, {"directions": ("query_to_doc", "query_to_query")}], ids=str)
def test_rows_whose_sums_vanish_beside_the_constant_are_done_again(kind: str, options: dict[str, Any]) -> None:
    queries, documents = turned(kind)
    exact = of_pairs(queries, documents, "reference", torch.float64, scale=100.0, **options)
    ours = of_pairs(queries, documents, "cuda", torch.bfloat16, scale=100.0, **options)
    for index, (value, wanted) in enumerate(zip(ours, exact, strict=True)):
        assert (value - wanted).norm() <= (8e-3 if index else 1e-6) * wanted.norm()
    alone = contrastive_loss(queries.bfloat16(), documents.bfloat16(), scale=100.0, backend="cuda", **options)
    assert alone.item() == pytest.approx(exact[0].item(), rel=1e-6)


@pytest.mark.parametrize("scale", [0.5, 53.0, 90.0])
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_every_scale(scale: float, dtype: torch.dtype) -> None:
    """In a batch whose positives stand out, as far as its scale needs."""
    if dtype == torch.float16 and scale > 53:
        pytest.skip("Triton serves it")
    queries = draw(ROWS, DIM, seed=0)
    documents = (queries + 2 * draw(ROWS, DIM, seed=1)).bfloat16().float()
    limit, of_loss = LIMITS[dtype]
    for options in ({}, SYMMETRIC):
        exact = of_pairs(queries, documents, "reference", torch.float64, scale=scale, **options)
        ours = of_pairs(queries, documents, "cuda", dtype, scale=scale, **options)
        for index, (value, wanted) in enumerate(zip(ours, exact, strict=True)):
            assert (value - wanted).norm() <= (limit if index else of_loss) * wanted.norm(), options


@pytest.mark.parametrize("options", [{}, SYMMETRIC], ids=["one direction", "symmetric"])
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_chunks_of_rows_add_up(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Three chunks of weights, the last of which is short; their products are written, not added, where they can be."""
    from sbert_kernels.backends.cuda import contrastive
    from sbert_kernels.backends.cuda.contrastive.planner import TwoSidedPlan

    rows = 270
    queries, documents = draw(rows, DIM, seed=0), draw(rows, DIM, seed=1)
    with settings.override(block_bytes=2 * 288 * 128):
        ours = of_pairs(queries, documents, "cuda", dtype, **options)
    (program,) = contrastive._programs.values()
    plan = program.call.plan
    assert [(chunk.begin, chunk.end) for chunk in plan.softmaxes[0].chunks] == [(0, 128), (128, 256), (256, 270)]
    assert isinstance(plan, TwoSidedPlan) == bool(options)
    assert plan.queries.rows_alone
    assert [chunk.overwrites for chunk in plan.softmaxes[0].chunks] == [(True,), (False,), (False,)]
    exact = of_pairs(queries, documents, "reference", torch.float64, **options)
    for index, (value, wanted) in enumerate(zip(ours, exact, strict=True)):
        assert (value - wanted).norm() <= LIMITS[dtype][0 if index else 1] * wanted.norm()


def test_sums_of_a_symmetric_loss_come_in_chunks_too() -> None:
    """Of 128 rows at least, where the weights are those of five."""
    from sbert_kernels.backends.cuda import contrastive

    with settings.override(block_bytes=5 * 2 * 288):
        check(OPTIONS["symmetric, hard negatives, weights"], torch.bfloat16)
    (program,) = contrastive._programs.values()
    assert [(chunk.begin, chunk.end) for chunk in program.call.plan.sums] == [(0, 128), (128, ROWS)]


@pytest.mark.parametrize("options", [{}, SYMMETRIC], ids=["one direction", "symmetric"])
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_rows_that_are_zero_or_no_numbers_stay_alone(options: dict[str, Any], dtype: torch.dtype) -> None:
    """What a row spoils is what it spoils in the reference."""
    queries, documents = draw(FEW, DIM, seed=0), draw(FEW, DIM, seed=1)
    queries[3], documents[7] = 0.0, 0.0
    ours, exact = (
        of_pairs(queries, documents, *how, **options) for how in (("cuda", dtype), ("reference", torch.float64))
    )
    limit, of_loss = LIMITS[dtype]
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=of_loss)
    for value, wanted, zero in zip(ours[1:], exact[1:], (3, 7), strict=True):
        if dtype == torch.float16:  # which cannot hold what lies over a norm of zero
            wanted[zero] = 0.0
        others = torch.arange(FEW) != zero
        for rows in (others, ~others):
            assert (value - wanted)[rows].norm() <= limit * wanted[rows].norm()
    queries[5] = math.nan
    ours, exact = (
        of_pairs(queries, documents, *how, **options) for how in (("cuda", dtype), ("reference", torch.float64))
    )
    for value, wanted in zip(ours, exact, strict=True):
        assert torch.equal(value.isnan(), wanted.isnan())


@pytest.mark.parametrize("options", [{}, SYMMETRIC], ids=["one direction", "symmetric"])
def test_small_weights_and_tiny_norms_leave_no_range(options: dict[str, Any]) -> None:
    """Factors of 1e-12 and 1e12, beside sums of exp(53), of which none is a number without the others."""
    queries, documents = (20 * draw(1, DIM, seed=2) + draw(ROWS, DIM, seed=seed) for seed in (0, 1))
    sizes = torch.tensor([1.0, 1e-6, 1e-12, 1e-30]).repeat(ROWS // 4)
    weights = torch.where(torch.arange(ROWS) % 8 < 4, 1.0, 1e-12)
    queries, documents = ((sizes[:, None] * x).bfloat16() for x in (queries, documents))
    options = {"scale": 53.0, "weights": weights, **options}
    exact = of_pairs(queries, documents, "reference", torch.float64, **options)
    theirs = of_pairs(queries, documents, "reference", torch.float32, **options)
    ours = of_pairs(queries, documents, "cuda", **options)
    for value, other, wanted in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        for index in range(8):
            size = wanted[index::8].norm()
            assert (value - wanted)[index::8].norm() <= 2 * (other - wanted)[index::8].norm() + 2e-2 * size, index


def test_products_of_float32_embeddings_may_be_those_of_half_precision() -> None:
    """Under autocast, and where SBERT_KERNELS_MATMUL asks for them."""
    queries, documents = draw(FEW, DIM, seed=0), draw(FEW, DIM, seed=1)
    exact = of_pairs(queries, documents, "reference", torch.float64)
    for dtype in HALF.values():
        with torch.autocast("cpu", dtype):
            ours = of_pairs(queries, documents, "cuda")
        for index, (value, wanted) in enumerate(zip(ours, exact, strict=True)):
            assert (value - wanted).norm() <= LIMITS[dtype][0 if index else 1] * wanted.norm()
    with settings.override(matmul="bfloat16"):
        ours = of_pairs(queries, documents, "cuda")
    assert all((x - y).norm() <= 8e-3 * y.norm() for x, y in zip(ours, exact, strict=True))


@pytest.mark.parametrize("needs", [("queries",), ("documents",)])
@pytest.mark.parametrize("options", [{}, SYMMETRIC], ids=["one direction", "symmetric"])
def test_gradients_of_one_side_alone(needs: tuple[str, ...], options: dict[str, Any]) -> None:
    given = {"queries": draw(FEW, DIM, seed=0).bfloat16(), "documents": draw(FEW, DIM, seed=1).bfloat16()}
    both = of_pairs(given["queries"], given["documents"], "cuda", **options)
    (name,) = needs
    given[name].requires_grad_()
    loss = contrastive_loss(given["queries"], given["documents"], backend="cuda", **options)
    (gradient,) = torch.autograd.grad(loss, given[name])
    assert torch.equal(gradient.double(), both[1 if name == "queries" else 2])


# -- what is declined -------------------------------------------------------------------------------------------------

DECLINED = {
    "a guide": (problem(guided=True), "guide_queries are given"),
    "dot products": (problem(similarity="dot", scale=0.5), "similarity='dot'"),
    "a learned scale": (problem(scale=torch.tensor(20.0)), "scale is a tensor"),
    "a large scale": (problem(scale=102.0), "logits above 101"),
    "large with hardness": (problem(scale=60.0, hardness_mode="all_negatives", hardness_strength=42.0), "above 101"),
    "several prefixes": (problem(matryoshka_dims=[32, 64]), "matryoshka_dims"),
    "several positives": (problem(duplicates="positive"), "duplicates='positive'"),
    "an odd prefix": (problem(matryoshka_dims=[60]), "width of the embeddings is no multiple of 8"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_the_kernels_cannot_do_is_declined_by_its_name(name: str) -> None:
    arguments, reason = DECLINED[name]
    with pytest.raises(ValueError, match=f"backend='cuda' cannot serve this call: .*{reason}"):
        loss_and_gradients("cuda", arguments, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [
        (torch.float64, {}, "float64 is computed in torch ops"),
        (torch.float32, {}, "the products are those of float32"),
        (torch.float16, {"scale": 54.0}, "float16 products with logits above 53"),
    ],
)
def test_other_products_are_declined(dtype: torch.dtype, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        of_pairs(draw(4, DIM, seed=0), draw(4, DIM, seed=1), "cuda", dtype, **options)


def test_a_way_that_only_triton_has_is_declined() -> None:
    with settings.override(weights="weigh"), pytest.raises(ValueError, match="SBERT_KERNELS_WEIGHTS='weigh'"):
        of_pairs(draw(4, DIM, seed=0), draw(4, DIM, seed=1), "cuda", torch.bfloat16)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Returns the same numbers in another layout."""
    width = {"rows far apart": 8, "rows unaligned": 4}.get(layout, 0) + DIM
    shift = 1 if layout == "shifted" else 0
    if layout == "repeated":
        return x[:1].expand(x.shape)
    if layout == "transposed":
        return x.T.contiguous().T
    memory = torch.full((len(x) * width + shift,), math.nan, dtype=x.dtype)
    return memory[shift:].view(len(x), width)[:, :DIM].copy_(x)


@pytest.mark.parametrize(
    ("layout", "served"),
    [
        ("rows far apart", True),
        ("transposed", True),
        ("rows unaligned", False),
        ("shifted", False),
        ("repeated", False),
    ],
)
def test_layouts_that_tiles_cannot_be_copied_from_are_declined(layout: str, served: bool) -> None:
    """They are read where they are, but for what is converted, or concatenated with hard negatives."""
    plain = [draw(FEW, DIM, seed=seed).bfloat16() for seed in (0, 1)]
    moved = [laid_out(x, layout) for x in plain]
    if layout == "repeated":
        plain = [x.contiguous() for x in moved]
    if served:
        assert all(map(torch.equal, of_pairs(*plain, "cuda"), of_pairs(*moved, "cuda")))
    for pair in (moved, (plain[0], moved[1])):
        if not served:
            with pytest.raises(ValueError, match="rows of the embeddings do not begin at multiples of 16 bytes"):
                of_pairs(*pair, "cuda")
    half = [x.half() for x in plain]
    assert all(map(torch.equal, of_pairs(*half, "cuda"), of_pairs(*(laid_out(x, layout) for x in half), "cuda")))
    losses = [contrastive_loss(plain[0], list(documents), backend="cuda") for documents in (plain, moved)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("strides", [(70, 1), (8, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_single_row_may_say_that_rows_are_any_distance_apart(strides: tuple[int, int], dtype: torch.dtype) -> None:
    """torch keeps such a stride where it converts; float32 is converted under autocast."""
    row, rows = draw(1, DIM, seed=0).to(dtype), draw(FEW, DIM, seed=1).to(dtype)
    odd = torch.empty_strided((1, DIM), strides, dtype=dtype).copy_(row)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        found = [contrastive_loss(queries, rows, backend="cuda") for queries in (row, odd)]
        found += [contrastive_loss(row, documents, backend="cuda") for documents in (row, odd)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])


def test_every_part_of_a_rule_is_served_or_declined() -> None:
    """A new one would be ignored: serve or decline it in `backends/cuda/contrastive`, then add it here."""
    known = {"rows_are_queries", "columns_are_queries", "columns", "softmax", "own_column", "positive", "excluded"}
    known |= {"duplicates", "guided", "hardness", "hard_everywhere", "hardness_exceptions"}
    assert {field.name for field in fields(Term)} == known
    options = {"similarity", "directions", "partition_mode", "hardness_mode", "hardness_strength", "label_smoothing"}
    options |= {"duplicates", "margin_strategy", "margin", "dims", "dim_weights", "autocast"}
    assert {field.name for field in fields(ContrastiveSpec)} == options


# -- what is launched -------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations of torch's matrix products, and lists the calls of the library's operator."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.calls = 0.0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.flops += 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
        elif name == "contrastive_weights":
            policy = "known" if args[12] is not None else "sums" if args[14] is None else "rows"
            self.calls.append((policy, len(args[0]), len(args[1])))
            self.flops_of_calls = 2.0 * args[0].shape[1] * sum(m * n for _, m, n in self.calls)
        return func(*args, **(kwargs or {}))


def without_memory(dtype: torch.dtype, rows: int, columns: int = 1, **options: Any) -> ContrastiveProblem:
    """Returns a problem whose tensors have shapes and no memory."""

    def meta(n: int) -> Tensor:
        return torch.empty(n, 256, dtype=dtype, device="meta")

    scale = Scale(options.pop("scale", 20.0))
    return ContrastiveProblem(meta(rows), (meta(rows),) * columns, scale, spec=ContrastiveSpec(**options))


@pytest.mark.parametrize(
    ("name", "dtype", "columns", "options", "needs", "calls"),
    [
        ("plain", torch.bfloat16, 2, {}, NEEDS, ["rows"]),
        ("fp16", torch.float16, 1, {}, NEEDS, ["sums", "known"]),
        ("no gradients", torch.bfloat16, 1, {"scale": 100.0}, Needs(), ["sums"]),
        ("symmetric", torch.bfloat16, 2, SYMMETRIC, NEEDS, ["sums", "known"]),
        ("symmetric, fp16", torch.float16, 1, SYMMETRIC, NEEDS, ["sums", "known"]),
        ("no gradients, symmetric", torch.bfloat16, 1, SYMMETRIC, Needs(), ["sums", "sums"]),
        ("symmetric, large scale", torch.bfloat16, 1, {**SYMMETRIC, "scale": 90.0}, NEEDS, ["rows", "rows"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_passes_and_products_are_those_of_the_cost_model(
    name: str, dtype: torch.dtype, columns: int, options: dict[str, Any], needs: Needs, calls: list[str]
) -> None:
    """Of the one matrix that a symmetric loss has, or of each direction's; nothing is read back."""
    from sbert_kernels.backends.cuda import contrastive
    from sbert_kernels.backends.triton import launching
    from sbert_kernels.backends.triton.contrastive.cost_model import accounting

    n, m = 1000, 1000 * columns
    with launching.recording(H100) as launches, Operations() as found:
        contrastive.contrastive(without_memory(dtype, n, columns, **options), needs)
    assert found.calls == [(policy, n, m) for policy in calls]
    matrices = len(calls) if "sums" not in calls else 1 if needs.vectors else len(calls)
    passes = len(calls) // matrices
    work = accounting(n, m, (256,), 2, "sweep", passes=passes, gradients=needs.vectors)
    assert (found.flops_of_calls, found.flops) == (matrices * work.sweep_flops, matrices * work.product_flops)
    kernels = [launch.kernel.__name__ for launch in launches]
    assert not {"sweep", "weigh", "matrix_product"} & set(kernels)
    assert ("redo" in kernels) == (options.get("scale", 20.0) > 53)


def test_launches_of_a_plain_loss_are_few() -> None:
    from sbert_kernels.backends.cuda import contrastive
    from sbert_kernels.backends.triton import launching

    with launching.recording(H100) as launches:
        contrastive.contrastive(without_memory(torch.bfloat16, 1000), NEEDS)
    assert [launch.kernel.__name__ for launch in launches] == [
        "norms_forward", "softmax_statistics", "scale_rows", "norms_backward", "norms_backward",
    ]  # fmt: skip


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SYMMETRIC], ids=["one direction", "symmetric"])
def test_a_plan_is_made_once_and_apart_from_tritons(options: dict[str, Any]) -> None:
    from sbert_kernels.backends.cuda import contrastive
    from sbert_kernels.backends.cuda.contrastive.planner import make_plan
    from sbert_kernels.backends.triton import contrastive as triton
    from sbert_kernels.backends.triton import launching

    triton._programs.clear()
    for scale in (20.0, 20.0, 30.0):
        with launching.recording(H100):
            for backend in (contrastive, triton):
                backend.contrastive(without_memory(torch.bfloat16, 1000, scale=scale, **options), NEEDS)
    assert [len(backend._programs) for backend in (contrastive, triton)] == [1, 1]
    (program,) = contrastive._programs.values()
    again = make_plan(without_memory(torch.bfloat16, 1000, **options), NEEDS, H100)
    assert program.call.plan == again
    assert hash(program.call.plan) == hash(again)


@pytest.mark.parametrize("rows", [65536, 262144])
@pytest.mark.parametrize("options", [{}, SYMMETRIC], ids=["one direction", "symmetric"])
def test_memory_beside_the_weights_is_little(rows: int, options: dict[str, Any]) -> None:
    """Chunks as large as Triton's; what the sums of a symmetric loss take lies where its weights come to lie."""
    from sbert_kernels.backends.cuda.contrastive.planner import make_plan

    plan = make_plan(without_memory(torch.bfloat16, rows, **options), NEEDS, H100)
    weights = 4096 * 2 * rows
    assert weights < plan.workspace_bytes < 1.05 * weights
    everything = [*plan.buffers, *(b for chunk in plan.softmaxes[0].chunks for b in chunk.buffers)]
    if options:
        everything += [b for chunk in plan.sums for b in chunk.buffers]
        assert [(chunk.begin, chunk.end) for chunk in plan.sums] == [
            (begin, min(begin + 131072, rows)) for begin in range(0, rows, 131072)
        ]
    ends = [(b.offset + 1 + sum((n - 1) * s for n, s in zip(b.shape, b.strides, strict=True))) for b in everything]
    assert max(end * b.dtype.itemsize for end, b in zip(ends, everything, strict=True)) <= plan.workspace_bytes


def test_a_loss_without_gradients_takes_little_memory() -> None:
    from sbert_kernels.backends.cuda.contrastive.planner import make_plan

    for rows, most in ((65536, 140), (262144, 520)):
        plan = make_plan(without_memory(torch.bfloat16, rows), Needs(), H100)
        assert plan.workspace_bytes < most * settings.MIB
