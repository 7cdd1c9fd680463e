"""One forward and backward pass, as a list: the value of a loss, then gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def total(result: Tensor | dict[str, Tensor]) -> Tensor:
    """Returns what a loss came to: its value, or the sum of its terms where it returned them by name."""
    return torch.stack(list(result.values())).sum() if isinstance(result, dict) else result


def value_and_gradients(compute: Callable[[], Tensor], tensors: Iterable[Tensor], factor: float = 1.0) -> list[Tensor]:
    """Returns what ``compute`` returned, and the gradient that it has left at each of the tensors.

    The backward pass is that of ``factor`` times the value. A tensor that got no gradient has one of zeros here.
    """
    tensors = list(tensors)
    for tensor in tensors:
        tensor.grad = None
    value = compute()
    (value * factor).backward()
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in tensors)]


def input_gradients(function: Callable[..., Tensor], inputs: Iterable[Tensor]) -> list[Tensor]:
    """Returns ``function(*inputs)`` and its gradient with respect to each input; the inputs stay as they are."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def embedding_gradients(
    loss: nn.Module, columns: Sequence[Tensor | dict[str, Tensor]], labels: Tensor | None = None
) -> list[Tensor]:
    """Returns the value of a loss around ``Embedded``, and its gradients with respect to the embeddings.

    A column is its embeddings, or features among which they are called "embedding".
    """
    features = [dict(column) if isinstance(column, dict) else {"embedding": column} for column in columns]
    for column in features:
        column["embedding"] = column["embedding"].clone().requires_grad_()
    value = loss(features, labels)
    value.backward()
    return [value.detach(), *(column["embedding"].grad for column in features)]


def model_gradients(
    loss: nn.Module, features: Any, labels: Any, others: Iterable[Tensor] = (), factor: float = 1.0
) -> list[Tensor]:
    """Returns the value of a loss, and the gradients of its model's parameters and of other tensors."""
    return value_and_gradients(
        lambda: total(loss([dict(column) for column in features], labels)),
        [*loss.model.parameters(), *others],
        factor,
    )


def step(
    loss: nn.Module, features: list[dict[str, Tensor]], labels: Tensor | None = None, *, factor: float = 1.0
) -> list[Tensor]:
    """Returns the value of a loss, and the gradients of all its parameters that got one.

    The backward pass is that of ``factor`` times the value.
    """
    loss.zero_grad()
    value = loss([dict(column) for column in features], labels)
    (value * factor).backward()
    return [value.detach(), *(p.grad.clone() for p in loss.parameters() if p.grad is not None)]
