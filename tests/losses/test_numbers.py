"""A number is a number, whatever holds it: an option takes what stock's takes, and its errors name the option."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor, nn

from sbert_kernels import losses
from support.embedded import Embedded
from support.numbers import assert_close

ROWS = 6
LABELS = torch.tensor([0.1, 0.9, 0.4, 0.4, 0.7, 0.0])


def kinds(value: float) -> Iterator[Any]:
    """A number in all that may hold one, and in some that stock cannot compute with."""
    yield value
    for dtype in (np.float64, np.float32, np.float16):
        yield dtype(value)
        yield np.array(value, dtype)
    for dtype in (torch.float64, torch.float32, torch.float16):
        yield torch.tensor(value, dtype=dtype)
    yield from (np.array([value]), torch.tensor([value]), torch.tensor([[value]]))
    yield nn.Parameter(torch.tensor(value))
    if value == int(value):
        yield from (int(value), np.int64(value), torch.tensor(int(value)))
    if value in (0, 1):
        yield from (bool(value), np.bool_(value), torch.tensor(bool(value)))
    yield from (Fraction(value), Decimal(value), str(value), None, complex(value), torch.full((2,), value))


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    """A loss of stock's or of ours whose option has the value, given to the constructor or set afterwards."""

    def loss(module: Any, name: str, option: str, value: Any, assigned: bool) -> nn.Module:
        if name == "MatryoshkaLoss":
            model = Embedded(dimension=8)
            return module.MatryoshkaLoss(model, module.MultipleNegativesRankingLoss(model), [8, 4], [value, 1.0])
        if "GIST" in name:
            made = getattr(module, name).__new__(getattr(module, name))
            nn.Module.__init__(made)
            given = {
                "model": Embedded(),
                "guide": Embedded("guide"),
                "temperature": 0.05,
                "margin": 0.0,
                "margin_strategy": "relative" if option == "margin" else "absolute",
                "contrast_anchors": True,
                "contrast_positives": True,
                "gather_across_devices": False,
                "similarity_fct": nn.CosineSimilarity(dim=-1),
                "cross_entropy_loss": nn.CrossEntropyLoss(),
                "must_retokenize": False,
                "mini_batch_size": 4,
                "mini_batch_num_tokens": None,
                "show_progress_bar": False,
                option: value,
            }
            for key, attribute in given.items():
                setattr(made, key, attribute)
            return made
        options = {"hardness_mode": "all_negatives"} if option == "hardness_strength" else {}
        if not assigned:
            return getattr(module, name)(Embedded(), **options, **{option: value})
        made = getattr(module, name)(Embedded(), **options)
        setattr(made, option, value)
        return made

    return loss


