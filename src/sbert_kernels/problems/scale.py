"""The factor of the similarities, which may be a number, or a tensor that is on the host or on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """The factor of the similarities of one call (the inverse temperature), as the caller gave it.

    Attributes:
        given: A number, or a 0-d tensor, whose gradient the caller may want.
    """

    given: float | Tensor

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that was given, or None for a number."""
        return self.given if isinstance(self.given, Tensor) else None

    @property
    def on_device(self) -> Tensor | None:
        """The tensor, detached, if its value lies on a device where reading it would wait; None if it can be read."""
        tensor = self.tensor
        return None if tensor is None or tensor.device.type == "cpu" else tensor.detach()

    @property
    def value(self) -> float | None:
        """The number, or None if it lies on a device and reading it would wait."""
        return None if self.on_device is not None else self.read()

    def read(self) -> float:
        """Returns the number, for which it waits if it lies on a device."""
        return float(self.given.detach()) if isinstance(self.given, Tensor) else float(self.given)

    def factor(self, dtype: torch.dtype, device: torch.device) -> float | Tensor:
        """Returns the factor for torch operations on ``device``: a number, or a 0-d tensor if its value is unread."""
        on_device = self.on_device
        return self.read() if on_device is None else on_device.to(device, dtype)
