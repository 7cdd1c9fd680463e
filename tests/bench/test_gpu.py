"""The benchmark on one GPU, without one: what it runs in its time, how it judges, that contenders do the same work."""

from __future__ import annotations

import argparse
import json
import math
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbert_kernels import machine
from sbert_kernels.bench import contrastive, gpu, gpu_peers
from sbert_kernels.bench.cases import gpu as gpu_cases
from sbert_kernels.bench.cases import ranking
from sbert_kernels.bench.gpu_jobs import Budget, Job, Pace, in_batch, plan
from sbert_kernels.bench.peers import largest_error
from sbert_kernels.machine import Timing
from sbert_kernels.workloads.recipes import OURS, STOCK


class Clock:
    """A time that stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> gpu.Bench:
    """On the CPU, with whichever backend serves it in the place of the Triton kernels."""
    monkeypatch.setattr(gpu, "chosen_strategy", lambda case: "tiled")
    return gpu.Bench("cpu", 2, Budget(300.0), backend=None, reports=gpu.new_reports())


# -- the jobs ---------------------------------------------------------------------------------------------------------


def test_parity_comes_first_and_then_the_size_that_the_goals_name() -> None:
    jobs = plan()
    kinds = [job.kind for job in jobs]
    first = kinds.index("contrastive")
    assert set(kinds[:first]) == {"parity"}
    assert "parity" not in kinds[first:]
    assert jobs[first].name == "N=65536 D=768 bfloat16"
    names = [(job.kind, job.name) for job in jobs]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("dim", [384, 768, 1024])
@pytest.mark.parametrize("rows", [4096, 16384, 65536, 262144])
def test_every_size_is_timed_in_every_product_that_ends_in_time(rows: int, dim: int) -> None:
    cases = [job.case for job in plan() if job.kind == "contrastive" and (job.case.batch, job.case.dim) == (rows, dim)]
    kinds = {(case.dtype, case.precision) for case in cases}
    assert kinds >= {("bfloat16", "highest"), ("float32", "high")}
    assert (("float32", "highest") in kinds) == (rows <= 16384)


def test_a_quick_run_is_a_part_of_the_whole() -> None:
    assert {job.name for job in plan(quick=True)} < {job.name for job in plan()}


def test_calls_are_foreseen_from_other_sizes_of_their_kind() -> None:
    pace = Pace()
    pace.note("eager", in_batch(1000, 768), 0.5)
    assert pace.seconds("eager", in_batch(4000, 768)) == pytest.approx(8.0)
    assert pace.seconds("eager", in_batch(4000, 384)) == 0
    assert pace.seconds("tiled", in_batch(4000, 768)) == 0


def test_jobs_that_there_is_no_time_for_are_listed(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    bench.budget = Budget(40.0, clock)

    def twelve_seconds(_: gpu.Bench, job: Job) -> dict[str, Any]:
        clock.now += 12.0
        return job.columns

    monkeypatch.setitem(gpu._RUNNERS, "contrastive", twelve_seconds)
    bench.run([Job("contrastive", in_batch(rows, 8)) for rows in (16, 32, 64)])
    assert [row["N"] for row in bench.reports["contrastive"].rows] == [16, 32]
    assert bench.not_run == ["contrastive: N=64 D=8 bfloat16"]
    assert bench.failed == []


def test_a_job_that_breaks_is_a_row_and_a_failure(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: gpu.Bench, job: Job) -> dict[str, Any]:
        raise RuntimeError("an illegal memory access\nand much more")

    monkeypatch.setitem(gpu._RUNNERS, "contrastive", broken)
    bench.run([Job("contrastive", in_batch(262144, 768))])
    (row,) = bench.reports["contrastive"].rows
    assert row["ours ms"] == row["note"] == "RuntimeError: an illegal memory access"
    assert bench.failed == ["contrastive: N=262144 D=768 bfloat16: RuntimeError: an illegal memory access"]


# -- times ------------------------------------------------------------------------------------------------------------


def test_what_breaks_one_contender_is_no_matter_to_the_others() -> None:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken() -> Callable[[], object]:
        raise AssertionError("Backwards requires embeddings to be bf16 or fp16")

    makes = {
        "ours": lambda: lambda: None,
        "broken": broken,
        "large": lambda: out_of_memory,
        "absent": "not installed",
        "slow": lambda: lambda: None,
    }
    expected = {"slow": 20.0}
    timings = gpu.timed(makes, 3, Budget(30.0, Clock()), lambda name: expected.get(name, 0.0))
    assert len(timings["ours"].samples) == 3
    assert timings["ours"].error is None
    assert {name: timing.error for name, timing in timings.items() if not timing.samples} == {
        "broken": "AssertionError: Backwards requires embeddings to be bf16 or fp16",
        "large": "out of memory",
        "absent": "not installed",
        "slow": "not run: some 20.0 s a call",
    }


def test_long_calls_have_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LONG_SECONDS", 0.0)
    assert len(gpu.timed({"ours": lambda: lambda: None}, 9, Budget(9.0))["ours"].samples) == gpu.LONG_ROUNDS


def test_eager_needs_room_for_its_matrix() -> None:
    case = in_batch(262144, 768)
    assert gpu.too_large(case, 80 * 2**30) == "needs 128 GiB"
    assert gpu.too_large(case, 141 * 2**30) is None
    assert gpu.too_large(replace(case, dtype="float32"), 141 * 2**30) == "needs 256 GiB"


def test_contenders_without_room_are_not_tried(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "free_bytes", lambda: 2 * 32 * 32 - 1)
    found = gpu.contenders(bench, Job("contrastive", in_batch(32, 8)))
    assert found["eager"] == found["compiled"] == "needs 1.91e-06 GiB"
    assert callable(found["tiled"])
    assert callable(found["chunked"])


def test_the_row_of_the_in_batch_loss(bench: gpu.Bench) -> None:
    job = Job("contrastive", in_batch(64, 16, dtype="float32"), peers=False)
    row = gpu.contrastive_row(bench, job)
    assert row["case"] == "N=64 D=16 float32 highest"
    assert row["ours ms"] == row["tiled ms"]
    assert row["eager/ours"] == pytest.approx(row["eager ms"] / row["ours ms"])
    assert row["TFLOP/s"] == pytest.approx(6 * 64 * 64 * 16 / (1e9 * row["ours ms"]))
    assert row["% of GEMM"] == pytest.approx(100 * row["TFLOP/s"] / row["GEMM TFLOP/s"])
    assert row["chosen/faster"] == pytest.approx(row["tiled ms"] / min(row["tiled ms"], row["chunked ms"]))
    assert "note" not in row
    assert bench.pace.seconds("eager", job.case) == pytest.approx(row["eager ms"] / 1e3)


def test_matrix_products_of_many_rows_are_measured_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(gpu, "GEMM_ENTRIES", 128)
    monkeypatch.setattr(machine, "gemm_seconds", lambda m, n, k, *a, **kw: shapes.append((m, n, k)) or 2.0)
    assert gpu.gemm_rate(in_batch(64, 8), "cpu") == 6 * 2 * 64 * 8 / 6.0
    assert shapes == [(2, 64, 8), (2, 8, 64), (64, 8, 2)]


def test_the_cost_model_answers_for_every_case() -> None:
    from sbert_kernels.backends.triton import launching

    with launching.recording(launching.Target("cuda", 90)):
        for job in plan():
            if job.kind == "contrastive":
                with machine.matmul_precision(job.precision):
                    assert gpu.chosen_strategy(job.case) in ("tiled", "chunked")


def test_a_strategy_that_breaks_is_told(bench: gpu.Bench) -> None:
    broken = {"tiled": Timing(error="out of memory"), "chunked": Timing((0.5,)), "eager": Timing((1.0,))}
    row = gpu.columns_of(in_batch(1000, 100), broken, "tiled", 1e9)
    assert row["ours ms"] == "out of memory"
    assert row["faster"] == "chunked"
    assert math.isnan(row["eager/ours"])
    assert gpu.note_of(broken) == {"note": "tiled: out of memory"}
    assert gpu.note_of({"tiled": Timing(error="not run: some 9.0 s a call")}) == {}


@pytest.mark.usefixtures("one_process")
def test_memory_is_that_of_ours_and_of_eager_where_it_fits(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("memory", in_batch(64, 8))
    row = gpu.memory_row(bench, job)
    assert row["ours MiB"] == row["eager MiB"] == 3.0
    assert row["gradients MiB"] == 2 * 64 * 8 * 2 / 2**20
    monkeypatch.setattr(gpu, "free_bytes", lambda: 1000)
    assert gpu.memory_row(bench, job)["eager MiB"].startswith("needs ")


def test_memory_of_a_process_that_breaks_is_a_failure(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(target: Any, library: str, *args: Any) -> machine.ProcessResult:
        if library == OURS:
            raise RuntimeError("prepare failed in its own process:\nTraceback\nValueError: no kernel")
        return machine.ProcessResult(peak_extra_bytes=2**20)

    monkeypatch.setattr(machine, "run_in_process", broken)
    row = gpu.memory_row(bench, Job("memory", in_batch(64, 8)))
    assert row["ours MiB"] == row["note"] == "ValueError: no kernel"
    assert row["eager MiB"] == 1.0


@pytest.mark.parametrize(
    "case",
    [
        ranking.Case((ranking.ANGLE,), 32, dim=8),
        ranking.Case((ranking.COSENT,), 32, dim=None),
        in_batch(32, 16, dims=(16, 8)),
    ],
)
def test_the_row_of_other_losses(bench: gpu.Bench, case: Any) -> None:
    row = gpu.losses_row(bench, Job("losses", case))
    assert row["N"] == 32
    assert row["eager/ours"] == pytest.approx(row["eager ms"] / row["ours ms"])


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [job for job in plan() if job.kind == "parity"], ids=lambda job: job.name)
def test_parity_holds_where_no_kernel_is_in_play(bench: gpu.Bench, job: Job) -> None:
    size = {"rows": 70} if isinstance(job.case, ranking.Case) else {"batch": 70}
    with machine.matmul_precision("highest"):
        row = gpu.parity_row(bench, replace(job, case=replace(job.case, **size)))
    assert row["verdict"] == "pass"
    assert row["limit"] > 2 * row["eager error"] > 0


def test_parity_finds_what_is_wrong_by_a_percent(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_of = gpu.loss_of

    class Wrong(nn.Module):
        def __init__(self, right: nn.Module) -> None:
            super().__init__()
            self.right = right

        def forward(self, *args: Any) -> Tensor:
            return 1.01 * self.right(*args)

    monkeypatch.setattr(
        gpu, "loss_of", lambda library, job: Wrong(loss_of(library, job)) if library == OURS else loss_of(library, job)
    )
    bench.run([Job("parity", in_batch(70, 64, dtype="float32"))])
    (row,) = bench.reports["parity"].rows
    assert row["verdict"] == "FAIL"
    assert bench.failed == [f"parity: {row['case']}: {row['note']}"]
    assert "tiled error 0.01 above" in row["note"]


def test_the_mask_takes_the_partner_of_every_row_out() -> None:
    """Rows 2i and 2i + 1 have one document: of 6 candidates 5 are left."""
    job = Job("parity", in_batch(6, 8, dtype="float32"), mask=True)
    inputs = [{"embedding": torch.ones(6, 8)} for _ in range(2)]
    for library in (OURS, STOCK):
        assert gpu.loss_of(library, job)(inputs, None).item() == pytest.approx(math.log(5))


# -- peers ------------------------------------------------------------------------------------------------------------


def plain(hidden: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weights.T, targets)


@pytest.fixture
def fake_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers' modules with their signatures, of torch's cross-entropy."""

    class LigerFusedLinearCrossEntropyLoss(nn.Module):
        def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor) -> Tensor:
            return plain(_input, lin_weight, target)

    def linear_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(e @ c.T, targets, reduction=reduction)

    def cal_flash_loss(
        q: Tensor, k: Tensor, labels: Tensor | None = None, scale: float | None = None, head_dim: int = 256
    ) -> Tensor:
        q, k = (x.view(len(x), -1, head_dim).flatten(1).float() for x in (q, k))
        return F.cross_entropy((scale or 1.0) * q @ k.T, labels, reduction="none")

    for path, attribute in (
        ("liger_kernel", None),
        ("liger_kernel.transformers", LigerFusedLinearCrossEntropyLoss),
        ("cut_cross_entropy", linear_cross_entropy),
        ("inf_cl", cal_flash_loss),
    ):
        module = types.ModuleType(path)
        if attribute is not None:
            setattr(module, attribute.__name__, attribute)
        monkeypatch.setitem(sys.modules, path, module)


