"""What the strategies of the Triton kernels launch, and what the interpreter makes of their numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import aot
from sbert_kernels import contrastive_loss, settings
from sbert_kernels.problems.contrastive import Needs
from support.contrastive import draw, eager, loss_and_gradients
from support.numbers import relative_errors

pytestmark = pytest.mark.usefixtures("interpreted")

NEEDS = Needs(True, True, False, False)
ROWS = 40  # of more than one tile of the interpreter's, and no multiple of it


@pytest.fixture(params=settings.STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    with settings.override(strategy=request.param):
        yield request.param


# -- what is launched -------------------------------------------------------------------------------------------------


def recorded(problem: Any, needs: Needs = NEEDS, target: str = "sm_90") -> tuple[list[Any], int]:
    """The launches for a problem of tensors without values, which nothing can be read from; FLOPs of the vendor's."""
    from sbert_kernels.backends.triton import contrastive, launching

    with (
        launching.recording(launching.Target(*aot.TARGETS[target])) as launches,
        FlopCounterMode(display=False) as vendor,
    ):
        contrastive.contrastive(problem, needs)
    return launches, vendor.get_total_flops()


def sweeps_of(launches: list[Any]) -> list[tuple[dict[str, Any], Any]]:
    """(arguments by name, launch) of those of the kernel with matrix products."""
    return [(launch.arguments, launch) for launch in launches if launch.kernel.__name__ == "sweep"]


def sweep_flops(launches: list[Any]) -> float:
    """Of the similarities once for each slice of a gradient, and of the gradient."""
    total = 0.0
    for arguments, launch in sweeps_of(launches):
        product = 2.0 * arguments["n_a"] * arguments["n_b"] * launch.constants["DIMS"][-1]
        total += product * launch.grid[1] + (product if arguments["gradient"] is not None else 0.0)
    return total


@pytest.mark.parametrize("case", aot.CASES, ids=lambda case: case.name)
def test_no_value_is_read_back(case: aot.Case, strategy: str) -> None:
    """A tensor on "meta" has none to give: shapes alone decide what is launched, as a CUDA graph needs it."""
    problem = aot.problem_of(case, torch.bfloat16, 384, rows=1000)
    launches, _ = recorded(problem, NEEDS if case.gradients else Needs())
    assert sweeps_of(launches)


