"""Options and batches of GradCache: what counts as an integer, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sbert_kernels import GradCache
from sbert_kernels.gradcache.options import Options
from support.gradcache import Tokens, contrast, token_column, two_columns


def test_an_empty_column_is_refused() -> None:
    first, second = two_columns()
    empty = {key: value[:0] for key, value in second.items()}
    for packing in ("length", "none"):
        with pytest.raises(ValueError, match="column 1 of the batch has no rows"):
            GradCache(Tokens(), lambda embeddings: sum(e.sum() for e in embeddings), packing=packing)([first, empty])


@pytest.mark.parametrize("three", [3.0, np.int64(3), np.array([3]), torch.tensor(3), Decimal(3)], ids=repr)
def test_whatever_equals_an_integer_is_one(three: Any) -> None:
    options = Options(three, three, activation_budget=three)
    assert options == Options(3, 3, activation_budget=3)
    numbers = (options.mini_batch_size, options.mini_batch_num_tokens, options.activation_budget)
    assert [type(number) for number in numbers] == [int] * 3


def test_a_column_that_the_loss_does_not_read_is_refused() -> None:
    cache = GradCache(Tokens(), lambda embeddings: embeddings[0].sum() + embeddings[2].sum(), mini_batch_size=3)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"column\(s\) 1\b"):
        cache([token_column(5, 4, generator) for _ in range(3)])


def static_features() -> dict[str, Tensor]:
    """As StaticEmbedding takes them: an EmbeddingBag's tokens, and where each row starts."""
    return {"input_ids": torch.arange(9), "offsets": torch.tensor([0, 4, 5])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "foo"}, r"packing.*'foo'"),
        ({"mini_batch_size": 0}, "mini_batch_size.*0"),
        ({"mini_batch_size": 2.5}, "mini_batch_size.*2.5"),
        ({"mini_batch_size": "3"}, "mini_batch_size.*'3'"),
        ({"mini_batch_size": torch.tensor([3, 3])}, "mini_batch_size.*3, 3"),
        ({"mini_batch_num_tokens": float("inf")}, "mini_batch_num_tokens.*inf"),
        ({"mini_batch_num_tokens": 0}, "mini_batch_num_tokens"),
        ({"activation_budget": -1}, "activation_budget.*-1"),
        ({"activation_budget": "all"}, "activation_budget.*'all'"),
        ({"unique_rows": "yes"}, "unique_rows.*'yes'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GradCache(Tokens(), contrast, **options)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (lambda: [], "columns must be at least one, got 0"),
        (lambda: [static_features()] * 2, "column 0 of the batch is an embedding bag"),
    ],
    ids=["none", "static"],
)
def test_bad_columns(columns: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradCache(Tokens(), contrast)(columns())


def test_as_many_encoders_as_columns() -> None:
    with pytest.raises(ValueError, match="columns must be 3, one an encoder, got 2"):
        GradCache([Tokens()] * 3, contrast)(two_columns())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask")
def test_an_automatic_budget_needs_a_gpu() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"activation_budget.*auto"):
        GradCache(Tokens(), contrast, activation_budget="auto")(two_columns())