@pytest.mark.usefixtures("fake_peers")
@pytest.mark.parametrize("dim", [384, 768, 1024, 123])
@pytest.mark.parametrize("name", gpu_peers.PEERS)
def test_peers_compute_the_loss_that_stock_does(name: str, dim: int) -> None:
    case = in_batch(20, dim, dtype="float32")
    inputs = contrastive.make_inputs(case, torch.float32, "cpu")
    found, missing = gpu_peers.load()
    assert missing == {}
    ours = gpu._loss_and_gradients(gpu_peers.InBatchLoss(found[name], case.scale), case, inputs)
    stock = gpu._loss_and_gradients(contrastive.make_loss(STOCK, case), case, inputs)
    assert largest_error(ours, stock) < 1e-5


def test_peers_that_are_not_there_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peers.machine, "version", lambda name: "1" if name == "inf_cl" else None)
    for module in ("liger_kernel", "liger_kernel.transformers", "cut_cross_entropy", "inf_cl"):
        monkeypatch.setitem(sys.modules, module, None)
    found, missing = gpu_peers.load()
    assert found == {}
    assert missing["liger-kernel"] == missing["cut-cross-entropy"] == "not installed"
    assert missing["inf-cl"].startswith("import failed: ModuleNotFoundError")
    assert gpu_peers.advice(missing) == "more peers to compare with: pip install liger-kernel cut-cross-entropy"
    assert gpu_peers.advice({"inf-cl": "import failed: ImportError: no GPU"}) is None


