"""Which rows of a batch are embedded together: columns of features in, mini-batches out. Nothing here runs an encoder.

An encoder's time and memory go with the padded tokens it is given: the rows of a mini-batch times its longest row.
Stock cuts each column in the order that its rows come, so that most mini-batches are as wide as the longest text. Here
the rows of all columns that preprocess alike make one **pool**, sorted by length and cut where that costs least::

    columns (features) -> pools -> mini-batches (rows of a pool) -> features of a mini-batch

Within a row nothing moves: leading padding stays, and only padding after the last token is taken away or added. Columns
that cannot be taken apart row by row (flattened inputs, image grids, tensors without an attention mask, features that
may be indexed by token in a way not known here) are cut as stock does, in their own order. Lists, tuples and arrays
with one entry a row go with the rows either way (:mod:`entries`), where stock hands them whole to every mini-batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._stock import cut_rows, mini_batch_ranges, row_count
from ..values import dry
from . import entries
from .cuts import pack

PACKINGS = ("length", "none")

# What one more call of an encoder costs, in padded tokens embedded in that time: a cut that saves less does not pay.
CALL_TOKENS = {"cpu": 64}
CALL_TOKENS_ELSEWHERE = 2048

# The most tokens of a mini-batch that are of use: on a CPU the tensors of more are too large for the allocator to keep,
# so that every operation is given fresh pages, which cost more than its arithmetic.
MOST_TOKENS = {"cpu": 1024}

# Features whose rows are not those of the batch, or that change what counts as padding: stock knows how to cut them.
UNPOOLED = frozenset(
    {
        "cu_seq_lens_q",
        "query_expansion_positions",
        "image_grid_thw",
        "video_grid_thw",
        "num_images_per_sample",
        "num_videos_per_sample",
        "pixel_values_videos",
    }
)

# Features [B, width, ...] that are indexed by token. Others with a dimension as large may be, and are not taken apart.
BY_TOKEN = frozenset(
    {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "special_tokens_mask",
        "global_attention_mask",
        "bbox",
        "inputs_embeds",
    }
)

# What says where the rows of flattened inputs lie.
FLATTENED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})

Features = dict[str, Any]
Column = Mapping[str, Any] | Tensor


@dataclass(frozen=True)
class Limits:
    """The most that one mini-batch holds: ``rows`` of full width or, where given, so many ``tokens``."""

    rows: int | None
    tokens: int | None = None


class Sliced:
    """A column cut as stock cuts it: ranges of rows in the order they come."""

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
        return [MiniBatch(self, np.arange(begin, end), (end - begin) * self._per_row) for begin, end in self._ranges]

    def index(self, position: int) -> None:
        """The row of the pool that each row of a column is; None where they are the same rows in the same order."""
        return None

    def take(self, rows: np.ndarray) -> Features | Tensor:
        begin, end = int(rows[0]), int(rows[-1]) + 1
        if isinstance(self.features, Tensor):
            return self.features[begin:end].clone()
        if dry(*self.features.values()):
            # Stock looks for padding to leave out; a dry run is told the most that it may take.
            features = {
                key: value[begin:end] if _may_be_by_row(key, value) and len(value) == self.rows else value
                for key, value in self.features.items()
            }
        else:
            features = cut_rows(self.features, begin, end)
        for key in self.listed:
            features[key] = entries.take(self.features[key], rows)
        for key in self._beside_tokens:
            features[key] = self.features[key][begin:end]
        # Slices are views, and modules may write into what they are given.
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in features.items()}


@dataclass(frozen=True, eq=False)
class MiniBatch:
    """Rows of a pool that are embedded together, [n] ascending, and the padded tokens that this costs.

    It knows its pool, so a pool makes them when asked: a cycle of references would keep the features of a batch on
    their device until the garbage collector comes by.
    """

    pool: Sliced | Pool
    rows: np.ndarray
    tokens: float

    def index(self, device: torch.device) -> Tensor | slice:
        """What picks these rows out of all rows of the pool, in a tensor on a device."""
        if isinstance(self.pool, Sliced):
            return slice(int(self.rows[0]), int(self.rows[-1]) + 1)
        return torch.from_numpy(self.rows).to(device)

    def features(self) -> Features | Tensor:
        """A fresh copy of the rows' features, as wide as the longest of them."""
        return self.pool.take(self.rows)


