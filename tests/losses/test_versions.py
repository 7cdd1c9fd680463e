"""A sentence-transformers that is too old, or none, is an ImportError that says what is there and what is wanted."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from sbert_kernels import patch
from sbert_kernels.losses import _versions

WANTED = r"sentence-transformers >= 6\.0, < 7 .*, and found "


@pytest.mark.parametrize("version", ["5.1.2", "2.2", "5.9.0.dev0"])
def test_an_older_one_is_named_by_patch_and_by_the_import(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    for name in list(sys.modules):
        if name.startswith("sbert_kernels.losses"):
            monkeypatch.delitem(sys.modules, name)
    for way in (patch, lambda: importlib.import_module("sbert_kernels.losses")):
        with pytest.raises(ImportError, match=WANTED + version):
            way()


def test_so_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    _versions.check_sentence_transformers()  # the one that can be imported
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=WANTED + "none"):
        _versions.check_sentence_transformers()


@pytest.mark.parametrize("version", ["6.0.0", "6.2.0", "6.3.0.dev0", "10.1"])
def test_others_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    _versions.check_sentence_transformers()
