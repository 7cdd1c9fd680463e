"""The demo's text pairs: the split, and the user's own files."""

from __future__ import annotations

from pathlib import Path

import datasets
import pandas
import pytest

from sbert_kernels.demo import data
from sbert_kernels.workloads.requirements import UserError

PAIRS = [(f"query {i}", f"text {i}") for i in range(200)]


def test_the_split_is_disjoint_complete_and_deterministic():
    split = data.split_pairs(PAIRS, seed=3, queries=10, distractors=20)
    assert (len(split.train), len(split.queries), len(split.distractors)) == (170, 10, 20)
    texts = [text for _, text in split.train + split.queries] + split.distractors
    assert sorted(texts) == sorted(text for _, text in PAIRS)
    assert split == data.split_pairs(PAIRS, seed=3, queries=10, distractors=20)
    assert split != data.split_pairs(PAIRS, seed=4, queries=10, distractors=20)


def test_the_split_of_few_pairs_leaves_most_to_train_on():
    split = data.split_pairs(PAIRS, seed=0, queries=1000, distractors=1000)
    assert (len(split.train), len(split.queries), len(split.distractors)) == (160, 20, 20)


FRAME = pandas.DataFrame(
    {"id": range(30), "question": [f"question {i}" for i in range(30)], "answer": [f"answer {i}" for i in range(30)]}
)


def write(frame: pandas.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_files_of_pairs(tmp_path: Path, ending: str):
    path = write(FRAME, tmp_path / f"pairs.{ending}")
    found = data.file_pairs(path, None)
    assert found.pairs == [(f"question {i}", f"answer {i}") for i in range(30)]
    assert data.file_pairs(path, ("answer", "question")).pairs[0] == ("answer 0", "question 0")


def test_empty_and_duplicate_rows_are_counted(tmp_path: Path):
    extra = pandas.DataFrame({"id": [1, 2], "question": [None, "question 0"], "answer": ["an answer", "another"]})
    found = data.file_pairs(write(pandas.concat([FRAME, extra]), tmp_path / "pairs.jsonl"), None)
    assert len(found.pairs) == 30
    assert found.left_out == {"empty": 1, "duplicate": 1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("question", "reply"), r"--columns: there is no column 'reply' in pairs.csv, which has \['id', 'question'"),
        (("id", "answer"), "--columns: column 'id' of pairs.csv does not hold text"),
    ],
)
def test_columns_that_cannot_serve(tmp_path: Path, columns: tuple[str, str], message: str):
    with pytest.raises(UserError, match=message):
        data.file_pairs(write(FRAME, tmp_path / "pairs.csv"), columns)


SCORED = FRAME.assign(score=[i / 10 for i in range(30)])


def test_scored_pairs(tmp_path: Path):
    columns = ("question", "answer", "score")
    extra = pandas.DataFrame(
        {
            "question": ["question 0", "question 0", "new", ""],
            "answer": ["answer 0", "answer 1", "text", "text"],
            "score": [0.5, 0.25, None, 1.0],
        }
    )
    found = data.file_pairs(write(pandas.concat([SCORED, extra]), tmp_path / "scored.csv"), columns)
    assert found.left_out == {"empty": 1, "without a score": 1, "duplicate": 1}
    # A text may come again with another one: here that is a pair of its own.
    assert found.pairs == [*((f"question {i}", f"answer {i}") for i in range(30)), ("question 0", "answer 1")]
    assert found.scores == [*(i / 10 for i in range(30)), 0.25]


def test_a_column_of_scores_holds_numbers(tmp_path: Path):
    path = write(SCORED.assign(score="high"), tmp_path / "words.csv")
    with pytest.raises(UserError, match=r"column 'score' of words\.csv does not hold numbers"):
        data.file_pairs(path, ("question", "answer", "score"))


def test_datasets_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(*arguments: str | None, split: str) -> datasets.Dataset:
        asked.append((*arguments, split))
        if "missing" in arguments[0]:
            raise ConnectionError("no network")
        return datasets.Dataset.from_pandas(FRAME)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.hub_pairs("some/pairs:train-me", None).pairs == data.hub_pairs("some/pairs", None).pairs
    assert asked == [("some/pairs", "train-me", "train"), ("some/pairs", None, "train")]
    with pytest.raises(UserError, match="--dataset: some/missing could not be loaded, which needs a network"):
        data.hub_pairs("some/missing", None)


def test_files_that_cannot_serve(tmp_path: Path):
    with pytest.raises(UserError, match="there is no file"):
        data.file_pairs(tmp_path / "missing.csv", None)
    with pytest.raises(UserError, match=r"pairs\.txt, wanted a file that ends in one of \.csv, \.jsonl, \.parquet"):
        data.file_pairs(tmp_path / "pairs.txt", None)
    (tmp_path / "broken.parquet").write_text("not a table")
    with pytest.raises(UserError, match=r"cannot be read as \.parquet"):
        data.file_pairs(tmp_path / "broken.parquet", None)
    with pytest.raises(
        UserError, match=r"two columns of text in one\.csv, found \['question'\] of \['id', 'question'\]"
    ):
        data.file_pairs(write(FRAME[["id", "question"]], tmp_path / "one.csv"), None)
    with pytest.raises(UserError, match="at least 20 text pairs, found 5"):
        data.file_pairs(write(FRAME[:5], tmp_path / "few.csv"), None)