class Padded:
    """One column of padded features [B, width], looked at row by row.

    Args:
        features: ``attention_mask`` [B, width], others of :data:`BY_TOKEN`, and what is indexed by row alone.
            Everything else belongs to all rows.
        position: Which column of the batch this is.
        listed: The features that are no tensors and have one entry a row.
    """

    def __init__(self, features: Mapping[str, Any], position: int, listed: frozenset[str] = frozenset()) -> None:
        self.features = features
        self.position = position
        self.listed = listed
        self.mask = features["attention_mask"]
        self.rows, self.width = self.mask.shape
        self.by_token = {
            key
            for key, value in self._tensors()
            if key in BY_TOKEN and value.ndim >= 2 and value.shape[1] == self.width
        }
        self.by_row = {key for key, _ in self._tensors()} | listed

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(key, value) for key, value in self.features.items() if _may_be_by_row(key, value)]

    @staticmethod
    def fits(column: Column) -> bool:
        """Whether a column can be looked at so."""
        if isinstance(column, Tensor) or not UNPOOLED.isdisjoint(column):
            return False
        mask = column.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return False
        padded = Padded(column, 0)
        return all(
            len(value) == padded.rows and (key in padded.by_token or not _may_index_tokens(value, padded.width))
            for key, value in padded._tensors()
        )

    def alike(self, other: Padded) -> bool:
        """Whether rows of the two can be in one mini-batch."""
        if set(self.features) != set(other.features) or self.by_row != other.by_row or self.by_token != other.by_token:
            return False
        for key in self.features:
            ours, theirs = self.features[key], other.features[key]
            if key not in self.by_row:
                if not _equal(ours, theirs):
                    return False
            elif key in self.listed or key in other.listed:
                if not entries.alike(ours, theirs):
                    return False
            elif ours.dtype != theirs.dtype or ours.device != theirs.device or ours.ndim != theirs.ndim:
                return False
            elif key in self.by_token:
                # Padding of numbers that are no ids may mean anything.
                if ours.shape[2:] != theirs.shape[2:] or (ours.is_floating_point() and self.width != other.width):
                    return False
            elif ours.shape[1:] != theirs.shape[1:]:
                return False
        return True

    def measured(self) -> Tensor:
        """The end of each row's last token, and the token id that this column pads with or -1, [B + 1]."""
        ends = torch.arange(1, self.width + 1, device=self.mask.device)
        active = self.mask.bool()
        length = (active * ends).amax(dim=1) if self.width else self.mask.new_zeros(self.rows)
        length = torch.where(length == 0, self.width, length)  # a row of padding alone keeps the width it has
        ids = self.features.get("input_ids")
        if ids is None or "input_ids" not in self.by_token or ids.ndim != 2 or not ids.numel():
            pad = length.new_full((1,), -1)
        else:
            pad = torch.where(active, -1, ids).amax().reshape(1)
        return torch.cat([length.to(torch.int64), pad.to(torch.int64)])

    def take(self, key: str, rows: np.ndarray, index: Tensor, width: int, pad: int) -> Any:
        """The rows (``index`` on the columns' device) of one feature, cut or padded to a width if indexed by token."""
        value = self.features[key]
        if key in self.listed:
            return entries.take(value, rows)
        if key not in self.by_token:
            return value[index]
        value = value[:, :width][index]
        missing = width - value.shape[1]
        return F.pad(value, [0, 0] * (value.ndim - 2) + [0, missing], value=pad) if missing else value


