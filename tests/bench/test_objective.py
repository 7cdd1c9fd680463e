"""The benchmark of AnglE's objective from its command line: what it writes, and that it times nothing that is wrong."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from sbert_kernels.bench import objective, peers
from sbert_kernels.workloads import models
from support.commands import run_command


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, number_pairs: None, bert: Callable[..., SentenceTransformer]):
    monkeypatch.setattr(objective, "QUICK_DIM", 8)
    monkeypatch.setattr(models, "minilm_model", lambda: bert(torch.float32))


def run(*options: str) -> None:
    run_command("objective", "--quick", *options)


def test_quick_run_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], one_process: None):
    run("--repeats", "2", "--output", str(tmp_path))
    paths = [tmp_path / f"objective{suffix}" for suffix in (".json", ".md", ".png")]
    printed = capsys.readouterr().out
    assert printed.splitlines()[-3:] == [str(path) for path in paths]
    assert all(path.stat().st_size > 0 for path in paths)
    assert "100 pairs from numbers" in printed
    rows = json.loads(paths[0].read_text())["rows"]
    assert [row["case"] for row in rows] == ["static N=16 D=8", "minilm N=16"]
    for row in rows:
        assert row["gradient difference"] <= peers.PARITY_LIMIT
        assert len(row["stock samples ms"]) == len(row["ours samples ms"]) == 2
        assert row["stock/ours"] == pytest.approx(row["stock ms"] / row["ours ms"])
        assert row["stock MiB"] == row["ours MiB"] == 3.0
    assert rows[0]["gradients MiB"] == models.static_model(8, seed=0)[0].embedding.weight.nbytes / 2**20


class Summed(nn.Module):
    """Stock's three losses as the components of one, the last of them times a factor."""

    def __init__(self, model: SentenceTransformer, factor: float) -> None:
        super().__init__()
        self.losses = objective.make_losses(model, objective.STOCK)
        self.factors = (1.0, 1.0, factor)

    def forward(self, *args: Any) -> dict[str, torch.Tensor]:
        return {str(i): f * loss(*args) for i, (f, loss) in enumerate(zip(self.factors, self.losses, strict=True))}


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_objective_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float):
    wrong = types.ModuleType("wrong_losses")
    wrong.AnglEObjective = lambda model, **options: Summed(model, factor)
    monkeypatch.setitem(sys.modules, wrong.__name__, wrong)
    monkeypatch.setitem(objective.SIDES, "ours", wrong.__name__)
    monkeypatch.setattr(objective, "OURS", wrong.__name__)
    with pytest.raises(SystemExit, match="parity failed: static, minilm"):
        run("--output", str(tmp_path))
    for row in json.loads((tmp_path / "objective.json").read_text())["rows"]:
        assert "not timed: the sides differ by more than 0.001" in row["note"]
        assert "ours ms" not in row


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objective.requirements, "NEEDED", ("a_package_that_is_not_installed",))
    with pytest.raises(SystemExit, match="training needs a_package_that_is_not_installed: pip install"):
        run()
