"""The harness itself: what it reports has to be true before any number of it means something."""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sbert_kernels.bench import harness
from sbert_kernels.bench import report as report_module

MIB = 2**20


def test_measure_alternates_between_the_contenders():
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "AB"}
    timings = harness.measure(contenders, repeats=3, warmup=1)
    assert "".join(calls) == "AB" + "ABABAB"
    assert [len(timing.samples) for timing in timings.values()] == [3, 3]
    assert timings["A"].min_s <= timings["A"].median_s <= timings["A"].max_s


def test_measure_stops_at_its_budget_after_one_full_round():
    calls: list[str] = []
    harness.measure({name: lambda name=name: calls.append(name) for name in "AB"}, repeats=9, warmup=0, budget_s=0.0)
    assert calls == ["A", "B"]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_out_of_memory_is_a_result_and_the_others_go_on(error: Exception):
    def fail() -> None:
        raise error

    timings = harness.measure({"A": fail, "B": lambda: None}, repeats=2)
    assert timings["A"].error == harness.OUT_OF_MEMORY
    assert math.isnan(timings["A"].median_s)
    assert len(timings["B"].samples) == 2


def test_an_allocation_that_torch_refuses_is_out_of_memory():
    timings = harness.measure({"A": lambda: torch.empty(2**55)}, repeats=1)
    assert timings["A"].error == harness.OUT_OF_MEMORY


def test_other_errors_propagate():
    with pytest.raises(ZeroDivisionError):
        harness.measure({"A": lambda: 1 / 0})


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
        result = harness.run_in_process(allocate_after_freeing_more, 400 * MIB, allocated=200 * MIB)
    finally:
        torch.set_num_threads(threads)
    assert result.error is None
    assert result.value == 3
    assert result.peak_extra_bytes == pytest.approx(200 * MIB, rel=0.1)


def test_the_sampling_meter_sees_the_same_peak(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path, text: str) -> int:
        raise PermissionError(self)

    monkeypatch.setattr(Path, "write_text", refuse)
    meter = harness._ResidentMeter()
    block = torch.ones(200 * MIB, dtype=torch.uint8)
    hung_at = time.monotonic() + 600
    while meter._highest < meter._before + 190 * MIB and time.monotonic() < hung_at:
        time.sleep(1e-3)  # until the sampler had its turn, on a busy machine too
    del block
    assert meter.peak_extra_bytes() == pytest.approx(200 * MIB, rel=0.1)


def raise_signal_later(number: int) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


def test_a_killed_process_is_out_of_memory():
    result = harness.run_in_process(raise_signal_later, signal.SIGKILL)
    assert result == harness.ProcessResult(error=harness.OUT_OF_MEMORY, seconds=result.seconds)


def fail_later(message: str) -> Callable[[], None]:
    def call() -> None:
        raise ValueError(message)

    return call


def test_an_exception_in_the_process_comes_back_with_its_message():
    with pytest.raises(RuntimeError, match="ValueError: batch: got 3, wanted 4") as caught:
        harness.run_in_process(fail_later, "batch: got 3, wanted 4")
    assert "fail_later failed in its own process" in str(caught.value)
    assert "in call" in str(caught.value)  # the child's traceback


def make_report() -> harness.Report:
    chart = harness.Chart("ms", {"ours": "ours ms", "stock": "stock ms"})
    report = harness.Report("A title", "numbers", {"cores": 2}, "2 cores", charts=[chart])
    report.add(**{"case": "small", "ours ms": 2.0, "stock ms": 1.68, "stock/ours": 0.84, "samples": [2.0, 2.1]})
    report.add(**{"case": "large", "ours ms": 1234.5, "stock ms": harness.OUT_OF_MEMORY, "stock/ours": math.nan})
    return report


def test_markdown_prints_losses_and_failures_as_they_are():
    assert make_report().markdown().splitlines() == [
        "| case | ours ms | stock ms | stock/ours |",
        "| :--- | ---: | ---: | ---: |",
        "| small | 2 | 1.68 | 0.84 |",
        "| large | 1,234 | out of memory | - |",
    ]


def test_report_writes_json_markdown_and_plot(tmp_path: Path):
    paths = make_report().write(tmp_path / "folder")
    assert [path.name for path in paths] == ["numbers.json", "numbers.md", "numbers.png"]
    content = json.loads(paths[0].read_text())
    assert content["rows"][0]["samples"] == [2.0, 2.1]
    assert content["rows"][1]["stock/ours"] is None
    assert "2 cores" in paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_a_stacked_chart_has_a_bar_for_each_row_that_has_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = {}
    monkeypatch.setattr(report_module, "draw_stacks", lambda axis, stacks: drawn.update(stacks))
    chart = harness.StackedChart("ms", {"load": "load ms", "compute": "compute ms"}, names=("case", "side"))
    report = harness.Report("A title", "parts", charts=[chart])
    report.add(**{"case": "small", "side": "stock", "load ms": 1.0, "compute ms": 2.5})
    report.add(**{"case": "small", "side": "ours", "load ms": 1.0, "compute ms": 1.5})
    report.add(**{"case": "large", "side": "stock", "step ms": harness.OUT_OF_MEMORY})
    report.write(tmp_path)
    assert drawn == {
        "small, stock": {"load": 1.0, "compute": 2.5},
        "small, ours": {"load": 1.0, "compute": 1.5},
    }


def test_machine_line_names_what_a_number_depends_on():
    line = harness.machine_line(torch.bfloat16)
    assert f"torch {torch.__version__}" in line
    assert f"{torch.get_num_threads()} threads" in line
    assert "bfloat16" in line
    assert "precision " + torch.get_float32_matmul_precision() in line


def test_copy_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "COPIED_BYTES", 10)
    monkeypatch.setattr(harness, "_seconds", lambda call: call() is None or 0.5)
    assert harness.copy_bandwidth() == 2 * 10 / 0.5


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["small", "middle"]),
        (["--large"], ["small", "middle", "large"]),
        (["--cases", "middle"], ["middle"]),
        (["--cases", "large", "small"], ["large", "small"]),
        (["--cases", "large", "small", "--large"], ["large", "small"]),
    ],
)
def test_the_cases_that_were_asked_for(options: list[str], names: list[str]):
    cases = {"small": 1, "middle": 2, "large": 3}
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser, quick="", repeats=3, cases=cases, large=["large"], large_takes="long")
    chosen = harness.begin(parser.parse_args(options), cases, ["large"])
    assert list(chosen.items()) == [(name, cases[name]) for name in names]


def test_threads_are_set_for_a_benchmark_without_cases_too():
    before = torch.get_num_threads()
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser, quick="", repeats=3)
    try:
        assert harness.begin(parser.parse_args(["--threads", "3"])) == {}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_gemm_seconds_is_a_positive_time():
    assert harness.gemm_seconds(64, 32, 16, torch.float32, repeats=2) > 0