def test_peers_that_compute_something_else_are_not_timed(bench: gpu.Bench) -> None:
    bench.peers = {"liger-kernel": plain, "inf-cl": lambda *args: 1.5 * plain(*args)}
    right, wrong = gpu.check_peers(bench)
    assert right["verdict"] == "pass"
    assert wrong["peer error"] == pytest.approx(0.5, rel=0.1)
    assert list(bench.peers) == ["liger-kernel"]
    makes = gpu.contenders(bench, Job("contrastive", in_batch(16, 8)))
    assert makes["inf-cl"] == wrong["verdict"]
    assert makes["inf-cl"].startswith("wrong result")
    assert callable(makes["liger-kernel"])


def test_half_precision_peers_have_no_float32_time(bench: gpu.Bench) -> None:
    bench.peers = {"liger-kernel": plain, "cut-cross-entropy": plain}
    makes = gpu.contenders(bench, Job("contrastive", in_batch(16, 8, dtype="float32")))
    assert makes["cut-cross-entropy"] == "no float32"
    assert callable(makes["liger-kernel"])


# -- the command ------------------------------------------------------------------------------------------------------


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu_cases.add_arguments(parser)
    return parser.parse_args(options)


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as found:
        gpu.run(arguments())
    assert found.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("python -m sbert_kernels bench gpu")


