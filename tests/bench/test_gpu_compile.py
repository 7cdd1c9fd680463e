"""What the benchmark on a GPU compiles ahead of its time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sbert_kernels.bench import gpu_compile, gpu_peers
from sbert_kernels.bench.cases import ranking
from sbert_kernels.bench.gpu_jobs import Job, Training, in_batch, plan
from sbert_kernels.bench.gpu_pace import Budget
from sbert_kernels.bench.gpu_steps import Bench
from support.peers import in_batch_loss


def test_compiling_ahead_tells_of_failures_and_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("parity", in_batch(16, 8, dtype="float32"))
    assert gpu_compile._compile("cpu", (None,), math.inf, job) is None
    assert (
        gpu_compile._compile("cpu", (None,), math.inf, Job("parity", ranking.Case((ranking.COSENT,), 8, dim=4))) is None
    )
    found = gpu_compile._compile("cpu", ("unknown",), math.inf, job)
    assert found is not None
    assert "is not a backend" in found
    assert gpu_compile._compile("cpu", ("unknown",), 0.0, job) is None
    monkeypatch.setitem(gpu_peers.PEERS, "torch", gpu_peers.Peer("torch", lambda: in_batch_loss(1.0)))
    assert gpu_compile._compile("cpu", (None,), math.inf, replace(job, peer="torch")) is None


def test_what_is_compiled_ahead_is_small_and_each_kernel_once() -> None:
    bench = Bench("cuda", 1, Budget(0.0), backends=("cuda", "triton"))
    jobs = plan(("liger-kernel",), backends=bench.backends)
    found = [small for job in jobs for small in gpu_compile._small(bench, job)]
    assert {job.backend for job in found if job.kind == "backends"} == {"cuda", "triton"}
    assert max(job.rows for job in found) == 1024
    assert [job.peer for job in found if job.peer] == ["liger-kernel"]
    assert not [job for job in found if job.peers or isinstance(job.case, Training)]
    assert len({(job.name, job.rows) for job in found}) < len(found)
