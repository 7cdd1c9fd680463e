"""Reads the scale or temperature of a loss, and writes it into the loss's configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops._checks import number
from ..values import readable
from ._learned import note_use


def learnable(scale: Any) -> bool:
    """Returns True if a scale, or any other option of a loss, is a tensor that requires a gradient."""
    return isinstance(scale, Tensor) and scale.requires_grad


def check_scale(scale: Any) -> Any:
    """Returns a scale, after a check that it is one number, or a tensor of one.

    Raises:
        TypeError, ValueError: It is something else.
    """
    if not isinstance(scale, Tensor):
        number("scale", scale)
    elif scale.numel() != 1:
        raise ValueError(f"scale must be one number, got a tensor of shape {list(scale.shape)}.")
    return scale


def as_scale(scale: Any) -> Any:
    """Returns a scale as the operation takes it: a tensor of one element becomes a 0-d float tensor."""
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        return scale
    note_use(scale)
    scale = scale.reshape(())
    return scale if scale.is_floating_point() else scale.to(torch.get_default_dtype())


def plain_scale(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration whose scale or temperature, if it is a tensor, is the number that it holds now.

    It is None where the tensor holds no data.
    """

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.item() if readable(value) else None

    return {key: plain(value) if key in ("scale", "temperature") else value for key, value in config.items()}
