"""The cached losses over the engine: the plain loss's value and gradients, for every loss and option."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import sentence_transformers
import torch
from packaging.version import Version

from support.cached_losses import (
    OBJECTIVES,
    PACKINGS,
    around,
    batch,
    gradients,
    in_one_piece,
    through_the_cache,
    value_of,
)
from support.numbers import assert_close

NEGATIVES = {"cosent": (0,), "guided": (0, 1), "symmetric": (0, 1, 3)}  # (0, 1, 2, 3) where nothing is said

OPTIONS = [
    {"mini_batch_size": size, "mini_batch_num_tokens": tokens, "activation_budget": budget, **packing}
    for size, tokens, budget, packing in itertools.product(
        (1, 3, 32, 1000), (None, 24), (None, 200_000, 2**40), PACKINGS
    )
]


def cases() -> list[Any]:
    """For each objective and number of rows, negatives and options drawn from all that there are."""
    draw = random.Random(0)
    chosen = []
    for name in OBJECTIVES:
        for rows, count in ((1, 2), (7, 6), (33, 4)):
            for _ in range(count):
                negatives, options = draw.choice(NEGATIVES.get(name, (0, 1, 2, 3))), draw.choice(OPTIONS)
                if rows == 33 and options["mini_batch_size"] == 1:
                    negatives = min(negatives, 1)
                shown = "-".join(str(value) for value in options.values())
                chosen.append(pytest.param(name, rows, negatives, options, id=f"{name}-{rows}-{negatives}-{shown}"))
    return chosen


@pytest.mark.parametrize(("name", "rows", "negatives", "options"), cases())
def test_equals_the_loss_in_one_piece(bert: Any, name: str, rows: int, negatives: int, options: dict[str, Any]) -> None:
    if name == "weighted" and rows == 1 and Version(sentence_transformers.__version__) < Version("6.2"):
        pytest.skip("stock's GlobalOrthogonalRegularizationLoss of one row is NaN before 6.2")
    model, guide = bert(), bert() if name == "guided" else None
    if guide is not None:
        torch.manual_seed(5)
        for parameter in guide.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    features = batch(model, rows, 2 + negatives)
    assert_close(
        through_the_cache(around(name, "none", model, guide, **options), features),
        in_one_piece(around(name, "none", model, guide), features),
    )


@pytest.mark.parametrize(
    "options", [OPTIONS[13], {"mini_batch_size": 3, "packing": "none", "activation_budget": 10**5}]
)
@pytest.mark.parametrize("wrapper", ["matryoshka", "stock matryoshka"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_the_loss_in_one_piece_in_a_matryoshka_loss(
    bert: Any, name: str, wrapper: str, options: dict[str, Any]
) -> None:
    model, guide = bert(), bert() if name == "guided" else None
    features = batch(model, 7)
    assert_close(
        through_the_cache(around(name, wrapper, model, guide, **options), features),
        in_one_piece(around(name, wrapper, model, guide), features),
    )


@pytest.mark.parametrize("options", [{"mini_batch_size": 32}, {"mini_batch_size": 1000, "unique_rows": True}])
@pytest.mark.parametrize("name", ["ranking", "objective"])
def test_equals_the_loss_in_one_piece_of_a_large_batch(bert: Any, name: str, options: dict[str, Any]) -> None:
    model = bert()
    features = batch(model, 512, longest=3)
    assert_close(
        through_the_cache(around(name, "none", model, None, **options), features),
        in_one_piece(around(name, "none", model, None), features),
    )


@pytest.mark.parametrize("name", ["guided", "cosent", "weighted", "objective"])
def test_two_forwards_then_one_scaled_backward(bert: Any, name: str) -> None:
    """As a gradient scaler and accumulation do, of batches of different sizes."""
    model, guide = bert(), bert() if name == "guided" else None
    first, second = batch(model, 8), batch(model, 5)
    results = []
    for options in ({}, {"mini_batch_size": 3, "activation_budget": 200_000}):
        loss = around(name, "none", model, guide, **options)
        results.append(
            gradients(
                loss, lambda loss=loss: 1024 * (value_of(loss, copy.deepcopy(first)) + 2 * value_of(loss, second))
            )
        )
    assert_close(results[1], results[0])