@pytest.mark.parametrize("dim", [64, 256, 384, 768, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["plain", "online", "negatives", "matryoshka", "no gradient"])
def test_operations_are_those_of_the_cost_model(case: str, dtype: torch.dtype, dim: int, strategy: str) -> None:
    from sbert_kernels.backends.triton.contrastive import cost_model

    (found,) = (c for c in aot.CASES if c.name == case)
    if strategy not in found.strategies:
        pytest.skip("without gradients there is one strategy")
    problem = aot.problem_of(found, dtype, dim, rows=4096)
    launches, vendor_flops = recorded(problem, NEEDS if found.gradients else Needs())
    expected = cost_model.accounting(
        4096,
        4096 * len(problem.documents),
        problem.dims,
        dtype.itemsize,
        strategy,
        bounded=case != "online",
        gradients=found.gradients,
        fma=dtype == torch.float32,
    )
    assert sweep_flops(launches) == expected.sweep_flops
    assert vendor_flops == expected.vendor_flops


def test_bytes_of_the_weights_are_those_of_the_cost_model() -> None:
    """Each weight is written once and read twice; each chunk reads and writes the columns' gradient."""
    from sbert_kernels.backends.triton.contrastive import cost_model

    n = m = 8192
    problem = aot.problem_of(aot.CASES[0], torch.bfloat16, 384, rows=n)
    with settings.override(strategy="chunked", block_bytes=32 * settings.MIB):
        launches, _ = recorded(problem)
    written = [arguments["weights"] for arguments, _ in sweeps_of(launches)]
    assert sum(w.nbytes for w in written) == 2 * n * m
    assert all(w.nbytes <= 32 * settings.MIB for w in written)
    work = [
        cost_model.accounting(n, m, (384,), 2, "chunked", chunk_rows=n // chunks).bytes for chunks in (1, len(written))
    ]
    assert len(written) == 4
    assert work[1] - work[0] == 12 * m * 384 * 3
    assert work[0] > 3 * 2 * n * m


def test_the_strategy_follows_from_the_shape() -> None:
    """Short vectors leave a matrix of weights as the most that there is to move; long ones, products."""
    from sbert_kernels.backends.triton import contrastive, launching
    from sbert_kernels.backends.triton.contrastive import strategy

    def chosen(dim: int, dtype: torch.dtype, target: str) -> str:
        problem = aot.problem_of(aot.CASES[0], dtype, dim, rows=65536)
        with launching.recording(launching.Target(*aot.TARGETS[target])):
            seconds = strategy.predicted_seconds(problem, NEEDS, launching.target_of(problem.device))
            choice = contrastive.choose_strategy(problem, NEEDS)
            assert choice == min(seconds, key=seconds.__getitem__)
            assert contrastive.choose_strategy(problem, Needs()) == "tiled"
            with settings.override(strategy="tiled"):
                assert contrastive.choose_strategy(problem, NEEDS) == "tiled"
            return choice

    assert chosen(32, torch.bfloat16, "sm_89") == "tiled"
    assert chosen(768, torch.bfloat16, "sm_90") == "chunked"
    assert chosen(768, torch.float32, "sm_90") == "chunked"


def test_the_vendor_s_products_are_used_only_in_the_precision_asked_for() -> None:
    from sbert_kernels.backends.triton import contrastive, launching

    problem = aot.problem_of(aot.CASES[0], torch.float32, 768, rows=65536)
    with launching.recording(launching.Target(*aot.TARGETS["sm_90"])):
        for products, expected in (("float32", "chunked"), ("tf32", "tiled"), ("tf32x3", "tiled")):
            with settings.override(matmul=products):
                assert contrastive.choose_strategy(problem, NEEDS) == expected
                assert contrastive.strategies(problem, NEEDS) == ("tiled", "chunked")[: 1 + (expected == "chunked")]


def test_the_strategy_asked_for_says_what_it_does_not_do(caplog: pytest.LogCaptureFixture) -> None:
    from sbert_kernels.backends.triton import contrastive, launching

    problem = aot.problem_of(aot.CASES[0], torch.float32, 64, rows=64)
    with (
        launching.recording(launching.Target(*aot.TARGETS["sm_90"])),
        settings.override(matmul="tf32x3", strategy="chunked"),
    ):
        assert [contrastive.choose_strategy(problem, NEEDS) for _ in range(2)] == ["chunked"] * 2
    assert [record.message for record in caplog.records] == [
        "strategy='chunked' multiplies gradients by torch's products, in float32, not tf32x3."
    ]


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


def test_prefixes_share_one_sweep_unless_their_weights_stay_on_the_chip() -> None:
    (case,) = (c for c in aot.CASES if c.name == "matryoshka")
    problem = aot.problem_of(case, torch.bfloat16, 768)
    with settings.override(strategy="chunked"):
        launches, _ = recorded(problem)
    assert {launch.constants["DIMS"] for _, launch in sweeps_of(launches)} == {problem.dims}
    without, _ = recorded(problem, Needs())
    assert len(sweeps_of(without)) == 1


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

    computed, ran = contrastive._computed, []

    def spy(problem: Any, needs: Needs, strategy: str, variant: int) -> Any:
        ran.append((strategy, variant))
        if variant == 2:
            raise OutOfResources(2, 1, "shared memory")
        return computed(problem, needs, strategy, variant)

    def loss_of(rows: int, **options: Any) -> Tensor:
        queries, documents = draw(rows, 16, seed=0).requires_grad_(), draw(rows, 16, seed=1)
        return contrastive_loss(queries, documents, backend="triton", **options)

    monkeypatch.setattr(contrastive, "_computed", spy)
    monkeypatch.setattr(autotune, "_seconds", lambda run, way, device: {("tiled", 1): 1.0}.get(way, 2.0))
    expected = loss_of(20)
    assert len(ran) == 1  # only those who ask for it wait
    with settings.override(autotune=True):
        assert loss_of(20) == expected
        assert set(ran) == {(strategy, variant) for strategy in settings.STRATEGIES for variant in tiles.VARIANTS}
        assert ran[-1] == ("tiled", 1)
        ran.clear()
        loss_of(21)
        assert ran == [("tiled", 1)]
        loss_of(40)
        loss_of(40, duplicates="mask", document_ids=torch.arange(40))
        assert len(autotune._fastest) == 3
        with settings.override(strategy="chunked"):
            ran.clear()
            loss_of(20)
            assert {strategy for strategy, _ in ran} == {"chunked"}


@pytest.mark.parametrize("variant", [1, 2, 3])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_other_tiles_are_others(target: str, variant: int) -> None:
    from sbert_kernels.backends.triton import launching
    from sbert_kernels.backends.triton.contrastive import precision, tiles

    half = precision.MatmulPrecision("bfloat16", torch.bfloat16, fma=False)
    sizes = {
        "statistics": True,
        "gradient": False,
        "masked": False,
        "guided": False,
        "prefixes": 1,
    }
    where = launching.Target(*aot.TARGETS[target])
    default, other = (tiles.sweep_config(where, half, **sizes, width=16, variant=v) for v in (0, variant))
    assert default != other


# -- numbers ----------------------------------------------------------------------------------------------------------


# Any two of these in one case at least.
TURNS = [
    (settings.STRATEGIES[(i + j) % 2], dtype, scale)
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
    for j, scale in enumerate((20.0, 100.0, 1000.0))
]


@pytest.mark.parametrize(("strategy", "dtype", "scale"), TURNS, indirect=["strategy"])
def test_errors_are_at_most_twice_those_of_eager_in_the_same_type(
    strategy: str, dtype: torch.dtype, scale: float
) -> None:
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


@pytest.mark.usefixtures("strategy")
def test_the_gradient_of_a_well_trained_batch_is_right_within_a_percent() -> None:
    """p = 0.999 of the positive: the gradient is of the size of a bfloat16 rounding of it."""
    queries = draw(64, 64, seed=0)
    documents = (queries + 0.7 * draw(64, 64, seed=1)).bfloat16().float()
    exact = loss_and_gradients(queries, documents, "reference", torch.float64, scale=20.0)
    assert 1e-4 < exact[0] < 5e-3
    ours = loss_and_gradients(queries, documents, "triton", torch.bfloat16, scale=20.0)
    assert relative_errors(ours, exact).max() < 0.01
    assert relative_errors(eager(queries, documents, 20.0, torch.bfloat16), exact).max() > 0.1  # what it is about


@pytest.mark.usefixtures("strategy")
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


@pytest.mark.usefixtures("strategy")
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


@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize("options", [{}, {"scale": 100.0}, {"similarity": "dot", "scale": 1.0}])
def test_a_hard_negative_that_is_no_number_makes_the_loss_none(options: dict[str, Any]) -> None:
    """It lies outside of each row's own pair."""
    queries, documents, negatives = (draw(5, 16, seed=seed).requires_grad_() for seed in range(3))
    with torch.no_grad():
        negatives[2, 3] = math.nan
        assert contrastive_loss(queries, [documents, negatives], backend="triton", **options).isnan()
    assert contrastive_loss(queries, [documents, negatives], backend="triton", **options).isnan()


@pytest.mark.usefixtures("strategy")
def test_a_prefix_of_zeros_has_a_finite_gradient_in_float16() -> None:
    queries, documents = draw(12, 16, seed=0), draw(12, 16, seed=1)
    documents[3, :8] = 0.0
    documents[5] = 0.0
    found = loss_and_gradients(queries, documents, "triton", torch.float16, matryoshka_dims=[8, 16])
    assert all(x.isfinite().all() for x in found)


def test_the_same_bits_each_time(strategy: str) -> None:
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


def test_float64_is_left_to_others() -> None:
    queries = draw(4, 8, seed=0).double()
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call: float64"):
        contrastive_loss(queries, queries, backend="triton")
