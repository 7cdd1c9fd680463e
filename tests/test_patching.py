"""patch() reaches every name that sentence-transformers binds, and unpatch() restores each exactly."""

from __future__ import annotations

import gc
import importlib
import logging
import pickle
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.sparse_encoder import losses as sparse
from torch import nn

import sbert_kernels
from sbert_kernels import is_patched, losses, patch, unpatch
from support.embedded import Embedded
from support.gradients import step
from support.numbers import assert_close
from support.texts import text_features

# Of the losses that stock has, the package that exports each.
PACKAGES = {
    name: package
    for package in (stock, sparse)
    for name in losses.__all__
    if getattr(package, name, getattr(losses, name)) is not getattr(losses, name)
}
NAMES = list(PACKAGES)
STOCK = {name: getattr(package, name) for name, package in PACKAGES.items()}
MODULES = {name: STOCK[name].__module__ for name in NAMES}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """This module binds the stock classes itself, in a dict: no module-level names for patch() to warn about."""
    yield
    unpatch()


def bound() -> dict[tuple[str, str], Any]:
    """Every attribute of a sentence-transformers module that is named like one of the losses."""
    return {
        (module.__name__, name): vars(module)[name]
        for module in list(sys.modules.values())
        if isinstance(module, types.ModuleType) and module.__name__.startswith("sentence_transformers.")
        for name in NAMES
        if isinstance(vars(module).get(name), type)
    }


def test_every_binding_is_replaced_and_restored() -> None:
    before = bound()
    qualified = {name: getattr(losses, name).__module__ for name in NAMES}
    replaced = patch().replaced
    assert replaced == STOCK
    for name in NAMES:
        assert getattr(PACKAGES[name], name) is getattr(losses, name)
        assert getattr(sys.modules[MODULES[name]], name) is getattr(losses, name)
    cached = sys.modules[MODULES["CachedMultipleNegativesRankingLoss"]]
    assert cached.MultipleNegativesRankingLoss is losses.MultipleNegativesRankingLoss
    assert sys.modules[stock.Matryoshka2dLoss.__module__].MatryoshkaLoss is losses.MatryoshkaLoss
    assert not set(STOCK.values()) & set(bound().values())
    unpatch()
    assert bound() == before
    assert {name: getattr(losses, name).__module__ for name in NAMES} == qualified


def test_other_classes_of_the_same_name_are_left_alone() -> None:
    from sentence_transformers.cross_encoder import losses as cross_encoder

    theirs = cross_encoder.MultipleNegativesRankingLoss
    with patch():
        assert cross_encoder.MultipleNegativesRankingLoss is theirs


