"""Which backend computes ours in the benchmark on one GPU, and how the backends are compared there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sbert_kernels import settings
from sbert_kernels.bench import gpu, gpu_rows, gpu_steps
from sbert_kernels.bench.cases import ranking
from sbert_kernels.bench.gpu_jobs import MINILM, Job, in_batch, plan, symmetric
from sbert_kernels.bench.gpu_pace import Budget
from sbert_kernels.bench.gpu_steps import Bench

FEW = Job("backends", in_batch(32, 8, dtype="float32"))


def bench_of(*backends: str) -> Bench:
    """On the CPU, where "cuda" refuses every job and the others serve it."""
    return Bench("cpu", 2, Budget(300.0), backends=backends)


def test_where_there_are_several_backends_the_goals_come_after_the_first_parity() -> None:
    jobs = plan(("liger-kernel",), backends=("cuda", "triton"))
    first = jobs[: [job.kind for job in jobs].index("host")]
    assert [job.backend for job in first[:3]] == [None, "triton", None]
    goals = [job.name for job in first if job.kind == "backends"]
    assert goals == [
        "N=65536 D=768 bfloat16",
        "N=262144 D=768 bfloat16",
        "N=1024 D=768 bfloat16",
        "N=65536 D=384 bfloat16",
        "N=65536 D=768 bfloat16, 2 directions",
    ]
    assert [job.kind for job in first[:3]] == ["parity", "parity", "backends"]
    assert len({(job.kind, job.name) for job in jobs}) == len(jobs)
    assert "backends" not in {job.kind for job in plan()}


def test_the_first_backend_that_serves_a_job_computes_ours() -> None:
    assert gpu_steps.backend_of(bench_of("reference", "blockwise"), FEW) == "reference"
    bench = bench_of("cuda", "blockwise")
    pairs = Job("losses", ranking.Case((ranking.COSENT,), 32, dim=8))
    for job in (FEW, Job("losses", symmetric(32, 16, "float32")), pairs):
        assert gpu_steps.our_settings(bench, job) == {"backend": "blockwise"}
    assert gpu_steps.our_settings(bench, Job("contrastive", FEW.case, backend="cuda")) == {"backend": "cuda"}
    by_way = Job("parity", FEW.case, way="sweep")
    assert gpu_steps.our_settings(bench_of("reference", "blockwise"), by_way)["backend"] == "blockwise"
    assert gpu_steps.backend_of(bench, Job("training", MINILM)) is None


def test_a_step_does_not_ask_again_which_backend_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, seen = bench_of("cuda", "blockwise"), list[Any]()
    step = gpu_steps.as_ours(bench, FEW, gpu_steps.Step(lambda: seen.append(settings.get("backend")), ()))
    monkeypatch.setattr(gpu_steps, "backend_of", lambda *_: pytest.fail("in a step that is timed"))
    step.call()
    assert seen == ["blockwise"]


def test_the_row_of_each_backend() -> None:
    row = gpu_rows.backends_row(bench_of("reference", "blockwise"), FEW)
    assert row["ours ms"] == row["reference ms"] > 0
    assert row["blockwise/ours"] == pytest.approx(row["blockwise ms"] / row["ours ms"])
    assert "note" not in row


def test_a_backend_that_leaves_a_job_to_others_is_no_failure_and_one_that_breaks_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = gpu_rows.backends_row(bench_of("cuda", "blockwise"), FEW)
    assert row["ours ms"] == row["blockwise ms"] > 0
    assert "cannot serve this call" in row["cuda ms"]
    assert "note" not in row
    ours = gpu_rows.ours

    def wrong(bench: Bench, job: Job, step_of: Any) -> Any:
        if job.backend == "cuda":
            raise ValueError("backend='cuda' cannot serve this call: WRONG RESULTS on a GPU")
        return ours(bench, job, step_of)

    monkeypatch.setattr(gpu_rows, "ours", wrong)
    row = gpu_rows.backends_row(bench_of("cuda", "blockwise"), FEW)
    assert row["note"].startswith("cuda: ValueError: backend='cuda' cannot serve this call: WRONG")


def test_rows_say_whose_kernels_computed_them() -> None:
    run = gpu.Run(bench_of("cuda", "blockwise"), gpu.new_reports())
    run.run([FEW, Job("parity", FEW.case, backend="reference")])
    assert [run.reports[kind].rows[0]["backend"] for kind in ("backends", "parity")] == ["blockwise", "reference"]


def test_a_backend_that_is_not_there_is_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def backend(name: str, device: str, why_not: str | None) -> SimpleNamespace:
        return SimpleNamespace(name=name, device=device, why_not_on=lambda device, by_name: why_not)

    found = (backend("cpu", "cpu", None), backend("cuda", "cuda", "no driver"), backend("triton", "cuda", None))
    monkeypatch.setattr(gpu, "BACKENDS", found)
    assert gpu.backends_here() == ["triton"]
    assert capsys.readouterr().out == "the cuda backend is not there: no driver\n"
