"""Logs a line once for something that is called at every training step, and puts values into words for messages."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from typing import Any

_logged: set[tuple[str, str]] = set()


def log_once(logger: logging.Logger, message: str, level: int = logging.WARNING) -> None:
    """Logs a line, a warning if no other level is given, once for each logger and message in this process."""
    if (logger.name, message) not in _logged:
        _logged.add((logger.name, message))
        logger.log(level, message)


def described(value: Any) -> str:
    """Returns a short text for a value, for an error or a log line: never a whole model or all numbers of a tensor."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {described(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        items = ", ".join([*map(described, value[:6]), *["..."] * (len(value) > 6)])
        return f"[{items}]" if isinstance(value, list) else f"({items})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{kind} of shape {list(value.shape)} and {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    # A function by its name. A torch module by its class, since its repr lists all that is in it.
    if callable(value):
        return getattr(value, "__name__", kind)
    return reprlib.repr(value)
