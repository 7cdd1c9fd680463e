"""A sentence-transformers that is too old, or none, is an ImportError that says what is there and what is wanted."""

from __future__ import annotations

import importlib.metadata
import sys
from functools import partial

import pytest

import sbert_kernels
from sbert_kernels import versions

WANTED = r"sentence-transformers >= 6\.0, < 7 .*, and found "


@pytest.mark.parametrize("version", ["5.1.2", "2.2", "5.9.0.dev0"])
def test_an_older_one_is_named_by_patch_and_by_the_imports(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    for name in list(sys.modules):
        if name.startswith(("sbert_kernels.losses", "sbert_kernels.gradcache", "sbert_kernels.versions")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sbert_kernels, "versions")
    modules = ("sbert_kernels.losses", "sbert_kernels.gradcache")
    for way in (sbert_kernels.patch, *(partial(importlib.import_module, name) for name in modules)):
        with pytest.raises(ImportError, match=WANTED + version):
            way()


def test_so_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    versions.check_sentence_transformers()  # the one that can be imported
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=WANTED + "none"):
        versions.check_sentence_transformers()


@pytest.mark.parametrize("version", ["6.0.0", "6.2.0", "6.3.0.dev0", "10.1"])
def test_others_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    versions.check_sentence_transformers()
