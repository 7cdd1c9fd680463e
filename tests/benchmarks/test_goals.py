"""The project's goals: which of them the reports of a run meet."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import goals


def central(**values: Any) -> dict[str, Any]:
    row = {
        "case": "N=65536 D=768 bfloat16",
        "N": 65536,
        "D": 768,
        "dtype": "bfloat16",
        "ours ms": 10.0,
        "eager ms": 30.0,
    }
    return row | {"eager/ours": 3.0, "% of GEMM": 61.0, "inf-cl ms": 40.0, "compiled ms": 20.0} | values


def words(rows: dict[str, list[dict[str, Any]]], card: str = "NVIDIA H100 80GB HBM3") -> dict[str, str]:
    return {verdict.goal: verdict.word for verdict in goals.verdicts(rows, card)}


def test_goals_that_are_met_missed_and_not_measured() -> None:
    where = "N=65536 D=768 bfloat16"
    memory = {"N": 65536, "ours MiB": 1536.0}
    assert words({"contrastive": [central()], "memory": [memory]}) == {
        f"{where}: 2.5 times as fast as eager": "pass",
        f"{where}: 60% of the GEMM rate": "pass",
        f"{where}: at most 1536 MiB extra": "pass",
        f"{where}: at most 31 ms": "pass",
        "N=262144 D=768 bfloat16: at most 500 ms": "not measured",
        "N=1024 D=768 bfloat16: at most 0.25 ms": "not measured",
        "N=65536 D=384 bfloat16: at most 17 ms": "not measured",
        f"{where}, 2 directions: at most 45 ms": "not measured",
        "N=16384 D=768 float32 highest: at most 30 ms": "not measured",
        "faster than compiled at every N >= 4096": "pass",
        "faster than liger-kernel at every N >= 4096": "not measured",
        "faster than cut-cross-entropy at every N >= 4096": "not measured",
        "faster than torch at every N >= 4096": "not measured",
        "faster than memeff at every N >= 4096": "not measured",
        "faster than quack at every N >= 4096": "not measured",
        "faster than inf-cl at every N >= 4096": "pass",
        "N=262144 runs": "not measured",
        "never slower than eager at N >= 1024": "pass",
    }
    slow = central(**{"ours ms": 37.0, "eager/ours": 30 / 37, "% of GEMM": 17.0})
    found = words({"contrastive": [slow], "memory": [memory | {"ours MiB": 1537.0}]})
    assert [goal for goal, word in found.items() if word == "pass"] == ["faster than inf-cl at every N >= 4096"]
    assert list(found.values()).count("FAIL") == 6
    assert where not in " ".join(words({"contrastive": [central()]}, "NVIDIA A100"))


def test_ours_out_of_memory_meets_no_goal_and_no_time_for_it_misses_none() -> None:
    broken = central(**{"ours ms": "out of memory", "eager/ours": math.nan, "% of GEMM": math.nan, "note": "broken"})
    assert set(words({"contrastive": [broken]}).values()) == {"FAIL", "not measured"}
    assert words({"contrastive": [broken]})["never slower than eager at N >= 1024"] == "FAIL"
    skipped = central(**{"ours ms": "not run: some 9.0 s a call", "eager/ours": math.nan, "% of GEMM": math.nan})
    assert set(words({"contrastive": [skipped, skipped | {"N": 262144}]}).values()) == {"not measured"}


def test_one_slower_loss_is_named() -> None:
    losses = [{"case": "CoSENT", "N": 1024, "ours ms": 2.0, "eager ms": 1.0}]
    found = goals.verdicts({"contrastive": [central()], "losses": losses}, "NVIDIA H200")
    verdict = next(verdict for verdict in found if verdict.goal.startswith("never slower"))
    assert not verdict.met
    assert verdict.found == "at least 0.5 times, in 2 cases; the least at CoSENT"


def test_choices_of_the_slower_way_are_listed_with_the_ratio() -> None:
    rows = [
        {"case": "a", "faster": "weigh", "ours/faster": 1.5},
        {"case": "b", "faster": "weigh", "ours/faster": 1.01},
        {"case": "c", "faster": "sweep", "ours/faster": None},
        {"case": "d", "note": "broken"},
    ]
    assert goals.wrong_choices(rows) == ["a: weigh is 1.50 times as fast"]


def test_a_loss_that_broke_misses_the_goal_that_it_runs() -> None:
    row = {"case": "N=262144 D=768 bfloat16", "N": 262144, "D": 768, "dtype": "bfloat16"}
    row |= {"ours ms": "RuntimeError: an illegal memory access", "note": "RuntimeError: an illegal memory access"}
    found = {verdict.goal: verdict for verdict in goals.verdicts({"contrastive": [row]}, "NVIDIA L4")}
    assert found["N=262144 runs"].met is False


def test_the_command_reads_the_reports_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["goals", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"argument folder: .* wanted one with files such as gpu-contrastive\.json"):
        goals.main()
    weights = {"case": "a", "faster": "weigh", "ours/faster": 1.5}
    for kind, row in {"contrastive": central(), "weights": weights}.items():
        report = {"machine": {"gpu": "NVIDIA H200"}, "rows": [row]}
        (tmp_path / f"gpu-{kind}.json").write_text(json.dumps(report))
    goals.main()
    printed = capsys.readouterr().out
    assert "pass: N=65536 D=768 bfloat16: 2.5 times as fast as eager (3)" in printed
    assert "not measured: N=262144 runs (-)" in printed
    assert "the slower way of making the weights was chosen: a: weigh is 1.50 times as fast" in printed
