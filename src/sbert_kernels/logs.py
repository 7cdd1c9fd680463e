"""Log lines for users who call something at every training step, and how they and errors name a value."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from typing import Any

_logged: set[tuple[str, str]] = set()


def log_once(logger: logging.Logger, message: str) -> None:
    """A warning, once per logger, message and process."""
    if (logger.name, message) not in _logged:
        _logged.add((logger.name, message))
        logger.warning(message)


def described(value: Any) -> str:
    """A value in the words of an error or a log line: never a whole model, nor all the numbers of a tensor."""
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
    # A function by its name; a module, whose repr is all that is in it, by its class.
    if callable(value):
        return getattr(value, "__name__", kind)
    return reprlib.repr(value)
