"""Checks the version of sentence-transformers when it is imported, before anything that only newer versions have.

What differs between the versions that are supported stands in :mod:`sbert_kernels._stock`.

Raises:
    ImportError: sentence-transformers is not installed, or older than 6.0; the message says what was found and wanted.
"""

from __future__ import annotations

import importlib.metadata

OLDEST = (6, 0)
WANTED = "sbert-kernels needs sentence-transformers >= 6.0, < 7 (pip install -U sentence-transformers)"


def check_sentence_transformers() -> None:
    """Raises ImportError if sentence-transformers is not installed, or too old."""
    try:
        version = importlib.metadata.version("sentence-transformers")
    except importlib.metadata.PackageNotFoundError:
        try:  # it may be a source tree on the path
            from sentence_transformers import __version__ as version
        except ModuleNotFoundError as error:
            if error.name != "sentence_transformers":
                raise
            raise ImportError(f"{WANTED}, and found none.") from None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(f"{WANTED}, and found {version}.")


check_sentence_transformers()
