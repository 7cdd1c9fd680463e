"""Checks that the operations share: each raises an error that names the argument, what came and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..logs import described

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError unless the value is one of those that are allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")


def number(name: str, value: Any) -> float:
    """Returns a number as Python has it, from a number of Python's or numpy's, or an array or tensor of one element."""
    if type(value) in (float, int):
        return cast(float, value)
    plain = value
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
        plain = value.item()
    if not isinstance(plain, Real):
        raise TypeError(f"{name} must be a number, got {described(value)}.")
    return cast(float, plain)  # a number of any of Python's kinds


def constant(name: str, value: Any) -> float:
    """Returns the number as :func:`number` does, and raises ValueError if it is a tensor that expects a gradient."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} requires a gradient, which it does not get: give a number, or its detach().")
    return number(name, value)


def floating(name: str, value: Any) -> None:
    """Raise TypeError unless the value is a dense tensor of floating-point numbers."""
    if isinstance(value, Tensor) and value.dtype in _FLOATS and value.layout == torch.strided:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}.")
    raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {value.dtype}.")


def vectors(name: str, value: Any, filled: bool = True) -> None:
    """Raise an error unless the value is a matrix of embeddings; ``filled``: it must have a row."""
    floating(name, value)
    if value.dim() != 2 or value.shape[1] == 0 or (filled and value.shape[0] == 0):
        wanted = "[rows, dimension] and not be empty" if filled else "[rows, dimension]"
        raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}.")


def columns(name: str, value: Any, wanted: str, filled: bool = True) -> tuple[Tensor, ...]:
    """Returns one matrix of embeddings, or a sequence of them, as a tuple."""
    if not isinstance(value, (Tensor, Sequence)):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(value).__name__}.")
    found = (value,) if isinstance(value, Tensor) else tuple(value)
    if not found:
        raise ValueError(f"{name} is empty: {wanted}.")
    for index, column in enumerate(found):
        vectors(f"{name}[{index}]", column, filled)
    return found


def alike(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless two matrices can be used together: same dimension and device, matching dtypes."""
    if value.shape[1] == other.shape[1] and value.dtype == other.dtype and value.device == other.device:
        return
    for attribute, got, wanted in (
        ("dimension", value.shape[1], other.shape[1]),
        ("dtype", value.dtype, other.dtype),
        ("device", value.device, other.device),
    ):
        # float16, bfloat16 and float32 are all computed in float32, side by side as well.
        mixed = attribute == "dtype" and torch.float64 not in (got, wanted)
        if got != wanted and not mixed:
            raise ValueError(f"{name} has {attribute} {got}, expected {wanted}, that of {other_name}.")


def row_weights(value: Any, rows: int, device: torch.device) -> None:
    """Raise an error unless the value is None or a weight for each row, [rows]."""
    if value is None:
        return
    floating("weights", value)
    if list(value.shape) != [rows] or value.device != device:
        raise ValueError(f"weights must have shape [{rows}] on {device}, got {list(value.shape)} on {value.device}.")


def scale_type(scale: Any) -> float | Tensor:
    """Returns a scale as a Python number, or as the tensor that it is, whose value is not read."""
    if not isinstance(scale, Tensor):
        return number("scale", scale)
    if scale.dim() != 0 or not scale.is_floating_point():
        raise ValueError(
            f"scale must be a number or a 0-d floating-point tensor, got {list(scale.shape)} of {scale.dtype}."
        )
    return scale
