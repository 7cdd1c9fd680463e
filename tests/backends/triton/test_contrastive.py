"""What the Triton kernels of the contrastive operation launch, and what the interpreter makes of their numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import aot
from sbert_kernels import contrastive_loss, settings
from sbert_kernels.problems.contrastive import Needs
from sbert_kernels.values import float32_matmul_precision
from support.contrastive import draw, eager, loss_and_gradients
from support.numbers import relative_errors

pytestmark = pytest.mark.usefixtures("interpreted")

NEEDS = Needs(True, True, False, False)
ROWS = 40  # of more than one tile of the interpreter's, and no multiple of it


@pytest.fixture(params=settings.WEIGHTS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with settings.override(weights=request.param):
        yield request.param


# -- what is launched -------------------------------------------------------------------------------------------------


class ProductFlops(TorchDispatchMode):
    """Counts the operations of torch's matrix products: torch's own counter fails at those with an output type."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.total += 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
        return out


def recorded(problem: Any, needs: Needs = NEEDS, target: str = "sm_90") -> tuple[list[Any], float]:
    """The launches for a problem of tensors without values, which nothing can be read from; FLOPs of the vendor's."""
    from sbert_kernels.backends.triton import contrastive, launching

    with (
        launching.recording(launching.Target(*aot.TARGETS[target])) as launches,
        ProductFlops() as vendor,
    ):
        contrastive.contrastive(problem, needs)
    return launches, vendor.total


def named(launches: list[Any], name: str) -> list[Any]:
    return [launch for launch in launches if launch.kernel.__name__ == name]


@pytest.mark.parametrize("case", aot.CASES, ids=lambda case: case.name)
def test_no_value_is_read_back(case: aot.Case, way: str) -> None:
    """A tensor on "meta" has none to give: shapes alone decide what is launched, as a CUDA graph needs it."""
    problem = aot.problem_of(case, torch.bfloat16, 384, rows=1000)
    launches, _ = recorded(problem, NEEDS if case.gradients else Needs())
    assert named(launches, "weigh" if case.name == "guide" else way)
    assert max(len(launch.kernel.arg_names) for launch in launches) <= 25


# What each case takes: passes, and whether rows may be done again.
PASSES = {
    ("plain", "sweep"): (1, 0),
    ("done again", "sweep"): (1, 1),
    ("online", "sweep"): (2, 0),
    ("matryoshka", "sweep"): (2, 0),
    ("positive", "sweep"): (2, 0),
    ("no gradient", "sweep"): (1, 0),
    ("plain", "weigh"): (1, 0),
    ("done again", "weigh"): (1, 0),
    ("online", "weigh"): (1, 0),
    ("matryoshka", "weigh"): (2, 0),
    ("positive", "weigh"): (2, 0),
    ("guide", "weigh"): (1, 0),
    ("no gradient", "weigh"): (1, 0),
}


@pytest.mark.parametrize("name", [name for name, _ in PASSES], ids=lambda name: name)
def test_operations_are_those_of_the_cost_model(name: str, way: str) -> None:
    from sbert_kernels.backends.triton.contrastive import cost_model

    (case,) = (c for c in aot.CASES if c.name == name)
    if (name, way) not in PASSES:
        pytest.skip("a guide goes one way only")
    passes, redone = PASSES[name, way]
    n = 4096
    problem = aot.problem_of(case, torch.bfloat16, 384, rows=n)
    launches, vendor_flops = recorded(problem, NEEDS if case.gradients else Needs())
    expected = cost_model.accounting(
        n, n * len(problem.documents), problem.dims, 2, way, passes=passes, gradients=case.gradients
    )
    assert len(named(launches, way)) == passes
    assert len(named(launches, "redo")) == redone
    swept = [launch.arguments for launch in named(launches, "sweep")]
    assert sum(2.0 * a["n_rows"] * a["n_columns"] * a["width"] for a in swept) == expected.sweep_flops
    guide = 0 if problem.guide_queries is None else 2.0 * n * n * problem.guide_queries.shape[1]
    assert vendor_flops == expected.vendor_flops + guide


def test_launches_of_a_plain_loss_are_few(way: str) -> None:
    """Those of Triton, and torch's: two products with the weights, the dot products, and the mean of the losses."""
    launches, _ = recorded(aot.problem_of(aot.CASES[0], torch.bfloat16, 768, rows=1024))
    assert [launch.kernel.__name__ for launch in launches] == [
        "norms_forward", way, "softmax_statistics", "scale_rows", "norms_backward", "norms_backward",
    ]  # fmt: skip


