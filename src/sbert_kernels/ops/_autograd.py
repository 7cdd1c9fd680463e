"""Parts that the autograd functions of the operations share; all are differentiable once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def learnable(name: str, inputs: Sequence[Any]) -> list[Tensor]:
    """Returns the inputs of a function that a gradient is to reach.

    Raises:
        RuntimeError: one of them carries a forward-mode derivative, or is inside of a torch.func transform.
    """
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    if not torch.compiler.is_compiling():
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise RuntimeError(f"{name} has no forward-mode derivative; use the stock loss for it.")
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
            # Inside, a tensor does not tell that its gradient is wanted.
            raise RuntimeError(f"{name} does not support torch.func transforms; use the stock loss for them.")
    return [t for t in tensors if t.requires_grad] if torch.is_grad_enabled() else []


def double_backward_guard(tensors: Sequence[Tensor]) -> Tensor:
    """Returns a zero that depends on all of the tensors, so that a second derivative raises instead of being zero.

    A gradient is made to depend on it. It is a sum of empty slices, so that it keeps no tensor in memory.
    """
    guard, *others = [(tensor[:0] if tensor.dim() else tensor.expand(0)).sum() for tensor in tensors]
    for other in others:
        guard = guard + other
    return guard


def destinations_of(tensors: Sequence[Any]) -> list[tuple[torch.dtype, torch.device] | None]:
    """Returns the type and the device that each input's gradient must have; None for an input that is no tensor."""
    return [(t.dtype, t.device) if isinstance(t, Tensor) else None for t in tensors]


def scaled(
    name: str,
    gradients: Sequence[Tensor | None],
    destinations: Sequence[tuple[torch.dtype, torch.device] | None],
    wanted: Sequence[bool],
    grad_output: Tensor,
    guard: Tensor,
) -> list[Tensor | None]:
    """Returns the saved gradients of a loss times the gradient of the loss, as its backward pass returns them."""
    in_place = _graph_is_freed()
    results: list[Tensor | None] = []
    for gradient, destination, want in zip(gradients, destinations, wanted, strict=True):
        if gradient is None or not want:
            results.append(None)
            continue
        assert destination is not None  # what has a gradient is a tensor
        dtype, device = destination
        product = gradient.mul_(grad_output) if in_place else gradient * grad_output
        results.append(product.to(dtype=dtype, device=device))
    return once(name, results, guard)


def once(name: str, gradients: list[Tensor | None], guard: Tensor) -> list[Tensor | None]:
    """Returns the gradients, which raise when they are differentiated themselves."""
    if torch.is_grad_enabled():  # create_graph: a gradient without a node would look like a constant
        return [None if g is None else _NoSecondDerivative.apply(name, g, guard) for g in gradients]
    return gradients


def _graph_is_freed() -> bool:
    """Returns True if no backward pass will see the saved tensors again, so that this one may overwrite them."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return not torch.compiler.is_compiling() and keeps_graph is not None and not keeps_graph()


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on a gradient; raises when anything is differentiated through it."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, guard: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.name} is differentiable once; for a second derivative (a gradient penalty) use the stock loss."
        )
