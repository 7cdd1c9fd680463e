"""The gradient cache's benchmark from its command line: what it writes, and that it times nothing that is wrong."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sbert_kernels.bench import gradcache, peers
from sbert_kernels.bench.cases import gradcache as cases
from sbert_kernels.workloads import models, texts
from support.commands import run_command

SMALL = {"pairs": 10, "length": 32, "mini_batch": 4}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, bert: Callable[..., SentenceTransformer]):
    """Few texts, of many lengths, and a tiny model."""
    bodies = [f"the number {i}{' and then one more' * (i % 7)}" for i in range(100)]
    pairs = texts.Pairs([(f"what is {i}", body) for i, body in enumerate(bodies)], "numbers")
    monkeypatch.setattr(texts, "docstring_pairs", lambda *packages: pairs)
    monkeypatch.setattr(gradcache, "QUICK", SMALL)
    monkeypatch.setattr(gradcache, "gemm_rate", lambda model: 1e9)
    monkeypatch.setattr(models, "minilm_model", lambda: bert(torch.float32))


def run(output: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of the report, which is written whether parity fails or not."""
    run_command("gradcache", *options, "--output", str(output))
    return rows_of(output)


def rows_of(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "gradcache.json").read_text())["rows"]


def test_quick_run_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = run(tmp_path, "--quick", "--cases", "text", "trainer", "--repeats", "2")
    paths = [tmp_path / f"gradcache{suffix}" for suffix in (".json", ".md", ".png")]
    printed = capsys.readouterr().out
    assert printed.splitlines()[-3:] == [str(path) for path in paths]
    assert all(path.stat().st_size > 0 for path in paths)
    assert "100 pairs from numbers" in printed

    text, trainer = "text N=10 L=32", "trainer N=10 L=32, 3 steps"
    assert [(row["case"], row["contender"]) for row in rows] == [
        *((text, peer) for peer in cases.PEERS),
        *((trainer, peer) for peer in ("stock", "ours")),
    ]
    stock_row, by_tokens, uncached, *_ = rows
    for row in rows:
        reference = stock_row if row["case"] == text else rows[-2]
        assert len(row["samples s"]) == 2
        assert len(row["losses"]) == (1 if row["case"] == text else 3)
        assert row["stock/this"] == pytest.approx(reference["s"] / row["s"])
        assert row["real tokens"] == reference["real tokens"] <= row["first pass"]
        assert row["real tokens/s"] == pytest.approx(row["real tokens"] / row["s"])
        assert row["floor s"] + row["above floor s"] == pytest.approx(row["s"])
        assert row["peak extra MiB"] is None
        if row["contender"].startswith("ours"):
            assert max(row["loss difference"], row["gradient difference"]) <= peers.PARITY_LIMIT
            assert row["first pass"] < reference["first pass"] or row["contender"] == "ours by tokens"
    assert stock_row["second pass"] == stock_row["first pass"]
    assert uncached["second pass"] == 0
    assert stock_row["floor s"] == pytest.approx(4 / 3 * uncached["floor s"])
    assert "the best on 8 pairs (256: " in by_tokens["note"]
    assert rows[-2].get("loss curves differ") is None
    assert rows[-1]["loss curves differ"] <= peers.PARITY_LIMIT


def test_rows_of_one_length_leave_no_padding_and_half_of_the_budget_halves_the_second_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gradcache, "QUICK", SMALL | {"length": 5})  # tokens of "what is 7"
    rows = {row["contender"]: row for row in run(tmp_path, "--quick", "--cases", "equal")}
    assert list(rows) == ["stock", "stock uncached", "ours", "ours, half kept"]
    for row in rows.values():
        assert row["first pass"] == row["real tokens"] == 2 * 10 * 5
    assert rows["ours"]["second pass"] == (2 * 10 - 4) * 5  # the end, of one mini-batch, is kept
    assert 0 < rows["ours, half kept"]["second pass"] < 2 * 10 * 5


def test_a_full_run_meters_each_contender_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None
):
    monkeypatch.setattr(gradcache, "CASES", {name: replace(case, **SMALL) for name, case in gradcache.CASES.items()})
    rows = run(tmp_path, "--cases", "text", "trainer", "--steps", "2")
    assert all(row["peak extra MiB"] == 3.0 for row in rows)
    assert [len(row["losses"]) for row in rows] == [1] * len(cases.PEERS) + [2] * 2


def test_a_step_that_cannot_fit_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gradcache, "_ram_bytes", lambda: 1.0)
    rows = {row["contender"]: row for row in run(tmp_path, "--quick", "--cases", "text")}
    assert rows["stock uncached"]["s"] == "out of memory"
    assert "not tried: its activations alone take" in rows["stock uncached"]["note"]
    assert rows["stock"]["s"] > 0


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_loss_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float):
    class Wrong(stock.CachedMultipleNegativesRankingLoss):
        def __init__(self, model: SentenceTransformer, activation_budget: int = 0, **options: Any) -> None:
            super().__init__(model, **options)

        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args) * factor

    wrong = types.ModuleType("wrong_losses")
    wrong.CachedMultipleNegativesRankingLoss = Wrong
    monkeypatch.setitem(sys.modules, wrong.__name__, wrong)
    monkeypatch.setattr(gradcache, "OURS", wrong.__name__)
    with pytest.raises(SystemExit, match="parity failed: text, trainer"):
        run(tmp_path, "--quick", "--cases", "text", "trainer")
    for row in rows_of(tmp_path):
        assert "not timed: the contenders differ by more than 0.001" in row["note"]
        assert "s" not in row


def test_the_floor_counts_what_a_forward_multiplies(bert: Callable[..., SentenceTransformer]):
    model = bert(torch.float32)
    texts = ["a " * 10] * 3
    transformer = model[0].model
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(model.preprocess(texts))
    pooler = 2 * len(texts) * 32 * 32 if transformer.pooler else 0
    length = 10 + 2
    tokens = gradcache.Tokens(first=36, second=0, real=3 * length, squares=3 * length**2)
    assert gradcache.flops(model, tokens) == 3 * (counted.get_total_flops() - pooler)
    tokens.second = tokens.first
    assert gradcache.flops(model, tokens) == 4 * (counted.get_total_flops() - pooler)


class Exponential(nn.Module):
    """Holds two vectors for backward, its input and its exponential, however often it uses the second."""

    max_seq_length = 96

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def preprocess(self, texts: list[str]) -> dict[str, Tensor]:
        return {"x": torch.ones(len(texts), len(texts[0].split()) + 2)}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        y = (features["x"] * self.weight).exp()
        return {"sentence_embedding": (y * y).sum()}


def test_a_tensor_that_is_saved_twice_is_held_once():
    # Lengths are rounded up to multiples of 32, but not above the longest.
    assert gradcache.activation_bytes(Exponential(), [1, 32, 33, 95]) == 2 * 4 * (32 + 32 + 64 + 96)


def test_no_pair_of_the_wanted_length_is_an_error(tmp_path: Path):
    with pytest.raises(SystemExit, match="no pair has 32 tokens on both sides"):
        run(tmp_path, "--quick", "--cases", "equal")


def test_fewer_than_one_step_is_an_error(tmp_path: Path):
    with pytest.raises(SystemExit, match="argument --steps: got 0, wanted at least 1"):
        run(tmp_path, "--steps", "0")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gradcache.requirements, "NEEDED", ("a_package_that_is_not_installed",))
    with pytest.raises(SystemExit, match="training needs a_package_that_is_not_installed: pip install"):
        run(tmp_path)
