"""The terms of a loss take part in the arithmetic of wrappers, and their sum is what it would be for the sum."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sbert_kernels.losses._components import ADDED, Components


def terms() -> Components:
    return Components(a=torch.tensor(1.0), b=torch.tensor(2.5))


@pytest.mark.parametrize("number", [3, 0.5, np.float32(0.5), np.int64(2), torch.tensor(0.5)], ids=type)
@pytest.mark.parametrize(
    "formula",
    [
        lambda loss, x: x * loss,
        lambda loss, x: loss * x,
        lambda loss, x: loss / x,
        lambda loss, x: 0.0 + x * loss,
        lambda loss, x: loss + loss * x / 3,
        lambda loss, x: (loss + x) * x + x,
        lambda loss, x: x + loss + (loss + x),
    ],
)
def test_the_sum_is_that_of_the_arithmetic_on_the_sum(formula: Callable[..., Any], number: Any) -> None:
    result = formula(terms(), number)
    assert type(result) is Components
    assert float(result.total()) == pytest.approx(float(formula(torch.tensor(3.5), number)), rel=1e-6)


def test_what_is_added_is_a_term_of_its_own() -> None:
    assert list(0.0 + terms()) == ["a", "b"]
    added = terms() + torch.tensor(4.0) + 1
    assert {name: value.item() for name, value in added.items()} == {"a": 1.0, "b": 2.5, ADDED: 5.0}
    assert dict(terms() + {"b": 1, "c": 2}) == {"a": 1.0, "b": 3.5, "c": 2}


@pytest.mark.parametrize(
    "formula",
    [
        lambda loss: loss - 1,
        lambda loss: -loss,
        lambda loss: loss * loss,
        lambda loss: 1 / loss,
        lambda loss: loss + torch.ones(2),
        lambda loss: torch.ones(2) * loss,
        lambda loss: np.ones(2) * loss,
        lambda loss: loss**2,
        lambda loss: loss + "1",
    ],
)
def test_other_arithmetic_raises(formula: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="Components"):
        formula(terms())


def test_a_training_loop_of_ones_own_treats_it_as_a_tensor() -> None:
    a, b = (torch.tensor(value, requires_grad=True) for value in (1.0, 2.5))
    loss = Components(a=a * 2, b=b)
    loss.backward(retain_graph=True)
    assert (a.grad, b.grad) == (2.0, 1.0)
    assert loss.item() == float(loss) == loss.detach().item() == loss.mean().item() == 4.5
    assert f"{loss:.2f}" == "4.50"
    assert not loss.detach().requires_grad
    assert (loss.dtype, loss.device, loss.dim(), loss.numel()) == (torch.float32, torch.device("cpu"), 0, 1)
    assert torch.isfinite(loss)
    assert torch.isnan(loss * float("nan"))
    (loss / 4).backward()
    assert (a.grad, b.grad) == (2.5, 1.25)


def test_what_else_a_tensor_has_says_where_it_is() -> None:
    with pytest.raises(AttributeError, match=r"dictionary, which has no 'register_hook': .* is loss\.total\(\)"):
        terms().register_hook(print)
    with pytest.raises(TypeError, match=r"exp does not take the Components of a loss: give loss\.total\(\)"):
        torch.exp(terms())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_terms_are_copied(copied: Callable[[Any], Any]) -> None:
    assert type(copied(terms())) is Components
    assert copied(terms()) == terms()


def test_terms_pickle() -> None:
    assert pickle.loads(pickle.dumps(terms())) == terms()


def driven(total: Tensor) -> Components:
    return terms().driven_by(total)


@pytest.mark.parametrize("factor", [1.0, -3.0, 0.0, float("inf"), float("nan")])
def test_a_common_factor_reaches_the_total(factor: float) -> None:
    total = torch.tensor(3.5, requires_grad=True)
    (driven(total) * factor).total().backward()
    assert torch.equal(total.grad, torch.tensor(factor)) or total.grad.isnan()


@pytest.mark.parametrize(
    "formula",
    [
        lambda loss: loss["a"],
        lambda loss: loss["a"] + 2 * loss["b"],
        lambda loss: loss["a"] * loss["b"],
        lambda loss: loss["a"] + float("nan") * loss["b"],
    ],
    ids=["dropped", "weighed", "multiplied", "nan"],
)
def test_different_factors_raise(formula: Callable[[Any], Tensor]) -> None:
    total = torch.tensor(3.5, requires_grad=True)
    with pytest.raises(RuntimeError, match="share one gradient cache"):
        formula(driven(total)).backward()
    assert total.grad is None
