"""The demo's options, and one tiny run from end to end."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sbert_kernels import demo, machine
from sbert_kernels.demo.options import DEFAULTS, MODELS, Options
from sbert_kernels.workloads import requirements
from sbert_kernels.workloads.recipes import STATIC_DIM
from sbert_kernels.workloads.requirements import UserError


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", list(DEFAULTS))
def test_defaults_follow_the_loss_and_the_model(loss: str, model: str):
    scores = ["--data", "scored.csv", "--columns", "a,b,score"] if loss == "angle" else []
    options = Options.from_arguments(parse("--loss", loss, "--model", model, *scores))
    defaults = DEFAULTS[loss][model]
    assert (options.batch_size, options.steps, options.lr) == (defaults.batch_size, defaults.steps, defaults.lr)
    assert options.dim == (STATIC_DIM if model == "static" else None)


def test_epochs_replace_steps():
    options = Options.from_arguments(parse("--epochs", "2.5", "--batch-size", "10"))
    assert options.steps is None
    assert options.training_steps(109) == 25


@pytest.mark.parametrize(
    ("arguments", "dim", "dims"),
    [
        (["--loss", "mnr"], 384, ()),
        (["--loss", "angle"], 384, ()),
        ([], 512, (512, 256, 128, 64, 32)),
        ([], 384, (384, 256, 128, 64, 32)),
        (["--loss", "matryoshka"], 768, (768, 512, 256, 128, 64, 32)),
        ([], 16, (16,)),
        (["--matryoshka-dims", "32, 64"], 64, (64, 32)),
        (["--loss", "angle", "--matryoshka-dims", "32,64"], 64, (64, 32)),
    ],
)
def test_matryoshka_dimensions_follow_the_model(arguments: list[str], dim: int, dims: tuple[int, ...]):
    assert Options.from_arguments(parse(*arguments)).trained_dims(dim) == dims


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "1"], "argument --batch-size: got '1', wanted a whole number of at least 2"),
        (["--compare-steps", "two"], "argument --compare-steps: got 'two', wanted a whole number of at least 2"),
        (["--lr", "0"], "argument --lr: got '0', wanted a number above 0"),
        (["--lr", "nan"], "argument --lr: got 'nan', wanted a number above 0"),
        (["--epochs", "inf"], "argument --epochs: got 'inf', wanted a number above 0"),
        (["--matryoshka-dims", "8,0"], "argument --matryoshka-dims: got '8,0', wanted different whole numbers above 0"),
        (["--matryoshka-dims", "8,8"], "argument --matryoshka-dims: got '8,8', wanted different whole numbers above 0"),
        (["--columns", "text"], "argument --columns: got 'text', wanted two or three different column names"),
        (["--model", "large"], "argument --model: invalid choice: 'large'"),
        (["--steps", "1", "--epochs", "1"], "argument --epochs: not allowed with argument --steps"),
    ],
)
def test_a_bad_value_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    with pytest.raises(SystemExit) as exit_info:
        parse(*arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "minilm", "--dim", "8"], "--dim: got 8 with --model minilm"),
        (["--columns", "a,b"], "--columns: got a,b, but neither --data nor --dataset is given"),
        (["--loss", "mnr", "--matryoshka-dims", "8,4"], "--matryoshka-dims: got 8,4 with --loss mnr, .* --loss matryo"),
        (["--data", "x.csv", "--columns", "a,b,c"], "--columns: got a,b,c with --loss matryoshka, but only angle"),
        (
            ["--loss", "angle", "--model", "minilm"],
            "--model: got minilm with --loss angle, .* scores of your",
        ),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str):
    with pytest.raises(UserError, match=message):
        Options.from_arguments(parse(*arguments))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.csv"
    rows = [f"what is the number {i},the number {i} comes after {i - 1}" for i in range(300)]
    path.write_text("\n".join(["question,answer", *rows]))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "500"], "--batch-size: got 500, wanted at most the 240 pairs that pairs.csv"),
        (
            ["--batch-size", "64", "--dim", "16", "--matryoshka-dims", "8,32"],
            "--matryoshka-dims: got 32, wanted at most the model's 16",
        ),
        (["--output", __file__], r"--output: .*test_demo\.py is a file, wanted a folder"),
    ],
)
def test_mistakes_end_the_run_without_a_traceback(
    capsys: pytest.CaptureFixture[str], pairs: Path, arguments: list[str], message: str
):
    assert demo.run(parse("--data", str(pairs), *arguments)) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: argument {message}", error)
    assert error.count("\n") == 1


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requirements, "NEEDED", ("tqdm", "a_package_that_is_not_installed"))
    assert demo.run(parse()) == 2
    message = 'training needs a_package_that_is_not_installed: pip install "sbert-kernels[demo]"'
    assert message in capsys.readouterr().err


def test_a_run_from_end_to_end(capsys: pytest.CaptureFixture[str], pairs: Path, tmp_path: Path):
    sizes = ["--dim", "16", "--batch-size", "64", "--steps", "3", "--compare-steps", "2"]
    output = tmp_path / "output"
    assert demo.run(parse("--loss", "mnr", "--data", str(pairs), "--output", str(output), *sizes)) == 0

    printed = capsys.readouterr().out
    assert all(
        text in printed
        for text in (
            "300 pairs from pairs.csv",
            "step time, median",
            "tokenize",
            "loss backward",
            "mrr@10",
            str(output),
        )
    )

    results = json.loads((output / "results.json").read_text())
    stock, ours = results["comparison"]["stock"], results["comparison"]["sbert-kernels"]
    assert len(stock["recording"]["losses"]) == len(ours["recording"]["losses"]) == 2
    assert ours["recording"]["losses"] == pytest.approx(stock["recording"]["losses"], rel=1e-4)
    assert results["comparison"]["largest_relative_loss_difference"] < 1e-3
    assert len(results["training"]["losses"]) == 3
    assert results["training"]["losses"][-1] < results["training"]["losses"][0]
    assert sum(ours["median_step"].values()) == pytest.approx(ours["median_step_seconds"])
    assert set(results["before"]) == set(results["after"]) == {"mrr@10", "recall@1", "recall@10"}

    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")

    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(output / "model"), device="cpu")
    assert model.encode(["what is the number 7"]).shape == (1, 16)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison without processes of its own, which take seconds to start."""

    def without_a_process(target: Callable[..., Any], *args: object) -> machine.ProcessResult:
        return machine.ProcessResult(target(*args)(), peak_extra_bytes=0)

    monkeypatch.setattr(machine, "run_in_process", without_a_process)