def trained(loss: nn.Module, labels: Tensor | None, number: Any) -> list[Tensor]:
    """The loss, the gradients of its embeddings, and that of the number if it is learnable."""
    generator = torch.Generator().manual_seed(0)
    x, guide = (
        [torch.randn(ROWS, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
        for _ in range(2)
    )
    mask = torch.ones(ROWS, 2, dtype=torch.int64)
    features = [{"embedding": e, "guide": g, "attention_mask": mask} for e, g in zip(x, guide, strict=True)]
    value = loss(features, labels)
    value.backward()
    own = [number.grad.double()] if isinstance(number, nn.Parameter) and number.grad is not None else []
    return [value.detach().reshape(()), *(e.grad for e in x), *own]


OPTIONS = [
    ("MultipleNegativesRankingLoss", "scale", 20.0),
    ("MultipleNegativesRankingLoss", "scale", 1.0),
    ("MultipleNegativesRankingLoss", "hardness_strength", 2.0),
    ("CachedMultipleNegativesRankingLoss", "scale", 20.0),
    ("GISTEmbedLoss", "temperature", 0.05),
    ("GISTEmbedLoss", "temperature", 1.0),
    ("GISTEmbedLoss", "margin", 0.125),
    ("CachedGISTEmbedLoss", "temperature", 0.05),
    ("CachedGISTEmbedLoss", "margin", 0.0),
    ("CoSENTLoss", "scale", 20.0),
    ("CoSENTLoss", "scale", -1.0),
    ("AnglELoss", "scale", 0.0),
    ("MatryoshkaLoss", "matryoshka_weights", 0.5),
]


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")
@pytest.mark.parametrize(("name", "option", "value"), OPTIONS)
def test_whatever_stock_trains_with_trains_here(make: Any, name: str, option: str, value: float) -> None:
    labels = LABELS if name in ("CoSENTLoss", "AnglELoss") else None
    assigned = value == 1.0
    counted = 0
    for number in kinds(value):
        try:
            expected = trained(make(stock, name, option, number, assigned), labels, number)
        except Exception:
            continue
        if isinstance(number, Tensor) and (number.numel() > 1 or (number.dim() == 2 and labels is not None)):
            continue  # not one number, but one for each column, say; stock 6.0 ranks a matrix of scores wrongly
        number = copy.deepcopy(number)  # without the gradient that stock gave it
        result = trained(make(losses, name, option, number, assigned), labels, number)
        if expected[-1].isnan().any():
            # Stock divides an excluded similarity, -inf, by a learnable temperature.
            assert isinstance(number, nn.Parameter)
            assert result.pop().isfinite()
            expected.pop()
        if expected[0].dtype == torch.float32:
            # A weight of shape [1] makes stock's loss a float32.
            torch.testing.assert_close(result.pop(0).float(), expected.pop(0), rtol=1e-6, atol=0)
        assert_close(result, expected, replayed=True)
        counted += 1
    assert counted >= 9


@pytest.mark.parametrize("wrong", [Decimal(1), "1", None, torch.ones(2), np.ones(2)], ids=str)
@pytest.mark.parametrize(("name", "option"), dict.fromkeys((name, option) for name, option, _ in OPTIONS[:-1]))
def test_what_is_no_number_is_refused_by_the_name_of_the_option(make: Any, name: str, option: str, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{option} must be a number"):
        trained(make(losses, name, option, wrong, True), LABELS, wrong)


@pytest.mark.parametrize("name", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
@pytest.mark.parametrize("value", [0.0, -0.05, float("inf"), float("nan")])
def test_similarities_are_divided_by_positive_temperatures_only(make: Any, name: str, value: float) -> None:
    for temperature in (value, np.float32(value), torch.tensor(value), nn.Parameter(torch.tensor(value))):
        with pytest.raises(ValueError, match=rf"^temperature must be positive and finite, .* got {value}"):
            trained(make(losses, name, "temperature", temperature, True), None, None)


def test_matryoshka_weights_that_are_tensors_are_read_at_each_step(make: Any, caplog: Any) -> None:
    """In one call for all prefixes, so without a log line."""
    weight = torch.tensor(0.5)
    loss = make(losses, "MatryoshkaLoss", "matryoshka_weights", weight, False)
    for value in (0.5, 0.25):
        weight.fill_(value)
        expected = make(stock, "MatryoshkaLoss", "matryoshka_weights", value, False)
        assert_close(trained(loss, None, None), trained(expected, None, None))
    assert not [record for record in caplog.records if "prefix" in record.message]


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss", "CoSENTLoss"])
def test_a_scale_that_is_no_number_is_refused_when_the_loss_is_built(name: str) -> None:
    make = getattr(losses, name)
    with pytest.raises(TypeError, match="scale must be a number, got '20'"):
        make(Embedded(), scale="20")
    with pytest.raises(ValueError, match=r"scale must be one number, got a tensor of shape \[2\]"):
        make(Embedded(), scale=torch.tensor([20.0, 1.0]))


def test_a_similarity_by_its_name_is_refused() -> None:
    loss = losses.MultipleNegativesRankingLoss(Embedded(), similarity_fct="cos")
    with pytest.raises(TypeError, match=r"similarity_fct must be a function, such as .*cos_sim, got 'cos'"):
        loss([{"embedding": torch.randn(2, 4)}] * 2)
