"""Decides which rows of a batch are encoded together: columns of features in, mini-batches out. It runs no encoder.

The time and memory of an encoder grow with the padded tokens of a mini-batch: its rows times the length of its longest
row. Stock cuts each column in the order that its rows come, so most of its mini-batches are as wide as the longest
text. Here the rows of all columns that are preprocessed alike make one **pool**, are sorted by length, and are cut into
mini-batches where that costs least::

    columns (features) -> pools -> mini-batches (rows of a pool) -> features of a mini-batch

Within a row nothing moves: padding before the text stays, and only padding after the last token is cut off or added.
Some columns cannot be taken apart row by row: flattened inputs, images in patches, tensors without an attention mask,
features that may be indexed by token in a way not known here. These are cut as stock cuts them, in their own order.
Lists, tuples and arrays with one entry for each row go with their rows in both cases (:mod:`list_features`); stock
hands them whole to every mini-batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._stock import cut_rows, mini_batch_ranges, row_count
from ..values import dry
from . import list_features
from .cuts import pack
from .padded import UNPOOLED, Column, Features, Padded, may_be_by_row

PACKINGS = ("length", "none")

# The time of one more call of an encoder, in padded tokens that it encodes in that time. A cut must save more.
CALL_TOKENS = {"cpu": 64}
CALL_TOKENS_ELSEWHERE = 2048

# The most tokens of a mini-batch that make sense. On a CPU larger tensors are not kept by the allocator: each operation
# gets new pages from the system, which takes longer than its arithmetic.
MOST_TOKENS = {"cpu": 1024}

# Features that say where the rows of flattened inputs lie.
FLATTENED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})


@dataclass(frozen=True)
class Limits:
    """Holds the most of one mini-batch: ``rows`` of full width or, if it is given, so many ``tokens``."""

    rows: int | None
    tokens: int | None = None


class Sliced:
    """Holds a column that is cut as stock cuts it, into ranges of rows in the order that they come.

    Args:
        column: The features, or one tensor with rows.
        position: The position of the column in the batch.
        limits: The most of one mini-batch.
        listed: The keys of the features that are no tensors and have one entry for each row.

    Raises:
        ValueError: The ranges depend on values, and the column holds no data.
    """

    def __init__(self, column: Column, position: int, limits: Limits, listed: Collection[str] = ()) -> None:
        self.columns = (position,)
        self.features = column
        if isinstance(column, Tensor):
            column = {"": column}
        self.rows = row_count(column)
        self.listed = listed
        self._beside_tokens = _beside_tokens(column, self.rows)
        if dry(*column.values()) and (limits.tokens is not None or not UNPOOLED.isdisjoint(column)):
            read = "mini_batch_num_tokens" if limits.tokens is not None else f"{sorted(UNPOOLED.intersection(column))}"
            raise ValueError(
                f"column {position} cannot be cut into mini-batches without reading values ({read}), and it holds no "
                "data (a dry run on meta or fake tensors): use mini_batch_size, and features that are padded, there."
            )
        self._ranges = mini_batch_ranges(column, limits.rows, limits.tokens)
        self._per_row = _tokens_per_row(column)
        self.budget = max((end - begin for begin, end in self._ranges), default=0) * self._per_row

    @property
    def mini_batches(self) -> list[MiniBatch]:
        """Returns the mini-batches of the column, in its order."""
        return [MiniBatch(self, np.arange(begin, end), (end - begin) * self._per_row) for begin, end in self._ranges]

    def index(self, position: int) -> None:
        """Returns None: the rows of the column are those of the pool, in the same order."""
        return None

    def take(self, rows: np.ndarray) -> Features | Tensor:
        """Returns a copy of the features of consecutive rows [n]."""
        begin, end = int(rows[0]), int(rows[-1]) + 1
        if isinstance(self.features, Tensor):
            return self.features[begin:end].clone()
        if dry(*self.features.values()):
            # To cut off padding, stock reads the mask. A dry run has no data, and keeps the full width.
            features = {
                key: value[begin:end] if may_be_by_row(key, value) and len(value) == self.rows else value
                for key, value in self.features.items()
            }
        else:
            features = cut_rows(self.features, begin, end)
        for key in self.listed:
            features[key] = list_features.take(self.features[key], rows)
        for key in self._beside_tokens:
            features[key] = self.features[key][begin:end]
        # Slices are views, and a module may write into what it is given.
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in features.items()}


@dataclass(frozen=True, eq=False)
class MiniBatch:
    """Holds the rows of a pool that are encoded together.

    A mini-batch refers to its pool, so a pool does not keep its mini-batches but makes them when it is asked: a cycle
    of references would keep the features of a batch on their device until the garbage collector runs.

    Attributes:
        pool: The pool.
        rows: The indices of the rows in the pool, [n] in ascending order.
        tokens: The padded tokens that they have together.
    """

    pool: Sliced | Pool
    rows: np.ndarray
    tokens: float

    def index(self, device: torch.device) -> Tensor | slice:
        """Returns the index that picks these rows out of a tensor of all rows of the pool, on a device."""
        if isinstance(self.pool, Sliced):
            return slice(int(self.rows[0]), int(self.rows[-1]) + 1)
        return torch.from_numpy(self.rows).to(device)

    def features(self) -> Features | Tensor:
        """Returns a new copy of the features of the rows, as wide as the longest of them."""
        return self.pool.take(self.rows)


class Pool:
    """Holds the rows of columns that are alike, packed into mini-batches by length.

    Args:
        columns: Columns that :meth:`Padded.alike` allows to be mixed.
        measured: What :meth:`Padded.measured` returns for each, on the host.
        budget: The most padded tokens of a mini-batch.
        unique: True makes one row of the pool of all rows that are equal in every feature.
        pad: The token id to pad with if a column has no padding that shows it.
    """

    def __init__(
        self,
        columns: Sequence[Padded],
        measured: Sequence[np.ndarray],
        budget: int,
        unique: bool,
        pad: int,
    ) -> None:
        self._padded = columns
        self.columns = tuple(column.position for column in columns)
        self._starts = np.cumsum([0, *(column.rows for column in columns)])
        # For each row of the pool its row in the batch, all columns end to end.
        self._sources = np.arange(self._starts[-1])
        self._pool_row: np.ndarray | None = None
        self._pads = [int(values[-1]) if values[-1] >= 0 else pad for values in measured]
        self._lengths = np.concatenate([values[:-1] for values in measured])
        if unique:
            self._pool_row, self._sources = _unique_rows(columns, self._lengths)
            self._lengths = self._lengths[self._sources]
        self.rows = len(self._sources)
        self.budget = budget
        device = columns[0].mask.device.type
        per_call = CALL_TOKENS.get(device, CALL_TOKENS_ELSEWHERE)
        self._packed = pack(self._lengths, min(budget, MOST_TOKENS.get(device, budget)), per_call)

    @property
    def mini_batches(self) -> list[MiniBatch]:
        """Returns the mini-batches of the pool, those of the longest rows first."""
        return [MiniBatch(self, np.sort(rows), len(rows) * int(self._lengths[rows[0]])) for rows in self._packed]

    def index(self, position: int) -> np.ndarray | None:
        """Returns for each row of the column at a position its row in the pool; None if they are the same rows."""
        which = self.columns.index(position)
        of_column = slice(self._starts[which], self._starts[which + 1])
        if self._pool_row is not None:
            return self._pool_row[of_column]
        return None if len(self.columns) == 1 else np.arange(of_column.start, of_column.stop)

    def take(self, rows: np.ndarray) -> Features:
        """Returns a copy of the features of some rows [n] of the pool, as wide as the longest of them."""
        width = int(self._lengths[rows].max())
        sources = self._sources[rows]
        cuts = np.searchsorted(sources, self._starts)
        parts = []
        for column, pad, start, begin, end in zip(self._padded, self._pads, self._starts, cuts, cuts[1:], strict=False):
            if begin < end:
                of_column = sources[begin:end] - start
                parts.append((column, pad, of_column, torch.from_numpy(of_column).to(column.mask.device)))
        first = self._padded[0]
        features: Features = {}
        for key, value in first.features.items():
            if key in first.by_row:
                is_id = key == "input_ids"
                features[key] = list_features.join(
                    [column.take(key, taken, index, width, pad if is_id else 0) for column, pad, taken, index in parts]
                )
            else:
                features[key] = value.clone() if isinstance(value, Tensor) else value
        return features


def make_pools(
    columns: Sequence[Column],
    encoders: Sequence[int],
    limits: Sequence[Limits],
    *,
    packing: str = "length",
    unique_rows: bool = False,
    pad: Sequence[int | None] = (),
) -> list[Sliced | Pool]:
    """Returns the pools of a batch.

    Args:
        columns: Dictionaries of features, or tensors, each with any number of rows.
        encoders: The number of the encoder of each column. Columns of different encoders do not share a pool.
        limits: The most of one mini-batch, for each column. Columns with different limits do not share a pool. With
            ``rows`` a mini-batch holds no more padded tokens than so many rows as long as the longest row in the
            columns that take the same route through the same encoder.
        packing: "length", or "none" for stock's mini-batches in stock's order.
        unique_rows: True encodes rows that are equal in every feature only once.
        pad: The token id that the tokenizer of each column's encoder pads with, if it is known.

    Raises:
        ValueError: A column has no rows, or cannot be cut into rows.
    """
    pools: list[Sliced | Pool] = []
    groups: list[list[Padded]] = []
    slots: list[Any] = []  # pools and groups in the order of their first columns
    for position, column in enumerate(columns):
        listed = _listed(column, position)
        if not Padded.fits(column) or packing == "none" or (listed and len(column["attention_mask"]) == 1):
            # With a single row nothing tells whether a list of one entry is the row's. Uncut, it need not be known.
            slots.append(Sliced(column, position, limits[position], listed))
            continue
        padded = Padded(column, position, listed)
        for group in groups:
            first = group[0].position
            if (encoders[first], limits[first]) == (encoders[position], limits[position]) and group[0].alike(padded):
                group.append(padded)
                break
        else:
            groups.append([padded])
            slots.append(groups[-1])
    measured = _on_host([column.measured() for group in groups for column in group])
    by_position = dict(zip([column.position for group in groups for column in group], measured, strict=True))
    # A route of a Router is an encoder of its own: texts that it never sees must not make its mini-batches larger.
    tasks = {padded.position: padded.features.get("task") for group in groups for padded in group}
    routes = {position: (encoders[position], limits[position], tasks[position]) for position in by_position}
    for slot in slots:
        if isinstance(slot, Sliced):
            pools.append(slot)
            continue
        position = slot[0].position
        same_route = [values for other, values in by_position.items() if routes[other] == routes[position]]
        pools.append(
            Pool(
                slot,
                [by_position[column.position] for column in slot],
                limits[position].tokens or _stock_budget(same_route, limits[position].rows),
                unique=unique_rows,
                pad=(pad[position] if pad else None) or 0,
            )
        )
    return pools


def _listed(column: Column, position: int) -> frozenset[str]:
    """Returns :func:`list_features.listed` of a column.

    Raises:
        ValueError: The column has no rows, or cannot be cut into rows.
    """
    features: Mapping[str, Any] = column if isinstance(column, Mapping) else {"": column}
    ids = features.get("input_ids")
    if "offsets" in features and isinstance(ids, Tensor) and ids.ndim == 1:
        raise ValueError(
            f"column {position} of the batch is an embedding bag (token ids end to end and 'offsets', as a "
            "StaticEmbedding takes them), which a gradient cache does not cut into mini-batches: an encoder that only "
            "looks up vectors has no activations to save. Use the loss without a cache."
        )
    rows = row_count(features)
    if not rows:
        raise ValueError(f"column {position} of the batch has no rows.")
    return list_features.listed(features, rows, position)


def _unique_rows(columns: Sequence[Padded], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups equal rows: returns the number of each row's group, [n], and the first row of each group, [groups]."""
    groups: dict[tuple[bytes, ...], int] = {}
    numbers: list[int] = []
    firsts: list[int] = []
    lengths_left = iter(lengths)
    for column in columns:
        keys = sorted(column.by_row - column.listed)
        tables = [_as_bytes(column.features[key], key in column.by_token) for key in keys]
        lists = [column.features[key] for key in sorted(column.listed)]
        for row in range(column.rows):
            length = int(next(lengths_left))
            content = (
                *(table[row, : length * size].tobytes() if size else table[row].tobytes() for table, size in tables),
                *(list_features.as_bytes(value, row) for value in lists),
            )
            number = groups.setdefault(content, len(groups))
            if number == len(firsts):
                firsts.append(len(numbers))
            numbers.append(number)
    return np.asarray(numbers, dtype=np.int64), np.asarray(firsts, dtype=np.int64)


