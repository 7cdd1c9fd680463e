"""GradCache alone: the loss and every gradient of embedding all columns in one piece, however it is used."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sbert_kernels import GradCache
from support.gradcache import Tokens, assert_unchanged, contrast, embed, token_column, two_columns
from support.gradients import value_and_gradients
from support.numbers import assert_close


@st.composite
def options_of_any_kind(draw: st.DrawFn) -> dict[str, Any]:
    packing = draw(st.sampled_from(["length", "none"]))
    return {
        "mini_batch_size": draw(st.sampled_from([1, 2, 3, 7, 100])),
        "mini_batch_num_tokens": draw(st.sampled_from([None, None, 1, 12, 1000])),
        "packing": packing,
        "unique_rows": packing == "length" and draw(st.booleans()),
        "activation_budget": draw(st.sampled_from([None, 0, 2000, 10**9])),
    }


@settings(max_examples=150, derandomize=True)
@given(st.data(), options_of_any_kind())
def test_equals_one_piece_for_every_splitting(data: st.DataObject, options: dict[str, Any]) -> None:
    """Columns of any widths, towers shared or not, rows that repeat, and any way to cut them into mini-batches."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    rows = data.draw(st.integers(1, 13))
    widths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    towers = [Tokens(0), Tokens(1)]
    which = data.draw(st.lists(st.sampled_from([0, 1]), min_size=len(widths), max_size=len(widths)))
    encoders = [towers[index] for index in which]
    distinct = data.draw(st.integers(1, rows))
    columns = [token_column(rows, width, generator, distinct) for width in widths]
    before = copy.deepcopy(columns)
    tensors = [p for tower in towers for p in tower.parameters()]
    expected = value_and_gradients(lambda: contrast(embed(encoders, columns)), tensors)
    cache = GradCache(encoders, contrast, **options)
    assert_close(value_and_gradients(lambda: cache(columns), tensors), expected)
    assert_unchanged(columns, before)


@pytest.mark.parametrize("options", [{}, {"unique_rows": True}, {"packing": "none"}])
def test_columns_may_have_different_numbers_of_rows(options: dict[str, Any]) -> None:
    """As a loss does that ranks more documents than there are queries."""
    encoder, columns = Tokens(), [two_columns(4)[0], two_columns(11)[1]]
    before = copy.deepcopy(columns)

    def ranked(embeddings: Sequence[Tensor]) -> Tensor:
        queries, documents = embeddings
        return F.cross_entropy(3 * queries @ documents.T, torch.arange(4))

    tensors = list(encoder.parameters())
    expected = value_and_gradients(lambda: ranked(embed(encoder, columns)), tensors)
    cache = GradCache(encoder, ranked, mini_batch_size=3, **options)
    assert_close(value_and_gradients(lambda: cache(columns), tensors), expected)
    assert_unchanged(columns, before)


@pytest.mark.parametrize("factor", [1.0, -0.25, 2.0**16])
@pytest.mark.parametrize("budget", [None, 10**9])
def test_whatever_multiplies_the_loss_reaches_every_gradient(factor: float, budget: int | None) -> None:
    """The encoder's, those of a learnable leaf that the loss is given, and of one that it closes over."""
    encoder, columns = Tokens(), two_columns()
    scale, power = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (3.0, 1.5))

    def scaled(embeddings: Sequence[Tensor], temperature: Tensor, *, offset: float) -> Tensor:
        return contrast(embeddings, temperature) ** power + offset

    tensors = [*encoder.parameters(), scale, power]
    expected = value_and_gradients(lambda: scaled(embed(encoder, columns), scale, offset=0.5), tensors, factor)
    cache = GradCache(encoder, scaled, mini_batch_size=3, activation_budget=budget)
    assert_close(value_and_gradients(lambda: cache(columns, scale, offset=0.5), tensors, factor), expected)


def test_two_forwards_then_one_backward_of_their_sum() -> None:
    """A forward owns its state: batches of other sizes don't get each other's gradients, nor each other's factor."""
    encoder, first, second = Tokens(), two_columns(8, 2), two_columns(5, 3)
    cache = GradCache(encoder, contrast, mini_batch_size=3)
    tensors = list(encoder.parameters())
    expected = value_and_gradients(
        lambda: contrast(embed(encoder, first)) + 2 * contrast(embed(encoder, second)), tensors
    )
    assert_close(value_and_gradients(lambda: cache(first) + 2 * cache(second), tensors), expected)


@pytest.mark.parametrize("budget", [None, 1500])
def test_backward_twice_accumulates_twice(budget: int | None) -> None:
    encoder, columns = Tokens(), two_columns()
    tensors = list(encoder.parameters())
    value, *once = value_and_gradients(lambda: contrast(embed(encoder, columns)), tensors)
    encoder.zero_grad()
    loss = GradCache(encoder, contrast, mini_batch_size=3, activation_budget=budget)(columns)
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert_close([loss.detach(), *(p.grad for p in tensors)], [value, *(2 * grad for grad in once)])


def test_a_kept_graph_is_not_used_after_its_parameters_have_changed() -> None:
    """As when an optimizer steps between two backward passes: the second pass is then that of the new parameters."""
    results = []
    for budget in (None, 10**9):
        encoder = Tokens()
        loss = GradCache(encoder, contrast, mini_batch_size=3, activation_budget=budget)(two_columns())
        with torch.no_grad():
            for p in encoder.parameters():
                p.add_(1)
        loss.backward()
        results.append([p.grad for p in encoder.parameters()])
    assert_close(*results)


def test_gradients_accumulate_over_steps_under_a_gradient_scaler() -> None:
    encoder, batches = Tokens().float(), [two_columns(8, 2), two_columns(8, 3)]
    cache = GradCache(encoder, contrast, mini_batch_size=3)
    results = []
    for compute in (lambda columns: contrast(embed(encoder, columns)), cache):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
        optimizer.zero_grad()
        for columns in batches:
            scaler.scale(compute(columns) / len(batches)).backward()
        scaler.unscale_(optimizer)
        results.append([p.grad.clone() for p in encoder.parameters()])
    # The order of the fp32 sums differs: n of them err by at most n roundings of the largest entry.
    for ours, exact in zip(*reversed(results), strict=True):
        assert (ours - exact).abs().max() <= 64 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("packing", ["length", "none"])
def test_a_frozen_tower_gets_no_gradient_and_the_other_its_own(packing: str) -> None:
    encoders, columns = [Tokens(0), Tokens(1)], two_columns()
    encoders[1].requires_grad_(False)
    tensors = list(encoders[0].parameters())
    expected = value_and_gradients(lambda: contrast(embed(encoders, columns)), tensors)
    cache = GradCache(encoders, contrast, mini_batch_size=3, packing=packing)
    assert_close(value_and_gradients(lambda: cache(columns), tensors), expected)
    assert all(p.grad is None for p in encoders[1].parameters())