@pytest.mark.usefixtures("one_process")
def test_a_whole_run_writes_every_report(
    bench: gpu.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "compile_ahead", lambda bench, jobs: "compiling ahead of time: nothing to do")
    monkeypatch.setattr(gpu_peers, "load", lambda: ({"inf-cl": plain}, {"liger-kernel": "not installed"}))
    small = in_batch(48, 16, dtype="float32")
    jobs = [
        Job("parity", small),
        Job("contrastive", replace(small, batch=64), peers=False),
        Job("memory", small),
        Job("losses", ranking.Case((ranking.COSENT,), 32, dim=None)),
    ]
    gpu.conclude(bench, jobs, arguments("--output", str(tmp_path)))
    out = capsys.readouterr().out
    assert "pip install liger-kernel" in out
    assert "compiling ahead of time: nothing to do" in out
    for kind in gpu_cases.KINDS:
        assert (tmp_path / f"gpu-{kind}.png").stat().st_size > 0
        rows = json.loads((tmp_path / f"gpu-{kind}.json").read_text())["rows"]
        assert len(rows) == (2 if kind == "parity" else 1)  # one of a peer
    assert "| pass" in (tmp_path / "gpu-parity.md").read_text()


def test_failures_end_the_run_with_their_names(bench: gpu.Bench, tmp_path: Path) -> None:
    bench.failed.append("parity: N=1 D=2: wrong")
    with pytest.raises(SystemExit, match=r"failed\n  parity: N=1 D=2: wrong"):
        gpu.conclude(bench, [], arguments("--output", str(tmp_path)))


def test_compiling_ahead_tells_of_failures_and_stops_in_time(bench: gpu.Bench) -> None:
    job = Job("parity", in_batch(16, 8, dtype="float32"))
    assert gpu._compile("cpu", None, math.inf, job) is None
    assert gpu._compile("cpu", None, math.inf, Job("parity", ranking.Case((ranking.COSENT,), 8, dim=4))) is None
    assert "is not a backend" in gpu._compile("cpu", "unknown", math.inf, job)
    assert gpu._compile("cpu", "unknown", 0.0, job) is None