def _beside_tokens(column: Mapping[str, Any], rows: int) -> list[str]:
    """Returns the keys of tensors beside flattened inputs with one entry for each row, which stock does not cut."""
    if "cu_seq_lens_q" not in column:
        return []
    tokens = int(column["cu_seq_lens_q"][-1])
    return [
        key
        for key, value in column.items()
        if isinstance(value, Tensor)
        and value.ndim
        and len(value) == rows
        and value.shape[-1] != tokens
        and key not in FLATTENED | list_features.OF_ALL_ROWS
    ]


def _tokens_per_row(column: Column) -> float:
    """Returns the width of a column, the mean length of a flattened one, or 1 for one without tokens."""
    if isinstance(column, Tensor):
        return 1
    if "cu_seq_lens_q" in column:
        return int(column["cu_seq_lens_q"][-1]) / max(1, row_count(column))
    mask = column.get("attention_mask")
    return mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else 1


def _as_bytes(value: Tensor, by_token: bool) -> tuple[np.ndarray, int]:
    """Returns rows as bytes [B, bytes], and the bytes of one token, or 0 if they are not indexed by token."""
    value = value.detach().cpu().contiguous()
    token = value[0, 0].numel() * value.element_size() if by_token and value.numel() else 0
    return value.reshape(len(value), math.prod(value.shape[1:])).view(torch.uint8).numpy(), token


def _stock_budget(measured: Sequence[np.ndarray], rows: int | None) -> int:
    """Returns the padded tokens of stock's widest mini-batch of ``rows`` rows, so that no more memory is needed."""
    assert rows is not None  # the options have one of rows and tokens, and here it is not tokens
    columns = [values[:-1] for values in measured]
    return max((min(rows, len(lengths)) * int(lengths.max(initial=0)) for lengths in columns), default=0)


def _on_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Returns tensors as arrays, with one transfer for all if they are on one device."""
    if len({tensor.device for tensor in tensors}) != 1:
        return [tensor.cpu().numpy() for tensor in tensors]
    return np.split(torch.cat(list(tensors)).cpu().numpy(), np.cumsum([len(tensor) for tensor in tensors])[:-1])
