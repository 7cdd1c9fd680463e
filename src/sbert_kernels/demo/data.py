"""Where the demo's text pairs come from: the docstrings of the installed packages, a file, or the hub.

A docstring is a natural training pair, at hand on every machine: its first paragraph says in a line what the rest
describes. The sources are read with ``ast``; no package is imported for it.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import math
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from sbert_kernels.demo.options import DemoError

if TYPE_CHECKING:
    import pandas

Pair = tuple[str, str]  # (summary, body) or (query, text)
Row = tuple[str, str] | tuple[str, str, float]  # a pair, or a pair and its score

PACKAGES = (
    "numpy",
    "scipy",
    "torch",
    "sklearn",
    "transformers",
    "sentence_transformers",
    "pandas",
    "matplotlib",
    "networkx",
    "sympy",
    "datasets",
    "huggingface_hub",
)
TEST_FOLDERS = {"tests", "test", "testing"}
SUMMARY_CHARACTERS = 20  # fewer say too little to be found by
BODY_CHARACTERS = (40, 1000)  # fewer say too little; of a longer body the beginning is enough, and quicker to train on
FILES_PER_WORKER = 200  # below that, starting a process costs more than it saves
DOCTEST = re.compile(r"^\s*>>> ", re.MULTILINE)
LEAST_PAIRS = 20
HELD_OUT_SHARE = 0.2  # at most, for data too small for the numbers asked for


@dataclass(frozen=True)
class Pairs:
    """Text pairs without duplicates, where they came from, and what was left out on the way."""

    pairs: list[Pair]
    source: str
    counts: dict[str, int] = field(default_factory=dict)  # pairs by package
    left_out: dict[str, int] = field(default_factory=dict)  # by reason; zero counts included
    scores: list[float] | None = None  # one a pair, where the data has them


@dataclass(frozen=True)
class Split:
    """Disjoint parts of the pairs; the corpus of the evaluation is the bodies of ``queries`` and the distractors."""

    train: list[Row]
    queries: list[Row]
    distractors: list[str]


def split_pairs(pairs: Sequence[Row], seed: int, queries: int, distractors: int) -> Split:
    """Shuffle by ``seed`` and hold out up to so many pairs, never more than ``HELD_OUT_SHARE`` of them."""
    shuffled = list(pairs)
    random.Random(seed).shuffle(shuffled)
    held_out = min(queries + distractors, int(HELD_OUT_SHARE * len(shuffled)))
    queries = max(1, held_out * queries // (queries + distractors))
    return Split(
        train=shuffled[held_out:],
        queries=shuffled[:queries],
        distractors=[body for _, body, *_ in shuffled[queries:held_out]],
    )


# --- docstrings -------------------------------------------------------------------------------------------------------


def docstring_pairs(packages: Iterable[str] = PACKAGES) -> Pairs:
    """The (summary, body) pairs in the docstrings of those packages that are installed, in a fixed order."""
    package_of = {path: package for package in packages for path in _sources(package)}
    pairs: dict[str, str] = {}  # body by summary
    bodies: set[str] = set()
    counts: Counter[str] = Counter()
    left_out = {"files that do not parse": 0, "too short": 0, "duplicate": 0}
    for package, docstrings in zip(package_of.values(), _read_all(list(package_of)), strict=True):
        if docstrings is None:
            left_out["files that do not parse"] += 1
            continue
        for docstring in docstrings:
            pair = as_pair(docstring)
            if pair is None:
                left_out["too short"] += 1
            elif pair[0] in pairs or pair[1] in bodies:
                left_out["duplicate"] += 1
            else:
                pairs[pair[0]] = pair[1]
                bodies.add(pair[1])
                counts[package] += 1
    return _enough(Pairs(list(pairs.items()), "docstrings of installed packages", dict(counts.most_common()), left_out))


def as_pair(docstring: str) -> Pair | None:
    """Split a docstring into its first paragraph, on one line, and the rest; None where either says too little.

    Doctests are left out: they are code, and a body of nothing else has no text to find.
    """
    summary, *paragraphs = docstring.strip().split("\n\n")
    summary = " ".join(summary.split())
    body = "\n\n".join(p.strip() for p in paragraphs if p.strip() and not DOCTEST.search(p))
    shortest, longest = BODY_CHARACTERS
    if len(summary) < SUMMARY_CHARACTERS or len(body) < shortest:
        return None
    return summary, body[:longest]


def read_docstrings(path: Path) -> list[str] | None:
    """The docstrings of a file's module, classes and functions; None if it does not parse."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []  # a docstring of several paragraphs needs one of them; parsing is what takes the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escape sequences in the code of others
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    return list(_docstrings(tree))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield inspect.cleandoc(docstring)
        # A definition stands in a statement, never in an expression: most of the tree need not be visited.
        stack.extend(
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case)
        )


