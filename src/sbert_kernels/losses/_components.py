"""Holds the terms of a loss by name, with the arithmetic that wrappers of sentence-transformers do with a loss."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..values import dry

# What a user's training loop calls or reads of a loss. It is passed on to the sum of the terms.
OF_THE_SUM = frozenset(
    ("backward", "item", "detach", "tolist", "numpy", "cpu", "mean", "sum", "isnan", "isinf", "isfinite", "dim")
) | {"numel", "dtype", "device", "shape", "requires_grad", "grad_fn"}

# The term that holds what a wrapper adds to the loss, such as AdaptiveLayerLoss's divergence between layers.
ADDED = "added_by_wrapper"


class Components(dict[str, Tensor]):
    """Holds the terms of a loss, 0-d tensors by name. The loss is their sum. The Trainer takes and logs them so.

    A user's script may treat it as a tensor (``loss.backward()``, ``loss.item()``, ``float(loss)``, ...), which
    then means the sum. A gradient scaler takes tensors only: ``scaler.scale(loss.total())``.

    It can be multiplied or divided by a number and added to a number or to other terms, as MatryoshkaLoss and
    AdaptiveLayerLoss do with a loss: the sum of the result is what the same arithmetic makes of the sum. Any other
    arithmetic raises TypeError.
    """

    __array_ufunc__ = None  # numpy then leaves the arithmetic of its numbers with this class to this class

    def total(self) -> Tensor:
        """Returns the sum of the terms, which is the loss, as a 0-d tensor."""
        return torch.stack(list(self.values())).sum()

    def __getattr__(self, name: str) -> Any:
        if name in OF_THE_SUM:
            return getattr(self.total(), name)
        raise AttributeError(
            f"a loss of several terms is a dictionary, which has no {name!r}: its sum, a tensor, is loss.total()."
        )

    def __float__(self) -> float:
        return self.total().item()

    def __format__(self, form: str) -> str:
        return format(self.total(), form) if form else super().__format__(form)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (torch.isnan, torch.isinf, torch.isfinite):
            # For an operator (tensor * components), torch then calls the method of this class instead.
            raise TypeError(f"{function.__name__} does not take the Components of a loss: give loss.total().")
        return function(args[0].total(), *args[1:], **(kwargs or {}))

    def __mul__(self, factor: Any) -> Components:
        return Components({name: value * factor for name, value in self.items()}) if _scalar(factor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Components:
        return (
            Components({name: value / divisor for name, value in self.items()}) if _scalar(divisor) else NotImplemented
        )

    def __add__(self, other: Any) -> Components:
        if _scalar(other):
            if isinstance(other, Real) and other == 0:
                return Components(self)
            # A number becomes a tensor on the device of the other terms.
            other = {ADDED: other + torch.zeros_like(next(iter(self.values())))}
        if not isinstance(other, Mapping):
            return NotImplemented
        added = dict(self)
        for name, value in other.items():
            added[name] = added[name] + value if name in added else value
        return Components(added)

    __radd__ = __add__

    def detached(self, total: Tensor) -> Components:
        """Returns these terms without their graph, but for the gradients that ``total``, their sum, still carries.

        The first term carries those.
        """
        first, *_ = self
        values = {name: value.detach() for name, value in self.items()}
        return Components(values | {first: values[first] + (total - total.detach())})

    def driven_by(self, total: Tensor) -> Components:
        """Returns these terms with ``total``, the loss () that a gradient cache has returned, as their graph.

        The cache holds the gradients of the sum, so all terms may be multiplied by one common factor. Different factors
        raise RuntimeError in the backward pass.
        """
        values = torch.stack([value.detach() for value in self.values()])
        return Components(zip(self, _CommonFactor.apply(total, values).unbind(), strict=True))


def _scalar(value: Any) -> bool:
    """Returns True for a number or a 0-d tensor."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0)


class _CommonFactor(torch.autograd.Function):
    """Returns ``values`` [K] as they are; hands their gradient, which must be the same for all, on to ``total`` ()."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, values: Tensor) -> Tensor:
        ctx.dtype = total.dtype
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        first = grad_output[0]
        if not dry(grad_output) and not torch.allclose(
            grad_output, first.expand_as(grad_output), rtol=0.0, atol=0.0, equal_nan=True
        ):
            raise RuntimeError(
                "the terms of a WeightedLoss with mini_batch_size share one gradient cache, so one factor has to "
                f"multiply them all, but their gradients are {grad_output.tolist()}. Sum all of them before the "
                "backward pass, and put what weighs one against another into the weights of the WeightedLoss."
            )
        return first.to(ctx.dtype), None
