"""Reads arguments that have to be integers, in any form that a user has the number."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def as_integer(value: Any) -> int | None:
    """Returns the int that a number equals, or None if it equals none.

    Args:
        value: A number of any type (1e4, True, Decimal(3)), or a tensor or an array of one element. A text is no
            number.
    """
    if isinstance(value, (Tensor, np.ndarray)):
        if value.size != 1 if isinstance(value, np.ndarray) else value.numel() != 1:
            return None
        value = value.item()
    if isinstance(value, (str, bytes)):
        return None
    try:
        number = int(value)
        return number if number == value else None
    except (TypeError, ValueError, OverflowError):  # it is no number, or not finite
        return None
