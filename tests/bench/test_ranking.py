"""The benchmark of the ranking losses from its command line: its report, and that it times nothing that is wrong."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as stock

from sbert_kernels.bench import ranking
from sbert_kernels.bench.peers import largest_error
from support.commands import run_command

MIB = 2**20


def run(*options: str) -> None:
    run_command("ranking", "--device", "cpu", "--quick", *options)


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranking.machine, "COPIED_BYTES", MIB)


def test_quick_run_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], one_process: None):
    run("--cases", "both", "triplets", "scores-1024", "angle-bfloat16", "--repeats", "2", "--output", str(tmp_path))
    paths = [tmp_path / f"ranking{suffix}" for suffix in (".json", ".md", ".png")]
    assert capsys.readouterr().out.splitlines()[-3:] == [str(path) for path in paths]
    assert all(path.stat().st_size > 0 for path in paths)
    content = json.loads(paths[0].read_text())
    both, triplets, scores, low = content["rows"]
    assert both["case"] == "both N=256 D=384"
    assert triplets["case"] == "triplets N=256 x 3 columns D=384"
    # Read x and y twice, write their gradients; the scores and labels of the third are read, its gradients written.
    assert both["floor MiB"] == 6 * 256 * 384 * 4 / MIB
    assert triplets["floor MiB"] == 9 * 256 * 384 * 4 / MIB
    assert scores["floor MiB"] == 3 * 256 * 4 / MIB
    assert low["floor MiB"] == 6 * 256 * 384 * 2 / MIB
    for row in content["rows"]:
        assert row["parity"] <= (2e-2 if row["dtype"] == "bfloat16" else 1e-3)
        assert row["stock/ours"] == pytest.approx(row["stock ms"] / row["ours ms"])
        seconds = row["floor MiB"] * MIB / content["machine"]["copy_bytes_per_s"]
        assert row["floor ms"] == pytest.approx(1e3 * seconds)
        assert row["ours/floor"] == pytest.approx(row["ours ms"] / row["floor ms"])
        assert row["stock MiB"] == row["ours MiB"] == 3.0
        assert row["compiled ms"] is None
        assert "not compiled: quick run" in row["note"]
    assert len(scores["ours samples ms"]) == 2 * ranking.CASES["scores-1024"].rounds
    assert low["stock float32 ms"] > 0
    assert both["stock float32 ms"] is None


def test_a_wrong_loss_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class WrongScale(stock.CoSENTLoss):
        def forward(self, *args: object) -> torch.Tensor:
            return super().forward(*args) * 1.01

    wrong = types.ModuleType("wrong_losses")
    wrong.CoSENTLoss = WrongScale
    monkeypatch.setitem(sys.modules, wrong.__name__, wrong)
    monkeypatch.setattr(ranking, "OURS", wrong.__name__)
    with pytest.raises(SystemExit, match="parity failed: cosent"):
        run("--cases", "cosent", "--output", str(tmp_path))
    (row,) = json.loads((tmp_path / "ranking.json").read_text())["rows"]
    assert row["parity"] == pytest.approx(0.01, rel=1e-3)
    assert "not timed: parity error 0.01, wanted at most 0.001" in row["note"]
    assert "ours ms" not in row


@pytest.mark.parametrize("name", ranking.CASES)
def test_both_sides_compute_the_same_loss_which_is_neither_solved_nor_hopeless(name: str):
    case = ranking.replace(ranking.CASES[name], rows=128, dtype="float32")
    columns, labels = ranking.make_inputs(case, "cpu")
    results = []
    for library in (ranking.STOCK, ranking.OURS):
        step, leaves = ranking.make_step(ranking.make_loss(library, case), columns, labels)
        results.append([step(), *(leaf.grad for leaf in leaves)])
    assert largest_error(*results) < 1e-5
    # Equal scores of N pairs have log(1 + N(N - 1)/2), or less where labels are equal; N positives and N negatives have
    # log(1 + N^2).
    assert 0.1 < results[0][0].item() / len(case.losses) < math.log(1 + 128**2 / (2 if case.columns == 2 else 1))


def test_labels_have_the_levels_that_the_case_names():
    case = ranking.CASES["cosent-5-labels"]
    assert len(ranking.make_inputs(case, "cpu")[1].unique()) == case.levels == 5


def test_every_step_starts_without_gradients():
    case = ranking.replace(ranking.CASES["cosent"], rows=8)
    step, leaves = ranking.make_step(ranking.make_loss(ranking.STOCK, case), *ranking.make_inputs(case, "cpu"))
    first, second = (step() and leaves[0].grad for _ in range(2))
    assert torch.equal(first, second)
    assert first is not second
