"""The benchmark of training steps from its command line: what it writes, and that it times nothing that is wrong."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as stock

from sbert_kernels.bench import training
from sbert_kernels.workloads.recipes import SIDES
from sbert_kernels.workloads.steps import PARTS
from support.commands import run_command


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, number_pairs: None):
    monkeypatch.setattr(training, "QUICK_BATCH", 32)
    monkeypatch.setattr(training, "QUICK_DIM", 8)


def run(*options: str) -> None:
    run_command("training", "--quick", *options)


def test_quick_run_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], one_process: None):
    cases = ["mnr", "matryoshka-overlapped"]
    run("--cases", *cases, "--steps", "3", "--repeats", "1", "--output", str(tmp_path))
    printed = capsys.readouterr().out
    paths = [tmp_path / f"training{suffix}" for suffix in (".json", ".md", ".png")]
    assert printed.splitlines()[-3:] == [str(path) for path in paths]
    assert all(path.stat().st_size > 0 for path in paths)
    assert "100 pairs from numbers, repeated to 128 rows" in printed

    rows = json.loads(paths[0].read_text())["rows"]
    sides = ["stock", "sbert-kernels"]
    assert [(row["case"], row["side"]) for row in rows] == [(f"{c} N=32 D=8", side) for c in cases for side in sides]
    for row in rows:
        parts = [row[f"{part} ms"] for part in PARTS]
        assert sum(parts) == pytest.approx(row["step ms"])
        assert min(parts) >= 0
        assert len(row["step samples ms"]) == 3 - 1
        assert row["pairs/s"] == pytest.approx(32e3 / row["step ms"])
        assert row.get("peak extra MiB") == (3.0 if row["case"].startswith("mnr ") else None)
    assert rows[1]["stock/this"] == pytest.approx(rows[0]["step ms"] / rows[1]["step ms"])
    assert all(row["parity"] <= training.PARITY_LIMIT for row in rows[1::2])


def test_a_wrong_loss_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class WrongScale(stock.MultipleNegativesRankingLoss):
        def forward(self, *args: object) -> torch.Tensor:
            return super().forward(*args) * 1.01

    wrong = types.ModuleType("wrong_losses")
    wrong.MultipleNegativesRankingLoss = WrongScale
    monkeypatch.setitem(sys.modules, wrong.__name__, wrong)
    monkeypatch.setitem(SIDES, "sbert-kernels", wrong.__name__)
    with pytest.raises(SystemExit, match="parity failed: mnr"):
        run("--cases", "mnr", "--output", str(tmp_path))
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert rows[1]["parity"] == pytest.approx(0.01, rel=1e-3)
    assert all("not timed: the loss curves differ by 0.01, wanted at most 0.001" in row["note"] for row in rows)
    assert all("step ms" not in row for row in rows)


def test_one_step_would_leave_nothing_to_time():
    with pytest.raises(SystemExit, match="argument --steps: got 1, wanted at least 2"):
        run("--steps", "1")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training.requirements, "NEEDED", ("a_package_that_is_not_installed",))
    with pytest.raises(SystemExit, match="training needs a_package_that_is_not_installed: pip install"):
        run()
