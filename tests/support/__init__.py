"""Helpers that several test files share; import them as ``support.MODULE``, from subprocesses too.

pytest puts the folder ``tests`` on the import path (``pythonpath`` in pyproject.toml). A helper that one file alone
needs stays in that file, and fixtures stay in ``conftest.py``.
"""

from __future__ import annotations

import pytest

# Before they are imported, for their assertions to show the values that they compared.
pytest.register_assert_rewrite("support.cached_losses", "support.gradcache", "support.numbers", "support.ranks")
