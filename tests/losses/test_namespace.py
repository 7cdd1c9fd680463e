"""sbert_kernels.losses stands where a script imports stock's losses: all names are there, ours where there is one."""

from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any

import pytest
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.sparse_encoder import losses as sparse

from sbert_kernels import losses, patch

STOCK = [(package, name) for package in (stock, sparse) for name in package.__all__]


@pytest.mark.parametrize(("package", "name"), STOCK, ids=[name for _, name in STOCK])
def test_every_name_of_stock_is_there(package: ModuleType, name: str) -> None:
    """As stock's own object, or as a subclass of it that is defined here."""
    value, original = getattr(losses, name), getattr(package, name)
    assert value is original or (issubclass(value, original) and value.__module__.startswith("sbert_kernels.losses."))
    assert name in dir(losses)
    assert losses.__all__.count(name) == 1


OURS = [name for name in losses.__all__ if getattr(losses, name).__module__.startswith("sbert_kernels.losses.")]


@pytest.mark.parametrize("name", OURS)
def test_every_loss_documents_its_inputs_its_arguments_and_an_example(name: str) -> None:
    cls = getattr(losses, name)
    text = inspect.getdoc(cls) or ""
    assert "\nInputs:\n" in text
    assert "\nExample:\n" in text
    arguments = re.search(r"\nArgs:\n((?: .*\n|\n(?= ))+)", text + "\n")
    assert arguments is not None
    _, *options = inspect.signature(cls.__init__).parameters
    assert not [option for option in options if not re.search(rf"\b{option}\b", arguments.group(1))]


def test_star_and_named_imports() -> None:
    found: dict[str, Any] = {}
    exec("from sbert_kernels.losses import *", found)
    assert set(losses.__all__) <= set(found)
    exec("from sbert_kernels.losses import TripletLoss, GISTEmbedLoss, SpladeLoss, triplet", found)
    assert found["TripletLoss"] is stock.TripletLoss
    assert found["GISTEmbedLoss"] is not stock.GISTEmbedLoss
    assert found["triplet"].TripletDistanceMetric is losses.TripletDistanceMetric


def test_a_module_of_stock_is_there_unless_it_defines_what_is_fused_here() -> None:
    assert losses.triplet is stock.triplet
    assert losses.cosent.CoSENTLoss is losses.CoSENTLoss
    assert not hasattr(losses, "angle")


def test_an_unknown_name() -> None:
    with pytest.raises(
        AttributeError, match=r"'sbert_kernels.losses' has no attribute 'TripletLos', and sentence_tr"
    ) as raised:
        _ = losses.TripletLos
    # From these the interpreter says "Did you mean: 'TripletLoss'?".
    assert (raised.value.name, raised.value.obj) == ("TripletLos", losses)


def test_patch_changes_nothing_here() -> None:
    before = {name: getattr(losses, name) for name in losses.__all__}
    with patch() as patched:
        assert {name: getattr(losses, name) for name in losses.__all__} == before
        assert not {"TripletLoss", "SpladeLoss"} & set(patched.replaced)
        assert stock.TripletLoss is losses.TripletLoss


@pytest.mark.parametrize("name", [name for name in losses.__all__ if "sbert" in getattr(losses, name).__module__])
def test_every_argument_is_in_the_docstring_here(name: str) -> None:
    """Stock's stands behind another class, where help() does not show it."""
    loss = getattr(losses, name)
    _, arguments = inspect.cleandoc(vars(loss)["__doc__"]).split("Args:\n")
    described = " ".join(re.findall(r"^ {4}(\w[\w,\s]*):", arguments, re.MULTILINE))
    assert set(inspect.signature(loss.__init__).parameters) - {"self"} <= set(re.findall(r"\w+", described))