def test_bytes_of_the_weights_are_those_of_the_cost_model() -> None:
    """Each weight is written once and read twice; each chunk reads and writes the columns' gradient."""
    from sbert_kernels.backends.triton.contrastive import cost_model

    n = m = 8192
    problem = aot.problem_of(aot.CASES[0], torch.bfloat16, 384, rows=n)
    with settings.override(weights="sweep", block_bytes=32 * settings.MIB):
        launches, _ = recorded(problem)
    written = [launch.arguments["weights"] for launch in named(launches, "sweep")]
    assert sum(w.nbytes for w in written) == 2 * n * m
    assert all(w.nbytes <= 32 * settings.MIB for w in written)
    work = [
        cost_model.accounting(n, m, (384,), 2, "sweep", chunk_rows=n // chunks).bytes for chunks in (1, len(written))
    ]
    assert len(written) == 4
    assert work[1] - work[0] == 8 * m * 384 * 3
    assert work[0] > 3 * 2 * n * m


def test_the_way_follows_from_rates_and_rules() -> None:
    """Triton's products without tensor cores are a quarter of the vendor's; slow memory is no place for logits."""
    from sbert_kernels.backends.triton import launching
    from sbert_kernels.backends.triton.contrastive.planner import make_plan

    def chosen(case: str, dtype: torch.dtype, target: str, way: str | None = None) -> str:
        (found,) = (c for c in aot.CASES if c.name == case)
        problem = aot.problem_of(found, dtype, 768, rows=65536)
        with settings.override(weights=way):
            return make_plan(problem, NEEDS, launching.Target(*aot.TARGETS[target])).way

    half = torch.bfloat16
    assert chosen("plain", half, "sm_90") == "sweep"
    assert chosen("plain", half, "sm_89") == "sweep"
    assert chosen("plain", torch.float32, "sm_90") == "weigh"
    assert chosen("guide", half, "sm_89") == "weigh"
    assert chosen("online", half, "sm_90") == "weigh"  # one product where a sweep takes two
    assert chosen("plain", half, "sm_90", "weigh") == "weigh"
    assert chosen("plain", torch.float32, "sm_90", "sweep") == "sweep"


def test_a_sweep_that_is_asked_for_with_a_guide_says_what_is_done_instead(caplog: pytest.LogCaptureFixture) -> None:
    (case,) = (c for c in aot.CASES if c.name == "guide")
    with settings.override(weights="sweep"):
        for rows in (64, 65):
            assert named(recorded(aot.problem_of(case, torch.bfloat16, 64, rows=rows))[0], "weigh")
    assert [record.message for record in caplog.records] == [
        "SBERT_KERNELS_WEIGHTS='sweep' takes no guide, so that 'weigh' takes its place."
    ]


def test_a_kernel_multiplies_where_torch_does_not_as_asked() -> None:
    """The vendor's products of float32 follow torch's precision, and those of half precision on ROCm round sums."""

    def by_kernel(dtype: torch.dtype, target: str, matmul: str | None = None, torchs: str = "highest") -> int:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(torchs)
        try:
            with settings.override(matmul=matmul, weights="weigh"):
                launches, _ = recorded(aot.problem_of(aot.CASES[0], dtype, 768, rows=256), target=target)
        finally:
            torch.set_float32_matmul_precision(before)
        return len(named(launches, "matrix_product"))

    full, half = torch.float32, torch.bfloat16
    assert [by_kernel(full, "sm_90"), by_kernel(full, "sm_90", "tf32"), by_kernel(full, "sm_90", "tf32x3")] == [0, 3, 3]
    assert [by_kernel(full, "sm_90", torchs="high"), by_kernel(full, "sm_90", "float32", "high")] == [0, 3]
    assert [by_kernel(half, "sm_90"), by_kernel(half, "gfx942"), by_kernel(half, "sm_75")] == [0, 3, 0]
    assert by_kernel(full, "sm_75", torchs="high") == 0  # which has no tf32 to multiply in


def test_products_that_a_gpu_lacks_are_replaced_with_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    from sbert_kernels.backends.triton import launching
    from sbert_kernels.backends.triton.contrastive import precision

    found = {}
    for name in ("sm_75", "gfx942", "sm_90"):
        for products in ("tf32", "bfloat16"):
            with settings.override(matmul=products):
                target = launching.Target(*aot.TARGETS[name])
                found[name, products] = [precision.choose_precision({torch.float32}, target).name for _ in range(2)]
    lacking = {("sm_75", "tf32"): "float32", ("sm_75", "bfloat16"): "float32", ("gfx942", "tf32"): "bfloat16x3"}
    assert found == {key: [lacking.get(key, key[1])] * 2 for key in found}
    assert [record.message for record in caplog.records] == [
        f"SBERT_KERNELS_MATMUL={products!r}: this GPU has no such products, so that {taken} takes its place."
        for (_, products), taken in lacking.items()
    ]


def test_prefixes_share_one_product() -> None:
    (case,) = (c for c in aot.CASES if c.name == "matryoshka")
    problem = aot.problem_of(case, torch.bfloat16, 768)
    with settings.override(weights="sweep"):
        launches, _ = recorded(problem)
        without, _ = recorded(problem, Needs())
    assert {launch.constants["DIMS"] for launch in named(launches, "sweep")} == {problem.dims}
    assert len(named(without, "sweep")) == 1


@pytest.fixture
def forgotten(interpreted: None) -> Iterator[None]:
    from sbert_kernels.backends.triton import autotune

    autotune._fastest.clear()
    yield
    autotune._fastest.clear()


@pytest.mark.usefixtures("forgotten")
def test_autotuning_runs_each_way_once_for_each_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from sbert_kernels.backends.triton import autotune, contrastive
    from sbert_kernels.backends.triton.contrastive import tiles

    make_program, ran = contrastive._program, []

    def spy(problem: Any, needs: Needs, key: Any, way: str | None, variant: int) -> Any:
        ran.append((way, variant))
        if variant == 2:
            raise OutOfResources(2, 1, "shared memory")
        return make_program(problem, needs, key, way, variant)

    def loss_of(rows: int, **options: Any) -> Tensor:
        queries, documents = draw(rows, 16, seed=0).requires_grad_(), draw(rows, 16, seed=1)
        return contrastive_loss(queries, documents, backend="triton", **options)

    monkeypatch.setattr(contrastive, "_program", spy)
    monkeypatch.setattr(autotune, "_seconds", lambda run, way, device: {("weigh", 1): 1.0}.get(way, 2.0))
    expected = loss_of(20)
    assert len(ran) == 1  # only those who ask for it wait
    with settings.override(autotune=True):
        torch.testing.assert_close(loss_of(20), expected)
        assert set(ran) == {(None, 0)} | {(way, variant) for way in settings.WEIGHTS for variant in tiles.VARIANTS}
        assert ran[-1] == ("weigh", 1)
        ran.clear()
        loss_of(21)
        assert ran == [("weigh", 1)]
        loss_of(40)
        loss_of(40, duplicates="mask", document_ids=torch.arange(40))
        assert len(autotune._fastest) == 3
        with settings.override(weights="sweep"):
            ran.clear()
            loss_of(20)
            assert {way for way, _ in ran} == {"sweep"}


@pytest.mark.parametrize("variant", [1, 2, 3])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_other_tiles_are_others(target: str, variant: int) -> None:
    from sbert_kernels.backends.triton import launching
    from sbert_kernels.backends.triton.contrastive import precision, tiles

    half = precision.MatmulPrecision("bfloat16", torch.bfloat16, fma=False)
    where = launching.Target(*aot.TARGETS[target])
    sizes: dict[str, Any] = {"masked": False, "prefixes": 1}
    default, other = (tiles.sweep_config(where, half, **sizes, variant=v) for v in (0, variant))
    assert default != other
    assert tiles.weigh_config(where, 4096, 1, False) != tiles.weigh_config(where, 4096, 1, False, variant)


# -- numbers ----------------------------------------------------------------------------------------------------------


# Any two of these in one case at least.
TURNS = [
    (settings.WEIGHTS[(i + j) % 2], dtype, scale)
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
    for j, scale in enumerate((20.0, 50.0, 100.0, 1000.0))
]


@pytest.mark.parametrize(("way", "dtype", "scale"), TURNS, indirect=["way"])
def test_errors_are_at_most_twice_those_of_eager_in_the_same_type(way: str, dtype: torch.dtype, scale: float) -> None:
    """Root mean squares over batches: one batch of eager's may be lucky."""
    squares = []
    for seed in range(3):
        queries = draw(ROWS, 48, seed=2 * seed)
        # Logits of positives within a few of the others' logsumexp: neither sure nor hopeless.
        cosine = min(0.9, math.log(ROWS) / scale + 0.3)
        documents = (queries + math.sqrt(cosine**-2 - 1) * draw(ROWS, 48, seed=2 * seed + 1)).bfloat16().float()
        exact = loss_and_gradients(queries, documents, "reference", torch.float64, scale=scale)
        ours = loss_and_gradients(queries, documents, "triton", dtype, scale=scale)
        theirs = eager(queries, documents, scale, dtype)
        squares.append(torch.stack([relative_errors(ours, exact), relative_errors(theirs, exact)]) ** 2)
    ours, theirs = torch.stack(squares).mean(0).sqrt()
    assert (ours <= 2 * theirs + torch.finfo(torch.float32).eps).all(), (ours, theirs)


@pytest.mark.usefixtures("way")
def test_the_gradient_of_a_well_trained_batch_is_right_within_a_percent() -> None:
    """p = 0.999 of the positive: the gradient is of the size of a bfloat16 rounding of it."""
    queries = draw(64, 64, seed=0)
    documents = (queries + 0.7 * draw(64, 64, seed=1)).bfloat16().float()
    exact = loss_and_gradients(queries, documents, "reference", torch.float64, scale=20.0)
    assert 1e-4 < exact[0] < 5e-3
    ours = loss_and_gradients(queries, documents, "triton", torch.bfloat16, scale=20.0)
    assert relative_errors(ours, exact).max() < 0.01
    assert relative_errors(eager(queries, documents, 20.0, torch.bfloat16), exact).max() > 0.1  # what it is about


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", ["rows far apart", "shifted", "transposed", "every second entry", "repeated"])
def test_inputs_in_any_layout(layout: str) -> None:
    n, dim = 40, 35

    def laid_out(x: Tensor) -> Tensor:
        if layout == "transposed":
            return x.T.contiguous().T
        if layout == "repeated":
            return x[:1].expand(n, dim)
        wide = torch.full((n + 3, 2 * dim + 5), math.nan)
        view = wide[3:, 1 : 2 * dim : 2] if layout == "every second entry" else wide[3:, 1 : dim + 1]
        if layout == "rows far apart":
            view = wide[:n, :dim]
        return view.copy_(x)

    queries, documents = draw(n, dim, seed=0), draw(n, dim, seed=1)
    moved = [laid_out(queries), documents if layout == "repeated" else laid_out(documents)]
    assert not moved[0].is_contiguous()
    ours = [contrastive_loss(*moved, backend="triton"), *loss_and_gradients(*moved, "triton", torch.float32)[1:]]
    exact = loss_and_gradients(*(x.contiguous() for x in moved), "reference", torch.float64)
    for value, wanted in zip(ours, exact, strict=True):
        assert (value - wanted).norm() <= 1e-5 * max(wanted.norm(), 1e-2)


@pytest.mark.usefixtures("way")
def test_rows_that_are_zero_or_no_numbers_stay_alone() -> None:
    """What a row spoils is what it spoils in the reference: its column reaches every row's gradient, and no more."""
    queries, documents = draw(40, 32, seed=0), draw(40, 32, seed=1)
    queries[3], documents[7] = 0.0, 0.0
    ways = (("triton", torch.float32), ("reference", torch.float64))
    ours, exact = (loss_and_gradients(queries, documents, *how) for how in ways)
    for value, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())
    queries[5] = math.nan
    ours, exact = (loss_and_gradients(queries, documents, *how) for how in ways)
    for value, wanted in zip(ours, exact, strict=True):
        assert torch.equal(value.isnan(), wanted.isnan())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("options", [{}, {"scale": 100.0}, {"similarity": "dot", "scale": 1.0}])
