"""What the fused loss stages of the cached losses share: gradients up to the embeddings, and of a learnable scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _learnable(scale: Any) -> bool:
    return isinstance(scale, Tensor) and scale.requires_grad


def backward_to_leaves(loss: Tensor, reps: list[list[Tensor]], scale: Any) -> Tensor:
    """Put the gradient of each mini-batch of embeddings into its ``.grad``; return the detached loss.

    The loss returned still carries the gradient of a learnable ``scale`` (or temperature), which must not be
    accumulated here: what multiplies the loss is not known yet.
    """
    leaves = [rep for column in reps for rep in column]
    gradients = torch.autograd.grad(loss, [*leaves, scale] if _learnable(scale) else leaves)
    for leaf, gradient in zip(leaves, gradients, strict=False):
        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    loss = loss.detach()
    return loss + (scale - scale.detach()) * gradients[-1] if _learnable(scale) else loss


def with_scale_gradient(loss: nn.Module, scale: Any, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """Run ``forward`` of a cached loss so that its result also carries the gradient of a learnable scale.

    The gradient cache detaches the value of ``calculate_loss`` and returns a new leaf. The value itself, which carries
    the scale's gradient, is caught on its way, whoever has wrapped the method, and tied to the result.
    """
    if not (_learnable(scale) and torch.is_grad_enabled()):
        return forward(*args)
    stage, own = loss.calculate_loss, loss.__dict__.get("calculate_loss")
    values: list[Tensor] = []

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
    return result + (values[-1] - values[-1].detach())
