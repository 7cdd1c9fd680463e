"""Tells whether tensors hold values that may be read.

They may not while a graph is traced, or in a dry run: tensors on "meta" or of torch's FakeTensorMode, as in a memory
estimate, in export or in an initialisation on "meta", have shapes and dtypes only. Code that reads a value, to check it
or to decide by it, asks :func:`readable` first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

_MODES = torch._C._TorchDispatchModeKey
_WITHOUT_VALUES = (_MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL)
_NOTHING = nullcontext()
_AUTOCAST_TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_PLAIN = (Tensor, torch.nn.Parameter)  # these types are never fake; most tensors are found here, without a search


def readable(*values: Any) -> bool:
    """Returns True if all tensors among the values hold data that may be read now."""
    if torch.compiler.is_compiling():
        return False
    for mode in _WITHOUT_VALUES:
        if torch._C._get_dispatch_mode(mode) is not None:
            return False
    for value in values:
        if isinstance(value, Tensor) and (value.is_meta or (type(value) not in _PLAIN and is_fake(value))):
            return False
    return True


def dry(*values: Any) -> bool:
    """Returns True in a dry run: values are not :func:`readable`, and torch.compile is not the reason.

    torch.compile runs what it cannot trace with real values. So code that does something else when there are no values
    must not do so under torch.compile.
    """
    return not torch.compiler.is_compiling() and not readable(*values)


def recorded() -> bool:
    """Returns True while make_fx records a graph, which will run with other data."""
    return torch._C._get_dispatch_mode(_MODES.PROXY) is not None


def autocast_type(device: torch.device) -> str | None:
    """Returns the type that autocast now gives matrix products on a device, "bfloat16" or "float16", or None.

    None outside of autocast, and where a device has none ("meta").
    """
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return _AUTOCAST_TYPES.get(torch.get_autocast_dtype(device.type))


def float32_matmul_precision(device_type: str) -> str:
    """Returns what torch's products of float32 do now on a type of device: "highest", "high" or "medium".

    That is `torch.get_float32_matmul_precision()`, which raises an error once the newer names in `torch.backends` were
    used: those are looked at then.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        backend = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
        return {"tf32": "high", "bf16": "medium"}.get(backend.matmul.fp32_precision, "highest")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context that switches autocast off on a type of device, if it is on ("meta" has none)."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return _NOTHING
    return torch.autocast(device.type, enabled=False)
