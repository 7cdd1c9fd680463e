"""Features that are no tensors: which of them have one entry a row, and how these go with their rows.

Input modules of users put texts, spans or images of different sizes beside the tensors, as Python lists. A list, a
tuple or an array with as many entries as its column has rows has one a row, and is cut and put in order as the rows
are. Everything else belongs to all rows and is handed on as it is. Rows that hide deeper inside are refused by name.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What sentence-transformers itself says of all rows, whatever form it takes: a pair of modalities is no pair of rows.
OF_ALL_ROWS = frozenset({"prompt_length", "task", "modality"})


def listed(features: Mapping[str, Any], rows: int, column: int) -> frozenset[str]:
    """The keys of the features that are no tensors and have one entry a row.

    Args:
        features: Those of one column of the batch, with so many rows.
        column: Its position, for messages.

    Raises:
        ValueError: a feature that may have one entry a row, but in a way not known here.
    """
    found = set()
    for key, value in features.items():
        if isinstance(value, Tensor) or key in OF_ALL_ROWS:
            continue
        if _is_sequence(value) and len(value) == rows:
            # As many layers as there are rows, say, and in each of them tensors of all rows.
            doubtful = _is_container(value[0]) and _hides_rows(value[0], rows, tensors_only=True)
            found.add(key)
        else:
            doubtful = (_is_other_sequence(value) and len(value) == rows) or _hides_rows(value, rows)
        if doubtful and rows > 1:  # a single row is never cut
            raise ValueError(
                f"column {column} of the batch: {key!r}, a {type(value).__name__}, may have one entry for each of the "
                f"{rows} rows, but a gradient cache cannot tell how to cut it into mini-batches. Give a tensor, an "
                "array, a list or a tuple with one entry a row, under a key of its own; what belongs to all rows is "
                "better kept in the encoder."
            )
    return frozenset(found)


def take(value: Any, rows: np.ndarray) -> Any:
    """Some entries of a listed feature: the same type, and nothing that a module writes into reaches the batch."""
    if isinstance(value, np.ndarray):
        return value[rows]
    entries = [_own(value[row]) for row in rows.tolist()]
    return tuple(entries) if isinstance(value, tuple) else entries


def join(parts: Sequence[Any]) -> Any:
    """Tensors, arrays, lists or tuples, all of one kind, end to end."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    entries = [entry for part in parts for entry in part]
    return tuple(entries) if isinstance(parts[0], tuple) else entries


def alike(ours: Any, theirs: Any) -> bool:
    """Whether two listed features can be joined without changing their entries."""
    if isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray):
        return ours.dtype == theirs.dtype and ours.shape[1:] == theirs.shape[1:]
    return type(ours) is type(theirs)


def as_bytes(value: Any, row: int) -> bytes:
    """An entry of a listed feature; entries with equal bytes are equal."""
    entry = value[row]
    if isinstance(entry, Tensor):
        content = entry.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        entry = (str(entry.dtype), tuple(entry.shape), content)
    try:
        return pickle.dumps(entry)
    except Exception:  # whatever an object of the user's raises: it then equals no other
        return f"{id(value)}, {row}".encode()


def _own(entry: Any) -> Any:
    return entry.clone() if isinstance(entry, Tensor) else entry


def _is_sequence(value: Any) -> bool:
    """Whether this is what may have one entry a row: shapes and records are lists of something else."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    record = isinstance(value, torch.Size) or hasattr(value, "_fields")
    return isinstance(value, (list, tuple)) and not record


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def _is_other_sequence(value: Any) -> bool:
    """Whether this has entries in an order that a mini-batch cannot be cut from here: a Series, a deque, a range."""
    known = (str, bytes, bytearray, AbstractSet, Mapping, list, tuple, np.ndarray)
    return isinstance(value, Sized) and hasattr(value, "__getitem__") and not isinstance(value, known)


def _hides_rows(value: Any, rows: int, tensors_only: bool = False) -> bool:
    """Whether a container holds, at any depth, something with as many entries as there are rows."""
    if not _is_container(value):
        return False
    for inner in value.values() if isinstance(value, Mapping) else value:
        if isinstance(inner, (Tensor, np.ndarray)):
            if inner.ndim and len(inner) == rows:
                return True
            continue
        if not tensors_only and _is_sequence(inner) and len(inner) == rows:
            return True
        if _hides_rows(inner, rows, tensors_only):
            return True
    return False