def _sources(package: str) -> list[Path]:
    """The package's source files without its tests; none where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(spec.submodule_search_locations[0])
    return sorted(path for path in root.rglob("*.py") if not TEST_FOLDERS.intersection(path.relative_to(root).parts))


def _read_all(paths: list[Path]) -> Iterable[list[str] | None]:
    workers = min(os.cpu_count() or 1, len(paths) // FILES_PER_WORKER)
    if workers < 2:
        return map(read_docstrings, paths)
    # Without the garbage collector, which visits every node of every tree, parsing takes a third less.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=gc.disable) as pool:
        return list(pool.map(read_docstrings, paths, chunksize=50))


# --- the user's own data ----------------------------------------------------------------------------------------------


def file_pairs(path: Path, columns: tuple[str, ...] | None) -> Pairs:
    """The text pairs in a .csv, .jsonl or .parquet file."""
    import pandas

    readers = {
        ".csv": pandas.read_csv,
        ".jsonl": lambda file: pandas.read_json(file, lines=True, dtype=False),
        ".parquet": pandas.read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise DemoError(f"argument --data: got {path}, wanted a file that ends in one of {', '.join(readers)}")
    if not path.is_file():
        raise DemoError(f"argument --data: there is no file {path}")
    try:
        frame = readers[path.suffix.lower()](path)
    except (ValueError, OSError) as error:  # ValueError is the base of the parser errors of all three
        raise DemoError(f"argument --data: {path} cannot be read as {path.suffix.lower()}: {error}") from error
    return _frame_pairs(frame, columns, f"{path.name}", "--data")


def hub_pairs(dataset: str, columns: tuple[str, ...] | None) -> Pairs:
    """The text pairs in the train split of a dataset of the Hugging Face hub, named ID or ID:CONFIG."""
    from datasets import load_dataset

    name, _, config = dataset.partition(":")
    try:
        frame = load_dataset(name, config or None, split="train").to_pandas()
    except Exception as error:  # the hub client raises many kinds, and each says what it was about
        raise DemoError(
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
            raise DemoError(f"argument {argument}: wanted two columns of text in {source}, found {texts} of {names}")
        columns = (texts[0], texts[1])
    for name in columns:
        if name not in names:
            raise DemoError(f"argument --columns: there is no column {name!r} in {source}, which has {names}")
    for name, holds, what in zip(columns, (_is_text, _is_text, _is_number), ("text", "text", "numbers"), strict=False):
        if not holds(frame[name]):
            raise DemoError(f"argument --columns: column {name!r} of {source} does not hold {what}")
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
    return _enough(Pairs(list(pairs.items()), f"{source}, columns {columns[0]} and {columns[1]}", left_out=left_out))


def _scored_pairs(frame: pandas.DataFrame, source: str) -> Pairs:
    """A text may come in many pairs here: what sets two of them apart is their score."""
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
    return _enough(Pairs(list(scores), source, left_out=left_out, scores=list(scores.values())))


def _is_empty(value: object) -> bool:
    return not (isinstance(value, str) and value.strip())


def _is_number(column: pandas.Series) -> bool:
    return column.dtype.kind in "biuf"


def _is_text(column: pandas.Series) -> bool:
    values = column.dropna()
    return len(values) > 0 and all(isinstance(value, str) for value in values)


def _enough(found: Pairs) -> Pairs:
    if len(found.pairs) < LEAST_PAIRS:
        raise DemoError(
            f"wanted at least {LEAST_PAIRS} text pairs, found {len(found.pairs)} in {found.source}; "
            f"left out: {found.left_out}"
        )
    return found
