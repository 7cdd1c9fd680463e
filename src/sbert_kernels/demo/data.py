"""What the demo does with text pairs: it reads a user's own, and holds some of them out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from sbert_kernels.workloads.requirements import UserError
from sbert_kernels.workloads.texts import Pair, Pairs, ScoredPair, enough

if TYPE_CHECKING:
    import pandas

HELD_OUT_SHARE = 0.2  # at most, for data too small for the numbers asked for


AnyRow = TypeVar("AnyRow", Pair, ScoredPair)


@dataclass(frozen=True)
class Split(Generic[AnyRow]):
    """Holds disjoint parts of the pairs; the evaluation searches the texts of ``queries`` and the distractors."""

    train: list[AnyRow]
    queries: list[AnyRow]
    distractors: list[str]


def split_pairs(pairs: Sequence[AnyRow], seed: int, queries: int, distractors: int) -> Split[AnyRow]:
    """Shuffles by ``seed`` and holds so many pairs out, but never more than ``HELD_OUT_SHARE`` of them."""
    shuffled = list(pairs)
    random.Random(seed).shuffle(shuffled)
    held_out = min(queries + distractors, int(HELD_OUT_SHARE * len(shuffled)))
    queries = max(1, held_out * queries // (queries + distractors))
    return Split(
        train=shuffled[held_out:],
        queries=shuffled[:queries],
        distractors=[row[1] for row in shuffled[queries:held_out]],
    )


# --- the user's own data ----------------------------------------------------------------------------------------------


def file_pairs(path: Path, columns: tuple[str, ...] | None) -> Pairs:
    """Returns the text pairs in a .csv, .jsonl or .parquet file."""
    import pandas

    readers = {
        ".csv": pandas.read_csv,
        ".jsonl": lambda file: pandas.read_json(file, lines=True, dtype=False),
        ".parquet": pandas.read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"argument --data: got {path}, wanted a file that ends in one of {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"argument --data: there is no file {path}")
    try:
        frame = readers[path.suffix.lower()](path)
    except (ValueError, OSError) as error:  # ValueError is the base of the parser errors of all three
        raise UserError(f"argument --data: {path} cannot be read as {path.suffix.lower()}: {error}") from error
    return _frame_pairs(frame, columns, f"{path.name}", "--data")


def hub_pairs(dataset: str, columns: tuple[str, ...] | None) -> Pairs:
    """Returns the text pairs in the train split of a dataset of the Hugging Face hub, named ID or ID:CONFIG."""
    from datasets import load_dataset

    name, _, config = dataset.partition(":")
    try:
        frame = load_dataset(name, config or None, split="train").to_pandas()
    except Exception as error:  # the hub client raises many kinds, and each says what it was about
        raise UserError(
            f"argument --dataset: {dataset} could not be loaded, which needs a network and an existing dataset with a "
            f"train split: {type(error).__name__}: {error}"
        ) from error
    return _frame_pairs(frame, columns, dataset, "--dataset")


def _frame_pairs(frame: pandas.DataFrame, columns: tuple[str, ...] | None, source: str, argument: str) -> Pairs:
    names = [str(name) for name in frame.columns]
    frame.columns = names
    if columns is None:
        texts = [name for name in names if _is_text(frame[name])]
        if len(texts) < 2:
            raise UserError(f"argument {argument}: wanted two columns of text in {source}, found {texts} of {names}")
        columns = (texts[0], texts[1])
    for name in columns:
        if name not in names:
            raise UserError(f"argument --columns: there is no column {name!r} in {source}, which has {names}")
    for name, holds, what in zip(columns, (_is_text, _is_text, _is_number), ("text", "text", "numbers"), strict=False):
        if not holds(frame[name]):
            raise UserError(f"argument --columns: column {name!r} of {source} does not hold {what}")
    if len(columns) > 2:
        return _scored_pairs(frame[list(columns)], source)
    pairs: dict[str, str] = {}
    bodies: set[str] = set()
    left_out = {"empty": 0, "duplicate": 0}
    for query, text in frame[list(columns)].itertuples(index=False):
        if _is_empty(query) or _is_empty(text):
            left_out["empty"] += 1
        elif query in pairs or text in bodies:
            left_out["duplicate"] += 1  # as an in-batch negative it would be a false one
        else:
            pairs[query] = text
            bodies.add(text)
    return enough(Pairs(list(pairs.items()), f"{source}, columns {columns[0]} and {columns[1]}", left_out=left_out))


def _scored_pairs(frame: pandas.DataFrame, source: str) -> Pairs:
    """Returns pairs with their scores. A text may come in many of them here: what sets two apart is their score."""
    scores: dict[Pair, float] = {}
    left_out = {"empty": 0, "without a score": 0, "duplicate": 0}
    for query, text, score in frame.itertuples(index=False):
        if _is_empty(query) or _is_empty(text):
            left_out["empty"] += 1
        elif not math.isfinite(score):
            left_out["without a score"] += 1
        elif (query, text) in scores:
            left_out["duplicate"] += 1
        else:
            scores[query, text] = float(score)
    source += ", columns {}, {} and {}".format(*frame.columns)
    return enough(Pairs(list(scores), source, left_out=left_out, scores=list(scores.values())))


def _is_empty(value: object) -> bool:
    return not (isinstance(value, str) and value.strip())


def _is_number(column: pandas.Series) -> bool:
    return column.dtype.kind in "biuf"


def _is_text(column: pandas.Series) -> bool:
    values = column.dropna()
    return len(values) > 0 and all(isinstance(value, str) for value in values)
