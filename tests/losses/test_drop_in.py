"""A loss that was pickled under patch() computes the same numbers wherever it is loaded, or says why it cannot."""

from __future__ import annotations

import copy
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.sparse_encoder import losses as sparse
from torch import Tensor, nn

from sbert_kernels import losses, patch, unpatch
from sbert_kernels.losses._drop_in import DropIn
from support.numbers import assert_close


def learned(value: float = 20.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


class Encoder(nn.Sequential):
    """What the losses ask of a model when they are built, and something that pickles."""

    tokenizer = None
    max_seq_length = 32

    def get_embedding_dimension(self) -> int:
        return 8


NAMES = (
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "CoSENTLoss",
    "AnglELoss",
    "SparseCoSENTLoss",
    "SparseAnglELoss",
    "Matryoshka of MultipleNegativesRankingLoss",
    "Matryoshka of CachedMultipleNegativesRankingLoss",
)
NEW = (
    *((name, {"duplicates": "mask"}) for name in NAMES if "Negatives" in name),
    *((name, {"scale": learned()}) for name in NAMES if "Sparse" not in name),
    *((name, {"packing": "none"}) for name in NAMES if "Cached" in name),
    ("CachedMultipleNegativesRankingLoss", {"unique_rows": True}),
    ("CachedMultipleNegativesRankingLoss", {"activation_budget": 0}),
    ("CoSENTLoss", {"gather_across_devices": True}),
    ("AnglELoss", {"gather_across_devices": True}),
)


def build(name: str, **options: Any) -> nn.Module:
    """A loss by its stock name, as a patched script gets it."""
    model = Encoder(nn.Identity())
    name, _, inner = name.partition(" of ")
    loss = getattr(sparse if name.startswith("Sparse") else stock, inner or name)(model, **options)
    return stock.MatryoshkaLoss(model, loss, [8, 4]) if inner else loss


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other tests made subclasses earlier; two losses are deprecated
        patch()
        yield
    unpatch()


def classes(loss: nn.Module) -> list[type]:
    return [type(module) for module in loss.modules()]


def elsewhere(data: bytes) -> nn.Module:
    """What is loaded from a pickle in a process that has not called patch(): stock's names are stock's there."""
    unpatch()
    return pickle.loads(data)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_new_option_it_is_a_loss_of_stock_s_elsewhere(name: str) -> None:
    loss = build(name)
    data = pickle.dumps(loss)
    assert classes(pickle.loads(data)) == classes(copy.deepcopy(loss)) == classes(loss)
    assert b"sbert_kernels" not in data
    loaded = elsewhere(data)
    assert not any(isinstance(module, DropIn) for module in loaded.modules())
    assert type(loaded).__name__ == type(loss).__name__


@pytest.mark.parametrize(
    ("name", "options"), NEW, ids=lambda value: next(iter(value)) if isinstance(value, dict) else value
)
@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL])
def test_with_one_it_stays_what_it_is(name: str, options: dict[str, Any], protocol: int) -> None:
    loss = build(name, **options)
    data = pickle.dumps(loss, protocol)
    for copied in (copy.deepcopy(loss), copy.copy(loss), pickle.loads(data), elsewhere(data)):
        assert classes(copied) == classes(loss)
        assert copied.new_options() == loss.new_options()


@pytest.mark.parametrize(
    "make",
    [
        lambda m: stock.GISTEmbedLoss(m, m, temperature=learned(0.05)),
        lambda m: stock.CachedGISTEmbedLoss(m, m, temperature=learned(0.05)),
        lambda m: stock.CachedGISTEmbedLoss(m, m, packing="none"),
        lambda m: losses.WeightedLoss(
            m, {"a": (stock.CoSENTLoss(m), 1.0), "b": (stock.MultipleNegativesRankingLoss(m), 1.0)}
        ),
        lambda m: losses.AnglEObjective(m, duplicates="keep", mini_batch_size=2),
    ],
    ids=["guided", "cached and guided", "cached and guided, packing", "weighted", "angle"],
)
def test_so_do_guided_losses_and_the_parts_of_a_weighted_one(bert: Callable[..., Any], make: Any) -> None:
    loss = make(bert())
    data = pickle.dumps(loss)
    assert classes(copy.deepcopy(loss)) == classes(pickle.loads(data)) == classes(elsewhere(data)) == classes(loss)


def test_a_guided_loss_without_one_does_not(bert: Callable[..., Any]) -> None:
    model = bert()
    for make in (stock.GISTEmbedLoss, stock.CachedGISTEmbedLoss):
        data = pickle.dumps(make(model, model))
        assert b"sbert_kernels" not in data


def test_a_part_counts_that_was_put_in_later_or_is_pickled_first() -> None:
    model = Encoder(nn.Identity())
    first, later = stock.CoSENTLoss(model), stock.MultipleNegativesRankingLoss(model)
    loss = losses.WeightedLoss(model, {"first": (first, 1.0)})
    loss.losses["later"], loss.weights["later"] = later, 1.0
    part, loaded = elsewhere(pickle.dumps((first, loss)))
    assert loaded.losses["first"] is part
    assert [type(part) for part in loaded.losses.values()] == [losses.CoSENTLoss, losses.MultipleNegativesRankingLoss]


def test_the_numbers_are_the_same(bert: Callable[..., Any]) -> None:
    """Loss and gradients, that of the learned scale as well: stock's differ in both."""
    model = bert()
    columns = (["how tall is it", "who wrote this", "how tall is it"], ["the height", "the author", "the height"])
    features = [model.preprocess(column) for column in columns]

    def run(loss: nn.Module) -> list[Tensor]:
        loss.zero_grad()
        value = loss([dict(column) for column in features], None)
        (4 * value).backward()
        return [value.detach(), *(p.grad.clone() for p in loss.parameters() if p.grad is not None)]

    options = {"scale": learned(), "mini_batch_size": 2}
    loss = stock.CachedMultipleNegativesRankingLoss(model, duplicates="mask", **options)
    expected = run(loss)
    assert_close(run(elsewhere(pickle.dumps(loss))), expected)
    theirs = run(stock.CachedMultipleNegativesRankingLoss(model, **options))
    assert not torch.isclose(theirs[0], expected[0])


def test_a_subclass_that_is_made_of_stock_s_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    script = types.ModuleType("my_script")
    monkeypatch.setitem(sys.modules, "my_script", script)

    def imported() -> None:
        script.Mine = type("Mine", (stock.MultipleNegativesRankingLoss,), {"__module__": "my_script"})

    imported()
    loss, plain = script.Mine(nn.Identity(), duplicates="mask"), script.Mine(nn.Identity())
    assert type(copy.deepcopy(loss)) is script.Mine
    data = pickle.dumps(loss), pickle.dumps(plain)
    assert pickle.loads(data[0]).duplicates == "mask"
    unpatch()
    imported()  # as a process without patch() would
    assert type(pickle.loads(data[1])) is script.Mine
    with pytest.raises(TypeError, match=r"my_script\.Mine was pickled with options .* call sbert_kernels\.patch\(\)"):
        pickle.loads(data[0])
