"""Holds every environment variable of the library, and a context manager that overrides them for a block of code.

Variables are read at each call, so a change between two training steps takes effect at once. An override
(:func:`override`) wins over the environment, and is local to the current thread or asyncio task.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .logs import log_once

logger = logging.getLogger(__name__)

MIB = 1 << 20


def _parse_flag(text: str) -> bool:
    """Returns a flag as a bool. A ValueError says what was wanted, here and in the other functions for ``parse``."""
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("", "0", "false", "no", "off"):
        return False
    raise ValueError("1 or 0")


def _parse_optional_flag(text: str) -> bool | None:
    """Returns a flag as a bool, or None for an empty text."""
    return _parse_flag(text) if text.strip() else None


def _parse_architectures(text: str) -> str:
    """Returns the names of GPU architectures as nvcc writes them after ``sm_``, in a fixed order, none twice."""
    names = {name.strip().lower() for name in text.split(",") if name.strip()}
    if not names or not all(re.fullmatch(r"[1-9]\d{1,2}[af]?", name) for name in names):
        raise ValueError("names like 90a, with commas between them")
    return ",".join(sorted(names, key=lambda name: (int(name.rstrip("af")), name)))


def _parse_bytes(text: str) -> int:
    """Returns a positive number of bytes."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value <= 0:
        raise ValueError("a positive integer, a number of bytes")
    return value


def _parse_name(text: str) -> str | None:
    """Returns a name, or None for an empty text."""
    return text.strip() or None


MATMUL_PRECISIONS = ("float32", "tf32", "tf32x3", "bfloat16x3", "bfloat16")
WEIGHTS = ("sweep", "weigh")


def _one_of(allowed: tuple[str, ...]) -> Callable[[str], str | None]:
    """Returns a function that reads one of these names in any case, or None from an empty text."""

    def parse(text: str) -> str | None:
        name = text.strip().lower()
        if name and name not in allowed:
            raise ValueError(f"one of {list(allowed)}")
        return name or None

    return parse


@dataclass(frozen=True)
class Variable:
    """Describes one setting.

    Attributes:
        environment: The name of the environment variable.
        default: The value while the variable is not set.
        parse: Reads the text of the variable; a ValueError of it says what was wanted.
        meaning: What the setting does, in one sentence, for users.
        former: The name that the variable had in the version before. It is still read, with one logged line.
    """

    environment: str
    default: Any
    parse: Callable[[str], Any]
    meaning: str
    former: str | None = None


VARIABLES: dict[str, Variable] = {
    "disable": Variable(
        "SBERT_KERNELS_DISABLE", False, _parse_flag, "1 makes every drop-in loss compute exactly as its stock class."
    ),
    "backend": Variable(
        "SBERT_KERNELS_BACKEND", None, _parse_name, "Name of the backend to use; unset chooses one per call."
    ),
    "block_bytes": Variable(
        "SBERT_KERNELS_BLOCK_BYTES",
        None,
        _parse_bytes,
        "The most bytes of similarity matrices in memory at a time; unset is 64 MiB, or for the GPU kernels 512 MiB "
        "and, where 4096 rows need more, up to a sixteenth of the GPU's memory.",
    ),
    "compile": Variable(
        "SBERT_KERNELS_COMPILE", True, _parse_flag, "0 forbids compiling the CPU and CUDA kernels on first use."
    ),
    "cuda": Variable(
        "SBERT_KERNELS_CUDA",
        None,
        _parse_optional_flag,
        "1 uses the CUDA kernels where they serve, and compiles them where they are missing: into the wheel when one "
        "is built, else on first use, which takes some minutes. Unset, those that are there serve calls that ask for "
        "them (backend='cuda'), as they have not been timed on a card yet. 0 does without them.",
    ),
    "cuda_archs": Variable(
        "SBERT_KERNELS_CUDA_ARCHS",
        "90a",
        _parse_architectures,
        "The GPU architectures to compile the CUDA kernels for, with commas between them.",
    ),
    "cache": Variable(
        "SBERT_KERNELS_CACHE",
        None,
        _parse_name,
        "Where compiled kernels, and what was found of them, are kept; unset is the user's cache directory.",
    ),
    "matmul": Variable(
        "SBERT_KERNELS_MATMUL",
        None,
        _one_of(MATMUL_PRECISIONS),
        "The matmul precision of float32 embeddings: float32, bfloat16x3 or bfloat16, on a GPU also tf32 or tf32x3; a "
        "CPU refuses one that it lacks, a GPU logs which one it takes instead; unset follows torch.autocast, and "
        "outside of it torch.set_float32_matmul_precision().",
        former="SBERT_KERNELS_PRODUCTS",
    ),
    "weights": Variable(
        "SBERT_KERNELS_WEIGHTS",
        None,
        _one_of(WEIGHTS),
        "How the Triton kernels make softmax weights: sweep (one kernel multiplies and weighs) or weigh (a kernel "
        "weighs what the vendor's product wrote); unset takes the one that should be faster. weigh leaves the CUDA "
        "kernels out, which sweep.",
    ),
    "autotune": Variable(
        "SBERT_KERNELS_AUTOTUNE",
        False,
        _parse_flag,
        "1 times the ways and tile sizes of the Triton kernels at the first call of each kind and size.",
    ),
    "selfcheck": Variable(
        "SBERT_KERNELS_SELFCHECK",
        True,
        _parse_flag,
        "0 lets the kernels of a GPU serve without having been compared with torch operations on it, and after they "
        "were found wrong.",
    ),
}

