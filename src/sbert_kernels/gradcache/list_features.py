"""Finds the features that are no tensors and have one entry for each row, and cuts and joins them as the rows are.

A user's own input module may put texts, spans or images of different sizes beside the tensors, as Python lists. A list,
a tuple or an array with as many entries as its column has rows has one entry for each row. Everything else belongs to
all rows, and is handed on as it is. What may hold rows deeper inside is refused by name.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sized
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Keys of sentence-transformers whose values belong to all rows in any form: a pair of modalities is no pair of rows.
OF_ALL_ROWS = frozenset({"prompt_length", "task", "modality"})


def listed(features: Mapping[str, Any], rows: int, column: int) -> frozenset[str]:
    """Returns the keys of the features that are no tensors and have one entry for each row.

    Args:
        features: The features of one column of the batch.
        rows: The number of rows of the column.
        column: The position of the column, for messages.

    Raises:
        ValueError: A feature may have one entry for each row, but in a form that cannot be cut.
    """
    found = set()
    for key, value in features.items():
        if isinstance(value, Tensor) or key in OF_ALL_ROWS:
            continue
        if _is_sequence(value) and len(value) == rows:
            # It may also be a list of as many layers as there are rows, each with tensors of all rows.
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
    """Returns the entries of some rows, in the same type and as copies: a module may write into what it is given."""
    if isinstance(value, np.ndarray):
        return value[rows]
    entries = [_copied(value[row]) for row in rows.tolist()]
    return tuple(entries) if isinstance(value, tuple) else entries


def join(parts: list[Any]) -> Any:
    """Returns tensors, arrays, lists or tuples, all of one kind, joined end to end."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    entries = [entry for part in parts for entry in part]
    return tuple(entries) if isinstance(parts[0], tuple) else entries


def alike(ours: Any, theirs: Any) -> bool:
    """Returns True if two such features can be joined without changing their entries."""
    if isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray):
        return ours.dtype == theirs.dtype and ours.shape[1:] == theirs.shape[1:]
    return type(ours) is type(theirs)


def as_bytes(value: Any, row: int) -> bytes:
    """Returns bytes for the entry of a row, so that entries with equal bytes are equal."""
    entry = value[row]
    if isinstance(entry, Tensor):
        content = entry.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        entry = (str(entry.dtype), tuple(entry.shape), content)
    try:
        return pickle.dumps(entry)
    except Exception:  # an object of the user's may raise anything; it then counts as equal to no other
        return f"{id(value)}, {row}".encode()


def _copied(entry: Any) -> Any:
    return entry.clone() if isinstance(entry, Tensor) else entry


def _is_sequence(value: Any) -> bool:
    """Returns True for a list, a tuple or an array with dimensions. Shapes and named tuples do not list rows."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    record = isinstance(value, torch.Size) or hasattr(value, "_fields")
    return isinstance(value, (list, tuple)) and not record


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def _is_other_sequence(value: Any) -> bool:
    """Returns True for other types with entries in an order, which are not cut here: a Series, a deque, a range."""
    known = (str, bytes, bytearray, AbstractSet, Mapping, list, tuple, np.ndarray)
    return isinstance(value, Sized) and hasattr(value, "__getitem__") and not isinstance(value, known)


def _hides_rows(value: Any, rows: int, tensors_only: bool = False) -> bool:
    """Returns True if a container holds, at any depth, something with as many entries as there are rows."""
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