def test_the_deprecated_alias_is_patched() -> None:
    with patch(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from sentence_transformers import losses as alias
        from sentence_transformers.losses import GISTEmbedLoss

        assert alias.MultipleNegativesRankingLoss is losses.MultipleNegativesRankingLoss
        assert GISTEmbedLoss is losses.GISTEmbedLoss


def test_what_was_reloaded_is_replaced_again() -> None:
    """Before the first patch() too, and whatever module holds the class by now."""
    modules = [sys.modules[MODULES[name]] for name in ("MultipleNegativesRankingLoss", "GISTEmbedLoss")]
    contents = [dict(vars(module)) for module in modules]
    try:
        for module in modules:
            importlib.reload(module)
        patch()
        assert is_patched()
        assert not set(STOCK.values()) & set(bound().values())
        assert modules[0].MultipleNegativesRankingLoss is losses.MultipleNegativesRankingLoss
        importlib.reload(modules[1])
        again = modules[1].GISTEmbedLoss
        assert again not in (losses.GISTEmbedLoss, STOCK["GISTEmbedLoss"])
        assert not is_patched()
        assert patch().replaced == STOCK
        assert is_patched()
        assert [modules[1].GISTEmbedLoss, stock.GISTEmbedLoss] == [losses.GISTEmbedLoss] * 2
        unpatch()
        assert modules[1].GISTEmbedLoss is again
        assert stock.GISTEmbedLoss is STOCK["GISTEmbedLoss"]
        assert not is_patched()
    finally:
        for module, content in zip(modules, contents, strict=True):
            vars(module).update(content)


def test_one_line_says_how_much_was_replaced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sbert_kernels")
    names = sum(value in STOCK.values() for value in bound().values())
    patch()
    patch()
    assert caplog.messages == [
        f"sbert_kernels.patch() replaced {len(STOCK)} losses of sentence-transformers, under {names} names."
    ]


def test_is_patched_tells_whose_a_loss_is() -> None:
    name = "MultipleNegativesRankingLoss"
    early = STOCK[name](Embedded())
    assert not is_patched()
    with patch():
        assert is_patched()
        loss = getattr(stock, name)(Embedded())
        assert type(loss).__module__ == STOCK[name].__module__  # which is why somebody asks
        assert is_patched(loss)
        assert is_patched(getattr(stock, name))
        assert not is_patched(early)
        assert not is_patched(stock.CosineSimilarityLoss)
        assert is_patched(losses.WeightedLoss(loss.model, {"part": (loss, 1.0)}))
    assert not is_patched()
    assert is_patched(loss)
    assert not is_patched(getattr(stock, name))
    with pytest.raises(TypeError, match="loss must be a loss"):
        is_patched({"a": loss})


def test_is_idempotent_and_nests() -> None:
    with patch():
        with patch() as inner:
            assert inner.replaced == STOCK
        assert stock.GISTEmbedLoss is losses.GISTEmbedLoss
    assert stock.GISTEmbedLoss is STOCK["GISTEmbedLoss"]
    unpatch()
    assert stock.GISTEmbedLoss is STOCK["GISTEmbedLoss"]


def test_a_patch_that_was_undone_undoes_no_later_one() -> None:
    stale = patch()
    unpatch()
    patch()
    with stale:
        pass
    assert stock.GISTEmbedLoss is losses.GISTEmbedLoss


def test_warns_about_what_was_made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, under whatever name, and subclasses."""
    script = types.ModuleType("my_training_script")
    script.Loss = STOCK["GISTEmbedLoss"]
    monkeypatch.setitem(sys.modules, "my_training_script", script)

    class Mine(STOCK["CachedGISTEmbedLoss"]):
        pass

    with pytest.warns(UserWarning, match="which stay stock: .*my_training_script.Loss") as warned:
        patch()
    assert Mine.__qualname__ in str(warned[0].message)
    del Mine
    gc.collect()  # or every later test would be warned about it


def test_a_warning_that_is_an_error_leaves_nothing_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    script = types.ModuleType("my_training_script")
    script.GISTEmbedLoss = STOCK["GISTEmbedLoss"]
    monkeypatch.setitem(sys.modules, "my_training_script", script)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="my_training_script"):
            patch()
    assert stock.GISTEmbedLoss is STOCK["GISTEmbedLoss"]


def test_unpatch_leaves_alone_what_was_rebound_since() -> None:
    patch()
    stock.GISTEmbedLoss = "mine"
    unpatch()
    left, stock.GISTEmbedLoss = stock.GISTEmbedLoss, STOCK["GISTEmbedLoss"]
    assert left == "mine"


def test_warns_about_a_missing_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(stock, "GISTEmbedLoss")
    with pytest.warns(UserWarning, match=r"did not find these stock losses: \['GISTEmbedLoss'\]"):
        replaced = patch().replaced
    assert "GISTEmbedLoss" not in replaced
    assert stock.CachedGISTEmbedLoss is losses.CachedGISTEmbedLoss


def test_what_is_pickled_while_patched_loads_as_stock() -> None:
    with patch():
        data = pickle.dumps(stock.MultipleNegativesRankingLoss(nn.Identity(), scale=3.0))
        assert type(pickle.loads(data)) is losses.MultipleNegativesRankingLoss
    loaded = pickle.loads(data)
    assert type(loaded) is STOCK["MultipleNegativesRankingLoss"]
    assert loaded.scale == 3.0


def test_losses_made_inside_sentence_transformers_are_fused() -> None:
    with patch():
        loss = stock.CachedMultipleNegativesRankingLoss(Embedded())
    assert type(loss) is losses.CachedMultipleNegativesRankingLoss
    assert type(loss.loss) is losses.MultipleNegativesRankingLoss


@pytest.mark.parametrize("name", ["CachedMultipleNegativesRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"])
def test_a_cached_loss_while_patched_and_disabled_computes_as_stock(
    monkeypatch: pytest.MonkeyPatch,
    bert: Callable[..., Any],
    name: str,
) -> None:
    expected = step(STOCK[name](bert()), text_features(bert()))
    monkeypatch.setenv("SBERT_KERNELS_DISABLE", "1")
    with patch():
        loss = getattr(stock, name)(bert())
        assert type(loss) is getattr(losses, name)
        assert_close(step(loss, text_features(bert())), expected)


def test_before_anything_else_is_imported() -> None:
    """The README's order, in a fresh interpreter, with the script's own import after it."""
    code = (
        "import sbert_kernels\n"
        "sbert_kernels.patch()\n"
        "from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss as L\n"
        "print(issubclass(L, sbert_kernels.losses.MultipleNegativesRankingLoss))\n"
        "sbert_kernels.unpatch()\n"
        "from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss as S\n"
        "print(S in L.__mro__, S is not L)"
    )
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["True", "True", "True"], run.stderr


def test_public_names_are_the_functions() -> None:
    assert sbert_kernels.patch is patch
    assert callable(sbert_kernels.unpatch)
