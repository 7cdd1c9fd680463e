"""What the autograd functions of the operations share: scalars whose gradients are known with their value, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx


def learnable(name: str, inputs: Sequence[Any]) -> list[Tensor]:
    """Those of a function's inputs that a gradient is to reach.

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


def handle_of(tensors: Sequence[Tensor]) -> Tensor:
    """A zero that depends on all of these tensors, for the graph of a gradient to hang on, without keeping them alive.

    Whichever inputs or parameters a second derivative is asked for, its way to them leads through this.
    """
    return sum((t[:0] if t.dim() else t.expand(0)).sum() for t in tensors)


def destinations_of(tensors: Sequence[Any]) -> list[tuple[torch.dtype, torch.device] | None]:
    """Type and device that each input's gradient must have."""
    return [(t.dtype, t.device) if isinstance(t, Tensor) else None for t in tensors]


def scaled(
    name: str,
    gradients: Sequence[Tensor | None],
    destinations: Sequence[tuple[torch.dtype, torch.device] | None],
    wanted: Sequence[bool],
    grad_output: Tensor,
    handle: Tensor,
) -> list[Tensor | None]:
    """Saved gradients of a loss, times that of the loss, as its backward pass returns them."""
    in_place = _graph_is_freed()
    results: list[Tensor | None] = []
    for gradient, destination, want in zip(gradients, destinations, wanted, strict=True):
        if gradient is None or not want:
            results.append(None)
            continue
        dtype, device = destination
        product = gradient.mul_(grad_output) if in_place else gradient * grad_output
        results.append(product.to(dtype=dtype, device=device))
    return once(name, results, handle)


def once(name: str, gradients: list[Tensor | None], handle: Tensor) -> list[Tensor | None]:
    """Gradients that raise when they are differentiated themselves."""
    if torch.is_grad_enabled():  # create_graph: a gradient without a node would look like a constant
        return [None if g is None else _NoSecondDerivative.apply(name, g, handle) for g in gradients]
    return gradients


def _graph_is_freed() -> bool:
    """Whether the backward pass that runs now is the last to see the saved tensors, and may use their memory."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return not torch.compiler.is_compiling() and keeps_graph is not None and not keeps_graph()


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on a gradient; raises when anything is differentiated through it."""

    @staticmethod
    def forward(ctx: FunctionCtx, name: str, gradient: Tensor, handle: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.name} is differentiable once; for a second derivative (a gradient penalty) use the stock loss."
        )