def test_a_hard_negative_that_is_no_number_makes_the_loss_none(options: dict[str, Any]) -> None:
    """It lies outside of each row's own pair."""
    queries, documents, negatives = (draw(5, 16, seed=seed).requires_grad_() for seed in range(3))
    with torch.no_grad():
        negatives[2, 3] = math.nan
        assert contrastive_loss(queries, [documents, negatives], backend="triton", **options).isnan()
    assert contrastive_loss(queries, [documents, negatives], backend="triton", **options).isnan()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("partition_mode", ["joint", "per_direction"])
def test_prefixes_of_queries_from_several_ranks(partition_mode: str) -> None:
    """Similarities of the positives are kept for the queries of all ranks, prefix by prefix."""
    n, offset = 4, 4
    documents, everyone = draw(8, 16, seed=0), draw(8, 16, seed=1)
    options = {
        "all_queries": everyone,
        "row_offset": offset,
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": partition_mode,
        "matryoshka_dims": [8, 16],
    }
    ours = loss_and_gradients(everyone[offset : offset + n], documents, "triton", torch.float32, **options)
    exact = loss_and_gradients(everyone[offset : offset + n], documents, "reference", torch.float32, **options)
    assert relative_errors(ours, exact).max() < 1e-5


@pytest.mark.usefixtures("way")
def test_long_vectors_of_float16_stay_finite() -> None:
    """An entry of 20, times a factor that keeps digits of small sums, is none of float16's numbers."""
    queries, documents = draw(64, 48, seed=0), draw(64, 48, seed=1)
    queries[:, 3], documents[5, 3] = 20.0, 3.0
    options = {"similarity": "dot", "scale": 0.3}
    exact = loss_and_gradients(queries, documents, "reference", torch.float64, **options)
    ours = loss_and_gradients(queries, documents, "triton", torch.float16, **options)
    assert relative_errors(ours, exact).max() < 2e-3


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("duplicates", ["mask", "positive"])
def test_ids_that_lie_apart(duplicates: str) -> None:
    queries, documents, ids = draw(40, 16, seed=0), draw(40, 16, seed=1), torch.arange(80) % 13
    found = [
        loss_and_gradients(queries, documents, "triton", duplicates=duplicates, document_ids=x)
        for x in (ids[::2], ids[::2].contiguous())
    ]
    assert all(map(torch.equal, *found))


