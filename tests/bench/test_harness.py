"""What the benchmarks do around their measurements: options, cases, reports."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch

from sbert_kernels import machine
from sbert_kernels.bench import arguments, harness
from sbert_kernels.bench import report as report_module
from sbert_kernels.bench.report import Chart, Report, StackedChart


def make_report() -> Report:
    chart = Chart("ms", {"ours": "ours ms", "stock": "stock ms"})
    report = Report("A title", "numbers", {"cores": 2}, "2 cores", charts=[chart])
    report.add(**{"case": "small", "ours ms": 2.0, "stock ms": 1.68, "stock/ours": 0.84, "samples": [2.0, 2.1]})
    report.add(**{"case": "large", "ours ms": 1234.5, "stock ms": machine.OUT_OF_MEMORY, "stock/ours": math.nan})
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
    chart = StackedChart("ms", {"load": "load ms", "compute": "compute ms"}, names=("case", "side"))
    report = Report("A title", "parts", charts=[chart])
    report.add(**{"case": "small", "side": "stock", "load ms": 1.0, "compute ms": 2.5})
    report.add(**{"case": "small", "side": "ours", "load ms": 1.0, "compute ms": 1.5})
    report.add(**{"case": "large", "side": "stock", "step ms": machine.OUT_OF_MEMORY})
    report.write(tmp_path)
    assert drawn == {
        "small, stock": {"load": 1.0, "compute": 2.5},
        "small, ours": {"load": 1.0, "compute": 1.5},
    }


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
    arguments.add_arguments(parser, quick="", repeats=3, cases=cases, large=["large"], large_takes="long")
    chosen = harness.begin(parser.parse_args(options), cases, ["large"])
    assert list(chosen.items()) == [(name, cases[name]) for name in names]


def test_threads_are_set_for_a_benchmark_without_cases_too():
    before = torch.get_num_threads()
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser, quick="", repeats=3)
    try:
        assert harness.begin(parser.parse_args(["--threads", "3"])) == {}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
