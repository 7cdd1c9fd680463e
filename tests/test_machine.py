"""Timer and meter: what they report has to be true before any number of a benchmark means something."""

from __future__ import annotations

import math
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sbert_kernels import machine

MIB = 2**20


def test_measure_alternates_between_the_contenders():
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "AB"}
    timings = machine.measure(contenders, repeats=3, warmup=1)
    assert "".join(calls) == "AB" + "ABABAB"
    assert [len(timing.samples) for timing in timings.values()] == [3, 3]
    assert timings["A"].min_s <= timings["A"].median_s <= timings["A"].max_s


def test_measure_stops_at_its_budget_after_one_full_round():
    calls: list[str] = []
    machine.measure({name: lambda name=name: calls.append(name) for name in "AB"}, repeats=9, warmup=0, budget_s=0.0)
    assert calls == ["A", "B"]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_out_of_memory_is_a_result_and_the_others_go_on(error: Exception):
    def fail() -> None:
        raise error

    timings = machine.measure({"A": fail, "B": lambda: None}, repeats=2)
    assert timings["A"].error == machine.OUT_OF_MEMORY
    assert math.isnan(timings["A"].median_s)
    assert len(timings["B"].samples) == 2


def test_an_allocation_that_torch_refuses_is_out_of_memory():
    timings = machine.measure({"A": lambda: torch.empty(2**55)}, repeats=1)
    assert timings["A"].error == machine.OUT_OF_MEMORY


def test_other_errors_propagate():
    with pytest.raises(ZeroDivisionError):
        machine.measure({"A": lambda: 1 / 0})


def allocate_after_freeing_more(freed: int, allocated: int) -> Callable[[], int]:
    torch.ones(freed, dtype=torch.uint8)

    def call() -> int:
        torch.ones(allocated, dtype=torch.uint8)
        return torch.get_num_threads()

    return call


def test_peak_memory_is_that_of_the_call_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        result = machine.run_in_process(allocate_after_freeing_more, 400 * MIB, allocated=200 * MIB)
    finally:
        torch.set_num_threads(threads)
    assert result.error is None
    assert result.value == 3
    assert result.peak_extra_bytes == pytest.approx(200 * MIB, rel=0.1)


def test_the_sampling_meter_sees_the_same_peak(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path, text: str) -> int:
        raise PermissionError(self)

    monkeypatch.setattr(Path, "write_text", refuse)
    meter = machine._ResidentMeter()
    block = torch.ones(200 * MIB, dtype=torch.uint8)
    hung_at = time.monotonic() + 600
    while meter._highest < meter._before + 190 * MIB and time.monotonic() < hung_at:
        time.sleep(1e-3)  # until the sampler had its turn, on a busy machine too
    del block
    assert meter.peak_extra_bytes() == pytest.approx(200 * MIB, rel=0.1)


def raise_signal_later(number: int) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


def test_a_killed_process_is_out_of_memory():
    result = machine.run_in_process(raise_signal_later, signal.SIGKILL)
    assert result == machine.ProcessResult(error=machine.OUT_OF_MEMORY, seconds=result.seconds)


def fail_later(message: str) -> Callable[[], None]:
    def call() -> None:
        raise ValueError(message)

    return call


def test_an_exception_in_the_process_comes_back_with_its_message():
    with pytest.raises(RuntimeError, match="ValueError: batch: got 3, wanted 4") as caught:
        machine.run_in_process(fail_later, "batch: got 3, wanted 4")
    assert "fail_later failed in its own process" in str(caught.value)
    assert "in call" in str(caught.value)  # the child's traceback


def test_machine_line_names_what_a_number_depends_on():
    line = machine.line(torch.bfloat16)
    assert f"torch {torch.__version__}" in line
    assert f"{torch.get_num_threads()} threads" in line
    assert "bfloat16" in line
    assert "precision " + torch.get_float32_matmul_precision() in line


def test_copy_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "COPIED_BYTES", 10)
    monkeypatch.setattr(machine, "_seconds", lambda call: call() is None or 0.5)
    assert machine.copy_bandwidth() == 2 * 10 / 0.5


def test_gemm_seconds_is_a_positive_time():
    assert machine.gemm_seconds(64, 32, 16, torch.float32, repeats=2) > 0


def test_the_commit_is_that_of_the_clone_and_of_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*arguments: str) -> None:
        name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *name, "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    package = tmp_path / "src" / "sbert_kernels"
    package.mkdir(parents=True)
    (package / "file.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(machine, "_PACKAGE", package.resolve())
    commit = machine.commit()
    assert commit is not None
    assert len(commit) == 12
    (package / "file.py").write_text("2")
    assert machine.commit() == f"{commit}-dirty"
    installed = tmp_path / "lib" / "sbert_kernels"  # in a repository of another project
    installed.mkdir(parents=True)
    monkeypatch.setattr(machine, "_PACKAGE", installed.resolve())
    assert machine.commit() is None


def test_the_host_s_time_is_that_of_one_of_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 16.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(times))
    calls = []
    assert machine.host_seconds(lambda: calls.append(1), 3) == 2.0
    assert len(calls) == 3


def test_without_a_gpu_a_call_has_no_peak_of_its_memory_but_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    calls = []
    assert machine.device_peak(lambda: calls.append(1)) is None
    assert calls == [1]
