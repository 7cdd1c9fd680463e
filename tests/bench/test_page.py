"""The page of all results: it says what the files say, and every file says where it comes from."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from sbert_kernels.bench import page, picture, studies
from sbert_kernels.bench.results import read

CLONE = Path(__file__).resolve().parents[2]
RESULTS = CLONE / page.RESULTS
ROW = {"case": "mnr N=8192 D=384", "stock ms": 20.0, "ours ms": 25.0, "stock/ours": 0.8, "ours samples ms": [25.0]}
MACHINE = {"cpu": "A CPU", "cpu_capability": "AVX2", "threads": 2, "cores": 4, "ram_gib": 8.0, "torch": "2.9.0"}
CONTENT = {"title": "A title", "commit": "abc", "date": "2026-01-02", "machine": MACHINE, "rows": [ROW]}


def write(folder: Path, name: str, **changes: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(CONTENT | changes))


def test_the_page_says_what_the_results_say() -> None:
    """Where this fails: python -m sbert_kernels bench report."""
    written = (CLONE / page.PAGE).read_text(encoding="utf-8")
    assert written == page.render(read(RESULTS))
    assert (CLONE / "docs" / page.PICTURE).is_file()


def test_the_numbers_of_the_picture_are_among_the_results() -> None:
    results = read(RESULTS)
    for comparison in picture.COMPARISONS:
        for number in (*comparison.times, *comparison.memory):
            assert number.read(results) > 0
    missing = picture.Number("h200/gpu-memory", {"case": "N=1"}, "ours MiB")
    with pytest.raises(ValueError, match=r"h200/gpu-memory\.json: has no number 'ours MiB' in a row with .*N=1"):
        missing.read(results)


def test_a_commit_in_the_results_is_one_and_the_date_a_date() -> None:
    for result in read(RESULTS):
        assert result.commit is not None
        assert re.fullmatch(r"[0-9a-f]{12}", result.commit), result.name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", result.date), result.name


def test_a_row_that_ours_loses_is_shown_like_any_other(tmp_path: Path) -> None:
    write(tmp_path / "some-machine", "contrastive")
    write(tmp_path / "some-machine", "ranking", remark="a remark")
    write(tmp_path / "some-machine", "objective", commit=None, machine=MACHINE | {"sbert-kernels": "0.1.0"})
    text = page.render(read(tmp_path))
    assert "## some-machine\n\nA CPU (AVX2), 2 threads on 4 cores; 8.0 GiB RAM; torch 2.9.0.\n" in text
    assert "| case | stock ms | ours ms | stock / ours |\n" in text
    assert "| mnr N=8192 D=384 | 20 | 25 | 0.8 |\n" in text
    assert "`python -m sbert_kernels bench contrastive --large`" in text
    assert "*`some-machine/contrastive.json`, commit `abc`, 2026-01-02.*" in text
    assert "*`some-machine/objective.json`, version 0.1.0, 2026-01-02.*" in text
    assert "*`some-machine/ranking.json`, commit `abc`, 2026-01-02; a remark.*" in text


def test_the_limit_of_a_gpu_is_three_products_at_the_vendor_s_rate() -> None:
    row = {"case": "a", "N": 1000, "D": 100, "GEMM TFLOP/s": 2.0, "ours ms": 0.6}
    # 6 * 1000^2 * 100 operations at 2e12 a second.
    assert studies.shown(studies.STUDIES["gpu-contrastive"], row)["limit ms"] == pytest.approx(0.3)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "machine", "unknown")
    with pytest.raises(ValueError, match=r"unknown\.json: no study has this name, wanted one that begins with train"):
        read(tmp_path)
    (tmp_path / "machine" / "unknown.json").unlink()
    file = tmp_path / "machine" / "training.json"
    file.write_text(json.dumps({"title": "A title", "rows": []}))
    with pytest.raises(ValueError, match=r"training\.json: has no commit, date, machine"):
        read(tmp_path)


def run(*options: str) -> None:
    parser = argparse.ArgumentParser()
    page.add_arguments(parser)
    page.run(parser.parse_args(options))


def test_the_command_writes_page_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "site" / "numbers.md"
    run("--results", str(RESULTS), "--out", str(out))
    assert out.read_text(encoding="utf-8") == page.render(read(RESULTS))
    drawn = out.parent / page.PICTURE
    assert drawn.read_text(encoding="utf-8").startswith("<?xml")
    assert capsys.readouterr().out.splitlines() == [str(out), str(drawn)]


def test_outside_of_a_clone_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"argument --results: got .*benchmarks/results, wanted one that holds"):
        run()
