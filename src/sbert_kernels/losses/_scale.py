"""A scale or temperature of a loss: how it is read, and how it is written into a configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..values import readable
from ._learned import note_use


def learnable(scale: Any) -> bool:
    return isinstance(scale, Tensor) and scale.requires_grad


def as_scale(scale: Any) -> Any:
    """Returns a scale as the operation takes it: a tensor of one element as a 0-d float tensor."""
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        return scale
    note_use(scale)
    scale = scale.reshape(())
    return scale if scale.is_floating_point() else scale.to(torch.get_default_dtype())


def plain_scale(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose scale or temperature, if it is a tensor, is written as the number that it is now.

    None where the tensor holds no data.
    """

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.item() if readable(value) else None

    return {key: plain(value) if key in ("scale", "temperature") else value for key, value in config.items()}
