"""Text pairs out of the docstrings of the installed packages.

A docstring is a natural training pair, at hand on every machine: its first paragraph says in a line what the rest
describes. The sources are read with ``ast``; no package is imported for it.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from sbert_kernels.workloads.requirements import UserError

Pair = tuple[str, str]  # (summary, body) or (query, text)
ScoredPair = tuple[str, str, float]
Row = Pair | ScoredPair  # as the Trainer takes them

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


@dataclass(frozen=True)
class Pairs:
    """Holds text pairs without duplicates, where they came from, and what was left out on the way."""

    pairs: list[Pair]
    source: str
    counts: dict[str, int] = field(default_factory=dict)  # pairs by package
    left_out: dict[str, int] = field(default_factory=dict)  # by reason; zero counts included
    scores: list[float] | None = None  # one a pair, where the data has them


def docstring_pairs(packages: Iterable[str] = PACKAGES) -> Pairs:
    """Returns the (summary, body) pairs in the docstrings of those packages that are installed, in a fixed order."""
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
    return enough(Pairs(list(pairs.items()), "docstrings of installed packages", dict(counts.most_common()), left_out))


def as_pair(docstring: str) -> Pair | None:
    """Returns the first paragraph of a docstring, on one line, and the rest; None where either says too little.

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
    """Returns the docstrings of a file's module, classes and functions; None if it does not parse."""
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
    """Returns the package's source files without its tests; none where it is not installed."""
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


def enough(found: Pairs) -> Pairs:
    """Returns the pairs, or raises UserError if there are fewer than ``LEAST_PAIRS``."""
    if len(found.pairs) < LEAST_PAIRS:
        raise UserError(
            f"wanted at least {LEAST_PAIRS} text pairs, found {len(found.pairs)} in {found.source}; "
            f"left out: {found.left_out}"
        )
    return found
