"""Every script in examples/ runs to its end in smoke mode, says what it promises, and stands in the list."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sbert_kernels

EXAMPLES = Path(__file__).parents[1] / "examples"

# What the last line of each script's output must look like.
LAST_LINE = {
    "angle_graded_pairs": r"\{'cosine': \d.*'in_batch': \d.*'angle': \d.*\}",
    "cached_large_batch": r"loss of each step: \[\d+\.\d+, \d+\.\d+\]",
    "gist": r"loss of the last step: \d+\.\d+",
    "hard_negatives": r"columns: \['anchor', 'positive', 'negative'\] loss of the last step: \d+\.\d+",
    "learnable_temperature": r"the scale went from 20 to (19\.[1-9]\d|20\.[1-9]\d)",
    "matryoshka": r"  32 dimensions: \d+% of the anchors find their positive first",
    "own_training_loop": r"step 1: loss \d+\.\d+, scale 1\d\.\d\d",
    "patch_a_stock_script": r"the loss is the fused one: True",
    "two_processes": r"2 processes, 8 rows each, 16 candidates a row",
    "weighted_loss": r"\{'loss': \d.*'ranking': \d.*'spread': \d.*\}",
}


@pytest.fixture
def as_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts the examples' folder on the path, as Python does for a script, and undoes what a script leaves behind."""
    monkeypatch.setenv("EXAMPLES_SMOKE", "1")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    sbert_kernels.unpatch()
    sys.modules.pop("common", None)


def last_line(output: str) -> str:
    return output.rstrip().splitlines()[-1]


@pytest.mark.parametrize("name", sorted(LAST_LINE.keys() - {"two_processes"}))
def test_runs(name: str, as_a_script: None, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.fullmatch(LAST_LINE[name], last_line(capsys.readouterr().out))


def test_runs_in_two_processes() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "two_processes.py"],
        cwd=EXAMPLES,
        env={**os.environ, "EXAMPLES_SMOKE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(LAST_LINE["two_processes"], last_line(result.stdout))


def test_the_list_names_every_script() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"common"}
    assert scripts == LAST_LINE.keys()
    assert set(re.findall(r"\((\w+)\.py\)", (EXAMPLES / "README.md").read_text())) == scripts
