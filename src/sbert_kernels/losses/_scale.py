"""A learnable scale (or temperature) of a loss: how it is read, and how ranks agree on its gradient.

sentence-transformers wraps the model alone for distributed training, never the loss, so nothing else averages the
gradients of a loss's own parameters over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..values import readable


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
    """A configuration whose scale or temperature, if it is a tensor, is written as the number that it is now.

    None where the tensor holds no data.
    """

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.item() if readable(value) else None

    return {key: plain(value) if key in ("scale", "temperature") else value for key, value in config.items()}
