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


def backward_to_reps(loss: Tensor, reps: list[list[Tensor]], *parameters: Any) -> Tensor:
    """Back-propagate a loss up to its mini-batches of embeddings, and from there; return the detached loss.

    The loss returned still carries the gradients of those of ``parameters`` that are learnable (a scale, a weight),
    which must not be accumulated here: what multiplies the loss is not known yet.
    """
    own = [parameter for parameter in parameters if learnable(parameter)]
    wanted = [rep for column in reps for rep in column if rep.requires_grad]
    if not wanted and not own:
        loss.backward()  # torch says what is missing
    gradients = torch.autograd.grad(loss, [*wanted, *own], allow_unused=True)
    found = [(rep, gradient) for rep, gradient in zip(wanted, gradients, strict=False) if gradient is not None]
    if found:
        # Into .grad where the embeddings are leaves, else into the caller's graph.
        torch.autograd.backward(*map(list, zip(*found, strict=True)))
    loss = loss.detach()
    for parameter, gradient in zip(own, gradients[len(wanted) :], strict=True):
        if gradient is not None:
            loss = loss + ((parameter - parameter.detach()) * gradient).sum()
    return loss


# The method of a loss is replaced while a forward pass runs.
_catching = threading.RLock()


def catching_stage(
    loss: nn.Module, forward: Callable[..., Tensor], *args: Any, scalar: Callable[[Any], Tensor] = lambda value: value
) -> tuple[Tensor, list[Any]]:
    """Run ``forward`` of a cached loss; return its result, and what its ``calculate_loss`` returned on the way.

    The gradient cache detaches the value of ``calculate_loss`` and returns a new leaf, so that whatever else the value
    carries has to be caught, whoever has wrapped the method. The cache gets ``scalar`` of the value.
    """
    values: list[Any] = []
    with _catching:
        stage, own = loss.calculate_loss, loss.__dict__.get("calculate_loss")

        def caught(*stage_args: Any, **stage_kwargs: Any) -> Tensor:
            values.append(stage(*stage_args, **stage_kwargs))
            return scalar(values[-1])

        loss.calculate_loss = caught
        try:
            result = forward(*args)
        finally:
            if own is None:
                del loss.calculate_loss
            else:
                loss.calculate_loss = own
    return result, values


def with_scale_gradient(loss: nn.Module, scale: Any, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """Run ``forward`` of a cached loss so that its result also carries the gradient of a learnable scale."""
    if not (learnable(scale) and torch.is_grad_enabled()):
        return forward(*args)
    result, values = catching_stage(loss, forward, *args)
    for value in values:
        result = result + (value - value.detach())
    return result
