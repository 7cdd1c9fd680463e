"""The terms of a loss by name, and the arithmetic that the wrappers of sentence-transformers do with a loss."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..values import dry

# What a training loop of one's own does with a loss, done to the sum of its terms.
OF_THE_SUM = frozenset(
    ("backward", "item", "detach", "tolist", "numpy", "cpu", "mean", "sum", "isnan", "isinf", "isfinite", "dim")
) | {"numel", "dtype", "device", "shape", "requires_grad", "grad_fn"}

# The term that holds what a wrapper adds to the loss, such as AdaptiveLayerLoss's divergence between layers.
ADDED = "added_by_wrapper"


class Components(dict[str, Tensor]):
    """0-d tensors by name whose sum is the loss, as the Trainer takes and logs them.

    Where a script of one's own treats a loss as a tensor (``loss.backward()``, ``loss.item()``, ``float(loss)``, ...),
    that is done to their sum. A gradient scaler takes tensors only: ``scaler.scale(loss.total())``.

    Times or divided by a number, plus others: what MatryoshkaLoss and AdaptiveLayerLoss do with a loss is done to its
    terms, so that their sum is always the same as if it had been done to the sum. Any other arithmetic is a TypeError.
    """

    __array_ufunc__ = None  # a numpy number leaves the arithmetic to this class

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
            # Of an operator, torch leaves it to this class then.
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
            # So that it is on the device of the others, a number too.
            other = {ADDED: other + torch.zeros_like(next(iter(self.values())))}
        if not isinstance(other, Mapping):
            return NotImplemented
        return Components(
            {
                name: self[name] + other[name] if name in self and name in other else (self | other)[name]
                for name in [*self, *(name for name in other if name not in self)]
            }
        )

    __radd__ = __add__

    def detached(self, total: Tensor) -> Components:
        """These terms without their graph; the first carries whatever gradient ``total``, their sum, still does."""
        first, *_ = self
        values = {name: value.detach() for name, value in self.items()}
        return Components(values | {first: values[first] + (total - total.detach())})

    def driven_by(self, total: Tensor) -> Components:
        """These terms, whose gradients go to ``total``, the loss that a gradient cache has returned.

        The cache holds gradients of the sum, which serve any factor common to all terms. Others raise in the backward
        pass.
        """
        values = torch.stack([value.detach() for value in self.values()])
        return Components(zip(self, _CommonFactor.apply(total, values).unbind(), strict=True))


def _scalar(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0)


class _CommonFactor(torch.autograd.Function):
    """Values [K], whose one common gradient is that of ``total`` ()."""

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