@pytest.mark.usefixtures("way")
def test_a_prefix_of_zeros_has_a_finite_gradient_in_float16() -> None:
    queries, documents = draw(12, 16, seed=0), draw(12, 16, seed=1)
    documents[3, :8] = 0.0
    documents[5] = 0.0
    found = loss_and_gradients(queries, documents, "triton", torch.float16, matryoshka_dims=[8, 16])
    assert all(x.isfinite().all() for x in found)


def test_the_same_bits_each_time(way: str) -> None:
    queries, documents = draw(70, 40, seed=0), draw(70, 40, seed=1)
    first = loss_and_gradients(queries, documents, "triton", torch.bfloat16)
    assert all(map(torch.equal, first, loss_and_gradients(queries, documents, "triton", torch.bfloat16)))


def test_rows_beyond_a_32_bit_offset() -> None:
    """Row 3 begins at entry 3 * 2^30 of memory of which four rows are ever touched."""
    rows, dim, stride = 4, 40, 2**30
    far = torch.empty(3 * stride + dim, dtype=torch.bfloat16).as_strided((rows, dim), (stride, 1))
    queries, documents = draw(rows, dim, seed=0).bfloat16(), draw(rows, dim, seed=1).bfloat16()
    far.copy_(queries)
    near = loss_and_gradients(queries, documents, "triton", torch.bfloat16)
    assert all(map(torch.equal, near, run_in_place(far, documents)))


