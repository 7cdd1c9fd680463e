"""The benchmark of the host: its report, and bounds for what a step may ask of the host, in counts instead of times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.commands import run_command

pytest.importorskip("triton")

from sbert_kernels.bench import host
from sbert_kernels.bench.cases.host import CASES, QUICK


def test_quick_run_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("host", "--quick", "--repeats", "2", "--profile", "--output", str(tmp_path))
    printed = capsys.readouterr().out
    assert "run_backward" in printed  # a line of the profile
    content = json.loads((tmp_path / "host.json").read_text())
    assert [row["case"] for row in content["rows"]] == list(QUICK)
    for row in content["rows"]:
        assert 0 < row["ours us"] < row["step us"] <= row["median us"]
        assert row["step us"] >= row["forward us"] + row["backward us"]
        torch_us = row["forward: torch us"] + row["backward: torch us"]
        assert row["ours us"] == pytest.approx(row["step us"] - torch_us)


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        ("in-batch-64", (6, 260), (0, 7)),
        ("in-batch-4096", (6, 260), (0, 7)),
        ("cosent-1024", (2, 175), (1, 57)),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_a_step_asks_of_the_host_is_bounded(
    case: str, dtype: str, forward: tuple[int, int], backward: tuple[int, int]
) -> None:
    """In launches of Triton's kernels and in calls of Python functions; and the same again for the next step."""
    with host.without_a_gpu() as launches:
        step, tensors = host.make_step(replace(CASES[case], dtype=dtype))
        torch.autograd.grad(step(), tensors)
        found = [host.counts_of(step, launches) for _ in range(2)]
        losses = [step(), step()]
        found_backward = host.counts_of(lambda: torch.autograd.grad(losses.pop(), tensors), launches)
    assert {**found[0], "torch us": 0} == {**found[1], "torch us": 0}
    assert found[0]["launches"] <= forward[0]
    assert found[0]["calls"] <= forward[1]
    assert found_backward["launches"] <= backward[0]
    assert found_backward["calls"] <= backward[1]
    # The gradient of the loss itself, which loss.backward() makes, and a product for each gradient.
    assert found_backward["other kernels"] <= 3


def test_nothing_of_the_process_is_changed() -> None:
    from sbert_kernels import backends
    from sbert_kernels.backends.triton import launching

    before = backends.BACKENDS, host.contrastive.readable
    with host.without_a_gpu():
        assert backends.choose("ranking", device="meta").backend.name == "triton"
    assert (backends.BACKENDS, host.contrastive.readable) == before
    assert launching._recorder.get() is None