class Pool:
    """Rows of columns that are alike, sorted by length into mini-batches.

    Args:
        columns: What :meth:`Padded.alike` says can be mixed.
        measured: :meth:`Padded.measured` of each, on the host.
        budget: The most padded tokens of a mini-batch.
        unique: Whether rows that are equal in every feature are one.
        pad: The token id to pad with where a column does not show its own.
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
        # The row of the batch, in the order of the columns, that each row of the pool is.
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
        return [MiniBatch(self, np.sort(rows), len(rows) * int(self._lengths[rows[0]])) for rows in self._packed]

    def index(self, position: int) -> np.ndarray | None:
        which = self.columns.index(position)
        own = slice(self._starts[which], self._starts[which + 1])
        if self._pool_row is not None:
            return self._pool_row[own]
        return None if len(self.columns) == 1 else np.arange(own.start, own.stop)

    def take(self, rows: np.ndarray) -> Features:
        width = int(self._lengths[rows].max())
        sources = self._sources[rows]
        cuts = np.searchsorted(sources, self._starts)
        parts = []
        for column, pad, start, begin, end in zip(self._padded, self._pads, self._starts, cuts, cuts[1:], strict=False):
            if begin < end:
                own = sources[begin:end] - start
                parts.append((column, pad, own, torch.from_numpy(own).to(column.mask.device)))
        first = self._padded[0]
        features: Features = {}
        for key, value in first.features.items():
            if key in first.by_row:
                is_id = key == "input_ids"
                features[key] = entries.join(
                    [column.take(key, own, index, width, pad if is_id else 0) for column, pad, own, index in parts]
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
    """The pools of a batch, each with its mini-batches, the longest rows first.

    Args:
        columns: Feature dictionaries or tensors, each of any number of rows.
        encoders: Which encoder embeds each column.
        limits: Those of each column; only columns of the same encoder with the same limits share a pool. With ``rows``
            a mini-batch holds at most the padded tokens of so many rows of the longest length in the columns that take
            the same route through the same encoder.
        packing: "length", or "none" for stock's mini-batches in stock's order.
        unique_rows: Whether rows equal in every feature are embedded once.
        pad: The padding token's id of each column's encoder, where it is known.

    Raises:
        ValueError: a column has no rows, or cannot be cut into them.
    """
    pools: list[Sliced | Pool] = []
    groups: list[list[Padded]] = []
    slots: list[Any] = []  # pools and groups in the order of their first columns
    for position, column in enumerate(columns):
        listed = _listed(column, position)
        if packing == "none" or not Padded.fits(column) or (listed and len(column["attention_mask"]) == 1):
            # Of a single row nothing says whether a list of one entry is the row's: alone, it need not be known.
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
    routes = {
        position: (encoders[position], limits[position], columns[position].get("task")) for position in by_position
    }
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
    """:func:`entries.listed` of a column, if it can be cut into rows at all."""
    features = column if isinstance(column, Mapping) else {"": column}
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
    return entries.listed(features, rows, position)


def _unique_rows(columns: Sequence[Padded], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each row's class of equal rows, [n], and the first row of each class, [classes]."""
    classes: dict[tuple[bytes, ...], int] = {}
    numbers, firsts = [], []
    lengths_left = iter(lengths)
    for column in columns:
        keys = sorted(column.by_row - column.listed)
        tables = [_as_bytes(column.features[key], key in column.by_token) for key in keys]
        lists = [column.features[key] for key in sorted(column.listed)]
        for row in range(column.rows):
            length = int(next(lengths_left))
            content = (
                *(table[row, : length * size].tobytes() if size else table[row].tobytes() for table, size in tables),
                *(entries.as_bytes(value, row) for value in lists),
            )
            number = classes.setdefault(content, len(classes))
            if number == len(firsts):
                firsts.append(len(numbers))
            numbers.append(number)
    return np.asarray(numbers, dtype=np.int64), np.asarray(firsts, dtype=np.int64)


def _beside_tokens(column: Mapping[str, Any], rows: int) -> list[str]:
    """The tensors of flattened inputs that have one entry a row: stock cuts those that are indexed by token alone."""
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
        and key not in FLATTENED | entries.OF_ALL_ROWS
    ]


def _tokens_per_row(column: Column) -> float:
    """The width of a column, the mean length of a flattened one, 1 of what has no tokens."""
    if isinstance(column, Tensor):
        return 1
    if "cu_seq_lens_q" in column:
        return int(column["cu_seq_lens_q"][-1]) / max(1, row_count(column))
    mask = column.get("attention_mask")
    return mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else 1


def _as_bytes(value: Tensor, by_token: bool) -> tuple[np.ndarray, int]:
    """Rows as bytes [B, bytes], and the bytes of a token or 0."""
    value = value.detach().cpu().contiguous()
    token = value[0, 0].numel() * value.element_size() if by_token and value.numel() else 0
    return value.reshape(len(value), math.prod(value.shape[1:])).view(torch.uint8).numpy(), token


def _stock_budget(measured: Sequence[np.ndarray], rows: int) -> int:
    """The padded tokens of stock's widest mini-batch: no memory is asked for that stock would not need."""
    columns = [values[:-1] for values in measured]
    return max((min(rows, len(lengths)) * int(lengths.max(initial=0)) for lengths in columns), default=0)


def _on_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """The same numbers as arrays; one transfer for all that are on one device."""
    if len({tensor.device for tensor in tensors}) != 1:
        return [tensor.cpu().numpy() for tensor in tensors]
    return np.split(torch.cat(list(tensors)).cpu().numpy(), np.cumsum([len(tensor) for tensor in tensors])[:-1])


def _may_be_by_row(key: str, value: Any) -> bool:
    # prompt_length is one number in every form that it takes, also as a tensor of the batch's length.
    return isinstance(value, Tensor) and value.ndim > 0 and key != "prompt_length"


def _may_index_tokens(value: Tensor, width: int) -> bool:
    # A float tensor of four dimensions is an image, whatever its size happens to be.
    return width in value.shape[1:] and not (value.is_floating_point() and value.ndim > 3)


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return isinstance(ours, Tensor) and isinstance(theirs, Tensor) and torch.equal(ours, theirs)
    try:
        return bool(ours == theirs)
    except (RuntimeError, ValueError):  # arrays and the like, which cannot be shown to be equal
        return False