def run_in_place(queries: Tensor, documents: Tensor) -> list[Tensor]:
    from sbert_kernels.backends.triton import contrastive

    problem = aot.problem_of(aot.CASES[0], torch.bfloat16, queries.shape[1], rows=len(queries))
    problem = replace(problem, queries=queries, documents=(documents,))
    result = contrastive.contrastive(problem, NEEDS)
    return [x.double() for x in (result.loss, result.queries.bfloat16(), result.documents.bfloat16())]


@pytest.mark.parametrize("name", ["cuda.matmul", "mkldnn.matmul"])
def test_the_newer_names_of_torchs_precision_are_read(name: str) -> None:
    """After which the former one raises an error."""
    backend = torch.backends.cuda if name.startswith("cuda") else torch.backends.mkldnn
    if not hasattr(backend.matmul, "fp32_precision"):
        pytest.skip("this torch has the former name only")
    queries, documents = draw(8, 16, seed=0), draw(8, 16, seed=1)
    expected = {kind: loss_and_gradients(queries, documents, kind) for kind in ("triton", "cpu")}
    backend.matmul.fp32_precision = "tf32"
    try:
        assert float32_matmul_precision(name.partition(".")[0].replace("mkldnn", "cpu")) == "high"
        for kind, wanted in expected.items():
            assert relative_errors(loss_and_gradients(queries, documents, kind), wanted).max() < 1e-3
    finally:
        backend.matmul.fp32_precision = "none"


def test_float64_is_left_to_others() -> None:
    queries = draw(4, 8, seed=0).double()
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call: float64"):
        contrastive_loss(queries, queries, backend="triton")