# What takes the place of variables that are gone.
REMOVED = {
    "SBERT_KERNELS_STRATEGY": "it is gone with the strategies; SBERT_KERNELS_WEIGHTS chooses how weights are made.",
}
# Read by setup.py alone.
OTHER_VARIABLES = ("SBERT_KERNELS_BUILD",)

_OVERRIDES: ContextVar[dict[str, Any] | None] = ContextVar("sbert_kernels_overrides", default=None)


def get(name: str) -> Any:
    """Returns the value of a setting now: that of an override, else of the environment, else the default.

    Args:
        name: A key of :data:`VARIABLES`.

    Raises:
        ValueError: The environment variable holds text that cannot be read.
    """
    _look_for_misspelt()
    overrides = _OVERRIDES.get()
    if overrides and name in overrides:
        return overrides[name]
    variable = VARIABLES[name]
    environment = _name_in_use(variable)
    text = os.environ.get(environment)
    if text is None:
        return variable.default
    try:
        return variable.parse(text)
    except ValueError as wanted:
        raise ValueError(f"{environment}={text!r} cannot be read: expected {wanted}.") from None


def _name_in_use(variable: Variable) -> str:
    """Returns the name to read a setting from: the former one if only that is set, which is logged once."""
    name, former = variable.environment, variable.former
    if former is None or former not in os.environ:
        return name
    if name in os.environ:
        log_once(logger, f"{former} is the former name of {name}: both are set, and {name} is used. Unset {former}.")
        return name
    instead = f"{name}={os.environ[former]}"
    log_once(logger, f"{former} is the former name of {name}, and this is the last version to read it: set {instead}.")
    return former


_looked_at: int | None = None  # the number of environment variables at the last look


def _look_for_misspelt() -> None:
    """Logs one line for each environment variable that is named nearly like ours, as it would have no effect."""
    global _looked_at
    if len(os.environ) == _looked_at:  # this runs at every call, and has to be cheap
        return
    _looked_at = len(os.environ)
    known = [*(variable.environment for variable in VARIABLES.values()), *OTHER_VARIABLES]
    former = {variable.former for variable in VARIABLES.values()}
    for name in os.environ:
        plain = name.upper().replace("-", "_")
        if name not in known and name not in former and plain.startswith(("SBERT_KERNEL", "SBERTKERNEL")):
            closest = difflib.get_close_matches(plain, known, n=1, cutoff=0.8)
            hint = REMOVED.get(name) or (
                f"is it {closest[0]}?" if closest else "`python -m sbert_kernels info` lists all."
            )
            log_once(logger, f"The environment variable {name} has no meaning to sbert-kernels: {hint}")


def block_bytes(usual: int = 64 * MIB) -> int:
    """Returns the most bytes of similarity matrices to hold at a time: what is set, else the caller's ``usual``."""
    value = get("block_bytes")
    return usual if value is None else value


@contextmanager
def override(**values: Any) -> Iterator[None]:
    """Overrides settings for a ``with`` block, by the names that are the keys of :data:`VARIABLES`.

    Raises:
        ValueError: A name is not among them.
    """
    unknown = set(values) - set(VARIABLES)
    if unknown:
        raise ValueError(f"unknown setting {sorted(unknown)}: expected some of {sorted(VARIABLES)}.")
    token = _OVERRIDES.set({**(_OVERRIDES.get() or {}), **values})
    try:
        yield
    finally:
        _OVERRIDES.reset(token)
