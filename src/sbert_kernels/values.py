"""Whether tensors hold values that may be read: not while a graph is traced, nor in a dry run on tensors without data.

A dry run (meta tensors, torch's FakeTensorMode: memory estimates, export, initialisation on "meta") asks for shapes and
dtypes only. Whatever would read a value, to check it or to choose by it, asks :func:`readable` first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

_MODES = torch._C._TorchDispatchModeKey
_WITHOUT_VALUES = (_MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL)
_PLAIN = (Tensor, torch.nn.Parameter)  # most tensors are, and the question is asked at every step


def readable(*values: Any) -> bool:
    """Whether all tensors among the values hold data that may be looked at now."""
    if torch.compiler.is_compiling() or any(torch._C._get_dispatch_mode(mode) for mode in _WITHOUT_VALUES):
        return False
    return not any(
        isinstance(value, Tensor) and (value.is_meta or (type(value) not in _PLAIN and is_fake(value)))
        for value in values
    )


def dry(*values: Any) -> bool:
    """Whether this is a dry run: values are not :func:`readable`, and torch.compile is not the reason.

    That runs eagerly, with values, what it cannot trace: a decision made for want of them would be wrong there.
    """
    return not torch.compiler.is_compiling() and not readable(*values)


def recorded() -> bool:
    """Whether make_fx makes a graph now, which other data will go through."""
    return torch._C._get_dispatch_mode(_MODES.PROXY) is not None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off for a block, where the type of device has any; "meta" has none."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
