"""Only _stock.py reaches for what sentence-transformers does not document, and all that it lists is there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import sbert_kernels
from sbert_kernels import _stock

SOURCES = Path(sbert_kernels.__file__).parent
# versions.py asks for the version, before anything else is imported.
DOOR = {"_stock.py", "versions.py"}


def imports_of(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields (module, name) of each import from sentence-transformers; the name is "" for a whole module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if is_stock_s(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and is_stock_s(node.module or ""):
            yield from ((node.module or "", alias.name) for alias in node.names)


def is_stock_s(module: str) -> bool:
    return module.split(".")[0] == "sentence_transformers"


def is_exported(module: str, name: str) -> bool:
    """True for a name of a package's ``__all__``, and for a package of losses, modules, ... as a whole."""
    if any(part.startswith("_") for part in [*module.split("."), name]):
        return False
    package = import_module(module)
    if not hasattr(package, "__path__"):
        return False
    return name in package.__all__ or hasattr(getattr(package, name), "__path__")


def private_uses(source: str) -> list[str]:
    """What a module imports from sentence-transformers that is not exported, and what it asks its version for."""
    tree = ast.parse(source)
    found = [f"{module}: {name}" for module, name in imports_of(tree) if not name or not is_exported(module, name)]
    private = {name for entry in _stock.NAMES if (name := entry.name.rpartition(".")[2]).startswith("_")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in private:
            found.append(f"attribute {node.attr}")
        if isinstance(node, ast.Call) and ast.unparse(node).endswith("version('sentence-transformers')"):
            found.append("the version")
    return found


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: path.relative_to(SOURCES).as_posix())
def test_nothing_else_reaches_for_private_names(path: Path) -> None:
    found = private_uses(path.read_text(encoding="utf-8"))
    assert bool(found) == (path.relative_to(SOURCES).as_posix() in DOOR), found


@pytest.mark.parametrize(
    "line",
    [
        "from sentence_transformers.sentence_transformer.losses import multiple_negatives_ranking",
        "from sentence_transformers.sentence_transformer.losses.cosent import CoSENTLoss",
        "from sentence_transformers.util import _convert_to_tensor",
        "import sentence_transformers.base.trainer",
        "loss._delegated_to_wrapped_loss",
        "metadata.version('sentence-transformers')",
    ],
)
def test_such_a_line_would_be_found(line: str) -> None:
    assert private_uses(line)


def owner_and_name(path: str) -> tuple[Any, str]:
    """What holds an entry of NAMES, and the last part of its path."""
    parts = path.split(".")
    owner: Any = import_module("sentence_transformers")
    for part in parts[:-1]:
        found = getattr(owner, part, None)
        owner = import_module(f"{owner.__name__}.{part}") if found is None else found
    return owner, parts[-1]


@pytest.mark.parametrize("entry", _stock.NAMES, ids=lambda entry: entry.name)
def test_every_name_of_the_list_is_there(entry: _stock.Name) -> None:
    owner, name = owner_and_name(entry.name)
    assert hasattr(owner, name)
    assert entry.since.split(";")[0] == "6.0", "what this package needs, its oldest version has"
    assert entry.use.endswith(".")


def test_the_list_names_all_that_is_imported() -> None:
    listed = ".".join(entry.name for entry in _stock.NAMES).split(".")
    tree = ast.parse(Path(_stock.__file__).read_text(encoding="utf-8"))
    assert {name for _, name in imports_of(tree)} <= set(listed)
