"""Text pairs out of the docstrings of a made-up package."""

from __future__ import annotations

from pathlib import Path

import pytest

from sbert_kernels.workloads import texts

BODY = "It takes whatever it is given and says in {} how that was done, in more than forty characters."
MODULE = f'''"""Summary of the module,
on two lines.

{BODY.format("the module")}
"""

def top(x):
    """Summary of a function.

    {BODY.format("a function")}

    >>> top(1)
    1
    """

    def inner():
        """Summary of what is within.

        {BODY.format("the inner one")}
        """

class Thing:
    r"""Summary of some class.

    {BODY.format("a class")}
    """

    async def method(self):
        """Summary of a coroutine.

        {BODY.format("a coroutine")}
        """

if True:
    def guarded():
        """Summary of a guarded one.

        {BODY.format("a branch")}
        """
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "made_up_package"
    folder.mkdir()
    (folder / "__init__.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def pairs_of(*names: str) -> texts.Pairs:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "LEAST_PAIRS", 1)
        return texts.docstring_pairs(names)


def test_every_kind_of_docstring_is_found(package: Path):
    found = dict(pairs_of("made_up_package").pairs)
    assert set(found) == {
        "Summary of the module, on two lines.",
        "Summary of a function.",
        "Summary of what is within.",
        "Summary of some class.",
        "Summary of a coroutine.",
        "Summary of a guarded one.",
    }
    assert found["Summary of a function."] == BODY.format("a function")  # dedented, without its doctest


def test_a_package_is_not_imported(package: Path):
    (package / "__init__.py").write_text(MODULE + "\nraise RuntimeError('imported')\n")
    assert len(pairs_of("made_up_package").pairs) == 6


def test_what_is_left_out_is_counted(package: Path):
    (package / "bad.py").write_text('"""A docstring."""\ndef (:\n')
    (package / "copy.py").write_text(MODULE)
    (package / "doctest.py").write_text('"""Summary of a page of doctests.\n\n>>> 1 + 1\n2\n\n>>> 2 + 2\n4\n"""\n')
    (package / "tests").mkdir()
    (package / "tests" / "test_it.py").write_text(MODULE.replace("Summary", "Test"))
    found = pairs_of("made_up_package", "a_package_that_is_not_installed")
    assert found.counts == {"made_up_package": 6}
    assert found.left_out == {"files that do not parse": 1, "too short": 1, "duplicate": 6}


def test_files_may_be_read_by_several_processes(package: Path, monkeypatch: pytest.MonkeyPatch):
    paths = sorted(package.glob("*.py")) * 4
    alone = list(texts._read_all(paths))
    monkeypatch.setattr(texts, "FILES_PER_WORKER", 2)
    monkeypatch.setattr(texts.os, "cpu_count", lambda: 2)
    assert texts._read_all(paths) == alone


def test_a_long_body_is_cut():
    _, body = texts.as_pair("A summary that is long enough.\n\n" + "word " * 1000)
    assert len(body) == texts.BODY_CHARACTERS[1]


@pytest.mark.parametrize(
    "docstring",
    ["", "Only a summary, though a long one.", "Short.\n\n" + BODY, "A summary that is long enough.\n\nNo."],
)
def test_docstrings_that_say_too_little(docstring: str):
    assert texts.as_pair(docstring) is None
