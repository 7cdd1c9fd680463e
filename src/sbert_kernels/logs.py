"""Log lines for users who call something at every training step."""

from __future__ import annotations

import logging

_logged: set[tuple[str, str]] = set()


def log_once(logger: logging.Logger, message: str) -> None:
    """A warning, once per logger, message and process."""
    if (logger.name, message) not in _logged:
        _logged.add((logger.name, message))
        logger.warning(message)
