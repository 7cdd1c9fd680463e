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
        # Outside of both, as nearly always, no tensor has to be asked.
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise RuntimeError(f"{name} has no forward-mode derivative; use the stock loss for it.")
        if torch._C._functorch.peek_interpreter_stack() is not None and any(
            torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors
        ):
            # Inside, a tensor does not tell that its gradient is wanted.
            raise RuntimeError(f"{name} does not support torch.func transforms; use the stock loss for them.")
    return [t for t in tensors if t.requires_grad] if torch.is_grad_enabled() else []


def anchor(like: Tensor) -> Tensor:
    """Returns an empty tensor, which a loss's function returns beside the loss and saves for its backward pass.

    It is what a gradient is made to depend on (:func:`once`): saved as an output, it comes back as a result of the
    function, and so of everything that the loss depends on. The loss itself would do, if nobody changed it in place.
    """
    return like.new_empty(0)


def double_backward_guard(tensors: Sequence[Tensor]) -> Tensor:
    """Returns a zero that depends on all of the tensors, for :func:`once` where there is no :func:`anchor`."""
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
    """Returns the saved gradients of a loss times the gradient of the loss, as its backward pass returns them.

    Each takes one kernel: a type that is narrower than the saved gradient's is rounded to as the product is written.
    """
    in_place, plain = _graph_is_freed(), torch.is_grad_enabled() or torch.compiler.is_compiling()
    if in_place and grad_output.is_cuda and torch.cuda.is_current_stream_capturing():
        in_place = False  # what is captured runs again, and not always with the forward pass before it
    results: list[Tensor | None] = []
    for gradient, destination, want in zip(gradients, destinations, wanted, strict=True):
        if gradient is None or not want:
            results.append(None)
            continue
        assert destination is not None  # what has a gradient is a tensor
        dtype, device = destination
        if dtype != gradient.dtype and device == gradient.device and not plain:
            results.append(torch.mul(gradient, grad_output, out=gradient.new_empty(gradient.shape, dtype=dtype)))
            continue
        # Detached, because a leaf keeps as its gradient what nobody else holds, and copies what is also saved here.
        product = gradient.mul_(grad_output).detach() if in_place else gradient * grad_output
        same = dtype == gradient.dtype and device == gradient.device
        results.append(product if same else product.to(dtype=dtype, device=device))
    return once(name, results, guard)


def once(name: str, gradients: list[Tensor | None], guard: Tensor) -> list[Tensor | None]:
    """Returns the gradients, which raise when they are differentiated themselves, and not as if they were constant.

    ``guard``: a small tensor that depends on all that the gradients depend on.
    """
    if torch.is_grad_enabled():  # create_graph
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
