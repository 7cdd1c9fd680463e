"""The project's targets: which of them the reports of a run meet."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import targets


def central(**values: Any) -> dict[str, Any]:
    row = {"case": "main", "N": 65536, "D": 768, "dtype": "bfloat16", "ours ms": 10.0, "eager ms": 30.0}
    return row | {"eager/ours": 3.0, "% of GEMM": 61.0, "inf-cl ms": 40.0, "compiled ms": 20.0} | values


def words(rows: dict[str, list[dict[str, Any]]], card: str = "NVIDIA H100 80GB HBM3") -> dict[str, str]:
    return {verdict.target: verdict.word for verdict in targets.verdicts(rows, card)}


def test_targets_that_are_met_missed_and_not_measured() -> None:
    where = "N=65536 D=768 bfloat16"
    memory = {"N": 65536, "ours MiB": 1536.0}
    assert words({"contrastive": [central()], "memory": [memory]}) == {
        f"{where}: 2.5 times as fast as eager": "pass",
        f"{where}: 60% of the GEMM rate": "pass",
        f"{where}: at most 1536 MiB extra": "pass",
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
    slow = central(**{"ours ms": 35.0, "eager/ours": 30 / 35, "% of GEMM": 17.0})
    found = words({"contrastive": [slow], "memory": [memory | {"ours MiB": 1537.0}]})
    assert [target for target, word in found.items() if word == "pass"] == ["faster than inf-cl at every N >= 4096"]
    assert list(found.values()).count("FAIL") == 5
    assert where not in " ".join(words({"contrastive": [central()]}, "NVIDIA A100"))


def test_ours_out_of_memory_meets_no_target_and_no_time_for_it_misses_none() -> None:
    broken = central(**{"ours ms": "out of memory", "eager/ours": math.nan, "% of GEMM": math.nan, "note": "tiled"})
    assert set(words({"contrastive": [broken]}).values()) == {"FAIL", "not measured"}
    assert words({"contrastive": [broken]})["never slower than eager at N >= 1024"] == "FAIL"
    skipped = central(**{"ours ms": "not run: some 9.0 s a call", "eager/ours": math.nan, "% of GEMM": math.nan})
    assert set(words({"contrastive": [skipped, skipped | {"N": 262144}]}).values()) == {"not measured"}


def test_one_slower_loss_is_named() -> None:
    losses = [{"case": "CoSENT", "N": 1024, "ours ms": 2.0, "eager ms": 1.0}]
    found = targets.verdicts({"contrastive": [central()], "losses": losses}, "NVIDIA H200")
    verdict = next(verdict for verdict in found if verdict.target.startswith("never slower"))
    assert not verdict.met
    assert verdict.found == "at least 0.5 times, in 2 cases; the least at CoSENT"


def test_choices_of_the_slower_strategy_are_listed_with_the_ratio() -> None:
    rows = [
        {"case": "a", "chosen": "tiled", "faster": "chunked", "chosen/faster": 1.5},
        {"case": "b", "chosen": "tiled", "faster": "chunked", "chosen/faster": 1.01},
        {"case": "c", "chosen": "tiled", "faster": "tiled", "chosen/faster": math.nan},
        {"case": "d", "note": "broken"},
    ]
    assert targets.wrong_choices(rows) == ["a: took tiled, chunked is 1.50 times as fast"]


def test_a_loss_that_broke_misses_the_target_that_it_runs() -> None:
    row = {"case": "N=262144 D=768 bfloat16", "N": 262144, "D": 768, "dtype": "bfloat16"}
    row |= {"ours ms": "RuntimeError: an illegal memory access", "note": "RuntimeError: an illegal memory access"}
    found = {verdict.target: verdict for verdict in targets.verdicts({"contrastive": [row]}, "NVIDIA L4")}
    assert found["N=262144 runs"].met is False


def test_the_command_reads_the_reports_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["targets", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"argument folder: .* wanted one with files such as gpu-contrastive\.json"):
        targets.main()
    rows = [central(chosen="tiled", faster="chunked", **{"chosen/faster": 1.5})]
    (tmp_path / "gpu-contrastive.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA H200"}, "rows": rows}))
    targets.main()
    printed = capsys.readouterr().out
    assert "pass: N=65536 D=768 bfloat16: 2.5 times as fast as eager (3)" in printed
    assert "not measured: N=262144 runs (-)" in printed
    assert "the cost model took the slower strategy: main: took tiled, chunked is 1.50 times as fast" in printed
