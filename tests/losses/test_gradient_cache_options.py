"""Options of the cached losses, and methods of them that a user overrides."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from sbert_kernels import losses
from support.cached_losses import (
    OBJECTIVES,
    around,
    batch,
    gradients,
    value_of,
)
from support.numbers import assert_close


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "foo"}, r"packing.*'foo'"),
        ({"activation_budget": -1}, r"activation_budget.*-1"),
        ({"unique_rows": "yes"}, r"unique_rows.*'yes'"),
        ({"unique_rows": True, "packing": "none"}, "unique_rows=True needs packing='length'"),
    ],
)
def test_bad_options_are_named(bert: Any, name: str, options: dict[str, Any], message: str) -> None:
    model = bert()
    with pytest.raises((ValueError, TypeError), match=message):
        around(name, "none", model, model, mini_batch_size=3, **options)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_whatever_equals_an_integer_is_a_mini_batch(bert: Any, name: str) -> None:
    """As in stock, whose arithmetic takes them; the loss shows the integer."""
    model, guide = bert(), bert() if name == "guided" else None
    loss = around(name, "none", model, guide, mini_batch_size=torch.tensor(3), mini_batch_num_tokens=1e4)
    shown = loss.get_config_dict()
    for key, number in (("mini_batch_size", 3), ("mini_batch_num_tokens", 10_000)):
        assert type(shown[key]) is int
        assert shown[key] == number
    loss.mini_batch_num_tokens = None
    loss.mini_batch_size = True
    assert value_of(loss, batch(model, 3)).isfinite()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_options_that_are_set_are_kept_and_shown(bert: Any, name: str) -> None:
    """In the configuration, and by copies; those that are not set leave the configuration what it is in stock."""
    model, guide = bert(), bert() if name == "guided" else None
    new = {"unique_rows": True, "activation_budget": 5}
    plain = around(name, "none", model, guide, mini_batch_size=3)
    loss = around(name, "none", model, guide, mini_batch_size=3, **new)
    assert loss.get_config_dict() == plain.get_config_dict() | new
    copied = copy.deepcopy(loss).get_config_dict()
    assert {name: copied[name] for name in new} == new
    assert not new.keys() & plain.get_config_dict().keys()


class OwnStage(losses.CachedCoSENTLoss):
    """A subclass that back-propagates its loss itself, and returns it as it is."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        loss = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if with_backward:
            loss.backward()
        return loss


def test_a_stage_of_one_s_own_may_return_its_loss_attached(bert: Any) -> None:
    """As over stock's gradient cache, which detaches it."""
    model = bert()
    features = batch(model, 7)
    loss, plain = OwnStage(model, mini_batch_size=3), losses.CoSENTLoss(model)
    expected = gradients(plain, lambda: value_of(plain, features))
    assert_close(gradients(loss, lambda: value_of(loss, features)), expected)


def test_gradients_may_be_asked_for_by_parameter(bert: Any) -> None:
    """``backward(inputs=...)`` of the loss runs the second pass, as over stock's gradient cache."""
    model = bert()
    wanted = [p for n, p in model.named_parameters() if "pooler" not in n]
    loss = value_of(losses.CachedCoSENTLoss(model, mini_batch_size=3), batch(model, 7))
    loss.backward(inputs=wanted)
    assert all(p.grad is not None for p in wanted)


def test_an_override_that_wraps_stock_s_method_is_called(bert: Any) -> None:
    """``functools.wraps`` makes it say that it is stock's."""
    model = bert()
    loss, calls = losses.CachedCoSENTLoss(model, mini_batch_size=3), []
    original = loss.embed_minibatch

    @functools.wraps(original)
    def counted(**kwargs: Any) -> Any:
        calls.append(kwargs["with_grad"])
        return original(**kwargs)

    loss.embed_minibatch = counted
    value_of(loss, batch(model, 7)).backward()
    assert calls == [False] * 6 + [True] * 6


@pytest.mark.parametrize("options", [{}, {"packing": "none", "activation_budget": 10**9}], ids=str)
def test_options_that_an_override_cannot_have_are_logged(
    bert: Any, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    model = bert()
    loss = losses.CachedCoSENTLoss(model, mini_batch_size=3, **options)
    original = loss.embed_minibatch
    loss.embed_minibatch = lambda **kwargs: original(**kwargs)
    value_of(loss, batch(model, 7))
    assert caplog.text.count("its embed_minibatch was overridden") == 1


def test_lists_that_an_override_has_to_cut_are_logged(bert: Any, caplog: pytest.LogCaptureFixture) -> None:
    """They reach it whole, as stock hands them."""
    model = bert()
    loss = losses.CachedCoSENTLoss(model, mini_batch_size=3)
    original = loss.embed_minibatch
    loss.embed_minibatch = lambda **kwargs: original(**kwargs)
    value_of(loss, [{**column, "names": list("abcdefg")} for column in batch(model, 7)])
    assert caplog.text.count("['names']") == 1


@pytest.mark.parametrize("name", ["cosent", "weighted"])
def test_an_iterator_of_one_s_own_is_refused_where_nothing_calls_it(bert: Any, name: str) -> None:
    model = bert()
    loss = around(name, "none", model, None, mini_batch_size=3)
    loss.embed_minibatch_iter = lambda **kwargs: iter(())
    with pytest.raises(TypeError, match="override embed_minibatch"):
        value_of(loss, batch(model, 7))
