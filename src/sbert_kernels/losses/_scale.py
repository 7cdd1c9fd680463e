"""A learnable scale (or temperature) of a loss: how it is read, and how its gradient reaches the optimizer.

sentence-transformers wraps the model alone for distributed training, never the loss, so nothing averages the gradients
of a loss's own parameters over the ranks; and its gradient cache accumulates them in the forward pass, before anything
can multiply the loss. Both are taken care of here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def learnable(scale: Any) -> bool:
    return isinstance(scale, Tensor) and scale.requires_grad


def as_scale(scale: Any) -> Any:
    """A scale as the operation takes it: tensors of one element become 0-d floats, averaged over ranks if learnable."""
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        return scale
    scale = scale.reshape(())
    if not scale.is_floating_point():
        scale = scale.to(torch.get_default_dtype())
    if learnable(scale) and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        scale = _AveragedOverRanks.apply(scale)
    return scale


class _AveragedOverRanks(torch.autograd.Function):
    """The identity, whose gradient is the mean of the ranks' gradients, as data-parallel training has it."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor) -> Tensor:
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        gradient = grad_output.clone()
        dist.all_reduce(gradient)
        return gradient / dist.get_world_size()


def plain_scale(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose scale or temperature, if it is a tensor, is written as the number that it is now."""
    return {
        key: value.item() if key in ("scale", "temperature") and isinstance(value, Tensor) else value
        for key, value in config.items()
    }


def backward_to_reps(loss: Tensor, reps: list[list[Tensor]], scale: Any) -> Tensor:
    """Back-propagate a loss up to its mini-batches of embeddings, and from there; return the detached loss.

    The loss returned still carries the gradient of a learnable ``scale``, which must not be accumulated here: what
    multiplies the loss is not known yet.
    """
    wanted = [rep for column in reps for rep in column if rep.requires_grad]
    inputs = [*wanted, scale] if learnable(scale) else wanted
    if not inputs:
        loss.backward()  # torch says what is missing
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    found = [(rep, gradient) for rep, gradient in zip(wanted, gradients, strict=False) if gradient is not None]
    if found:
        # Into .grad where the embeddings are leaves, else into the caller's graph.
        torch.autograd.backward(*map(list, zip(*found, strict=True)))
    loss = loss.detach()
    if learnable(scale) and gradients[-1] is not None:
        loss = loss + ((scale - scale.detach()) * gradients[-1]).reshape(())
    return loss


# The method of a loss is replaced while a forward pass runs.
_catching = threading.RLock()


def with_scale_gradient(loss: nn.Module, scale: Any, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """Run ``forward`` of a cached loss so that its result also carries the gradient of a learnable scale.

    The gradient cache detaches the value of ``calculate_loss`` and returns a new leaf. The value itself, which carries
    the scale's gradient, is caught on its way, whoever has wrapped the method, and tied to the result.
    """
    if not (learnable(scale) and torch.is_grad_enabled()):
        return forward(*args)
    values: list[Tensor] = []
    with _catching:
        stage, own = loss.calculate_loss, loss.__dict__.get("calculate_loss")

        def caught(*stage_args: Any, **stage_kwargs: Any) -> Tensor:
            values.append(stage(*stage_args, **stage_kwargs))
            return values[-1]

        loss.calculate_loss = caught
        try:
            result = forward(*args)
        finally:
            if own is None:
                del loss.calculate_loss
            else:
                loss.calculate_loss = own
    for value in values:
        result = result + (value - value.detach())
    return result
