"""The contrastive benchmark from its command line: what it writes, and that it times nothing that is wrong."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as stock

from sbert_kernels.bench import contrastive
from support.commands import run_command


def run(*options: str) -> None:
    run_command("contrastive", "--device", "cpu", *options)


def test_quick_run_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], one_process: None):
    run("--cases", "mnr-64", "--quick", "--repeats", "2", "--output", str(tmp_path))
    paths = [tmp_path / f"contrastive{suffix}" for suffix in (".json", ".md", ".png")]
    assert capsys.readouterr().out.splitlines()[-3:] == [str(path) for path in paths]
    assert all(path.stat().st_size > 0 for path in paths)
    (row,) = json.loads(paths[0].read_text())["rows"]
    assert row["case"] == "mnr-64 N=64 D=384"
    assert row["parity"] <= 1e-3
    assert len(row["ours samples ms"]) == len(row["stock samples ms"]) == 2 * contrastive.CASES["mnr-64"].rounds
    assert row["stock/ours"] == pytest.approx(row["stock ms"] / row["ours ms"])
    assert row["gradients MiB"] == 2 * 64 * 384 * 4 / 2**20
    assert row["stock MiB"] == row["ours MiB"] == 3
    assert row["compiled ms"] is None
    assert "not compiled: quick run" in row["note"]


def test_a_wrong_loss_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class WrongScale(stock.MultipleNegativesRankingLoss):
        def forward(self, *args: object) -> torch.Tensor:
            return super().forward(*args) * 1.01

    wrong = types.ModuleType("wrong_losses")
    wrong.MultipleNegativesRankingLoss = WrongScale
    monkeypatch.setitem(sys.modules, wrong.__name__, wrong)
    monkeypatch.setattr(contrastive, "OURS", wrong.__name__)
    with pytest.raises(SystemExit, match="parity failed: mnr-64"):
        run("--cases", "mnr-64", "--quick", "--output", str(tmp_path))
    (row,) = json.loads((tmp_path / "contrastive.json").read_text())["rows"]
    assert row["parity"] == pytest.approx(0.01, rel=1e-3)
    assert "not timed: parity error 0.01, wanted at most 0.001" in row["note"]
    assert "ours ms" not in row


@pytest.mark.parametrize("name", contrastive.CASES)
def test_the_loss_of_every_case_is_neither_solved_nor_hopeless(name: str):
    case = contrastive.replace(contrastive.CASES[name], batch=128)
    inputs = contrastive.make_inputs(case, torch.float32, "cpu")
    step, leaves = contrastive.make_step(contrastive.make_loss(contrastive.STOCK, case), case, inputs)
    # Chance is log(N), for each prefix.
    assert 0.1 < step().item() / max(1, len(case.dims)) < math.log(128) / 2
    assert all(leaf.grad is not None for leaf in leaves)
