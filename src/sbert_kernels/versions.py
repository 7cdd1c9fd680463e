"""Importing this module checks the version of sentence-transformers, before anything that only newer ones have.

Raises:
    ImportError: It is not installed, or older than 6.0; the message names what was found and what is wanted.
"""

from __future__ import annotations

import importlib.metadata

OLDEST = (6, 0)
WANTED = "sbert-kernels needs sentence-transformers >= 6.0, < 7 (pip install -U sentence-transformers)"


def check_sentence_transformers() -> None:
    """Raise the ImportError that this module's docstring speaks of, if there is reason to."""
    try:
        version = importlib.metadata.version("sentence-transformers")
    except importlib.metadata.PackageNotFoundError:
        try:  # a source tree on the path
            from sentence_transformers import __version__ as version
        except ModuleNotFoundError as error:
            if error.name != "sentence_transformers":
                raise
            raise ImportError(f"{WANTED}, and found none.") from None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(f"{WANTED}, and found {version}.")


check_sentence_transformers()
