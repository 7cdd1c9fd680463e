"""The operators of the compiled extension (csrc/cpu), once it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ... import extension

_registered: set[str] = set()


def obstacle(fakes: Mapping[str, Callable[..., Any]]) -> str | None:
    """Why the extension cannot be used, or None; then the operators named have these fakes, for tracing."""
    reason = extension.load()
    if reason is None:
        for name, fake in fakes.items():
            if name not in _registered:
                _registered.add(name)
                torch.library.register_fake(f"sbert_kernels::{name}", fake)
    return reason