@pytest.mark.usefixtures("in_this_process")
def test_a_matryoshka_run(capsys: pytest.CaptureFixture[str], pairs: Path, tmp_path: Path):
    sizes = ["--dim", "16", "--matryoshka-dims", "16,4", "--batch-size", "64", "--steps", "3", "--compare-steps", "2"]
    assert demo.run(parse("--data", str(pairs), "--output", str(tmp_path), *sizes)) == 0

    printed, errors = capsys.readouterr()
    assert "MatryoshkaLoss at 16, 4 dimensions" in printed
    assert "training: 100%" in errors
    assert "widget" not in errors  # a bar of the Trainer's own
    assert re.search(r"^mrr@10, 4 dims +0\.\d+ +0\.\d+$", printed, re.MULTILINE)

    results = json.loads((tmp_path / "results.json").read_text())
    stock, ours = (results["comparison"][name]["recording"]["losses"] for name in ("stock", "sbert-kernels"))
    assert ours == pytest.approx(stock, rel=1e-4)
    assert set(results["after"]) == {"mrr@10", "recall@1", "recall@10", "mrr@10, 4 dims"}
    assert results["after"]["mrr@10, 4 dims"] != results["after"]["mrr@10"]


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    path = tmp_path / "scored.csv"
    rows = [f"the number {i % 60},a number of {i % 60 if i % 3 else i % 7},{5 if i % 3 else i % 5}" for i in range(300)]
    path.write_text("\n".join(["first,second,score", *rows]))
    return path


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("matryoshka", [[], ["--matryoshka-dims", "16,4"]])
def test_a_run_on_scores_of_the_user(
    capsys: pytest.CaptureFixture[str], scored: Path, tmp_path: Path, matryoshka: list[str]
):
    sizes = ["--dim", "16", "--batch-size", "32", "--steps", "4", "--compare-steps", "2", *matryoshka]
    source = ["--data", str(scored), "--columns", "first,second,score"]
    assert demo.run(parse("--loss", "angle", *source, "--output", str(tmp_path), *sizes)) == 0

    printed = capsys.readouterr().out
    assert "scores from 0 to 5, stretched to 0 to 1" in printed
    assert re.search(r"^spearman +-?0\.\d+ +-?0\.\d+$", printed, re.MULTILINE)
    assert re.search(r"^  in_batch +\d+\.\d+ +\d+\.\d+$", printed, re.MULTILINE)

    results = json.loads((tmp_path / "results.json").read_text())
    stock, ours = (results["comparison"][name]["recording"] for name in ("stock", "sbert-kernels"))
    # float32: three encodings and other orders of summation, then a step of training on it.
    assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-4)
    for theirs, own in zip(stock["terms"], ours["terms"], strict=True):
        assert own == pytest.approx(theirs, rel=1e-4)
    last = results["training"]["terms"][-1]
    assert set(last) == {"cosine", "in_batch", "angle"}
    assert sum(last.values()) == pytest.approx(results["training"]["losses"][-1], rel=1e-5)
    metrics = {"spearman", "pearson"} | ({"spearman, 4 dims"} if matryoshka else set())
    assert set(results["before"]) == set(results["after"]) == metrics
    assert results["data"]["range"] == [0, 5]
