"""Looks at one column of padded features row by row: which features go with the rows, and how long each row is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import list_features

# Features whose rows are not those of the batch, or that change what counts as padding. They are left to stock's cuts.
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

# Features [B, width, ...] that are indexed by token. Any other feature with a dimension of that size may be so too, and
# keeps its column from being taken apart.
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

Features = dict[str, Any]
Column = Mapping[str, Any] | Tensor


class Padded:
    """Holds one column of padded features [B, width], whose rows can be taken apart.

    Args:
        features: ``attention_mask`` [B, width], others of :data:`BY_TOKEN`, and those that are indexed by row only.
            Everything else belongs to all rows.
        position: The position of the column in the batch.
        listed: The keys of the features that are no tensors and have one entry for each row.
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
        return [(key, value) for key, value in self.features.items() if may_be_by_row(key, value)]

    @staticmethod
    def fits(column: Column) -> TypeGuard[Mapping[str, Any]]:
        """Returns True if the rows of a column can be taken apart."""
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
        """Returns True if rows of the two columns can be in one mini-batch."""
        if set(self.features) != set(other.features) or self.by_row != other.by_row or self.by_token != other.by_token:
            return False
        for key in self.features:
            ours, theirs = self.features[key], other.features[key]
            if key not in self.by_row:
                if not _equal(ours, theirs):
                    return False
            elif key in self.listed or key in other.listed:
                if not list_features.alike(ours, theirs):
                    return False
            elif ours.dtype != theirs.dtype or ours.device != theirs.device or ours.ndim != theirs.ndim:
                return False
            elif key in self.by_token:
                # Floats are no ids, so the zeros that padding would add may mean anything.
                if ours.shape[2:] != theirs.shape[2:] or (ours.is_floating_point() and self.width != other.width):
                    return False
            elif ours.shape[1:] != theirs.shape[1:]:
                return False
        return True

    def measured(self) -> Tensor:
        """Returns each row's length up to its last token, and behind them the padding's token id or -1, [B + 1]."""
        ends = torch.arange(1, self.width + 1, device=self.mask.device)
        active = self.mask.bool()
        length = (active * ends).amax(dim=1) if self.width else self.mask.new_zeros(self.rows)
        length = torch.where(length == 0, self.width, length)  # a row of nothing but padding keeps its width
        ids = self.features.get("input_ids")
        if ids is None or "input_ids" not in self.by_token or ids.ndim != 2 or not ids.numel():
            pad = length.new_full((1,), -1)
        else:
            pad = torch.where(active, -1, ids).amax().reshape(1)
        return torch.cat([length.to(torch.int64), pad.to(torch.int64)])

    def take(self, key: str, rows: np.ndarray, index: Tensor, width: int, pad: int) -> Any:
        """Returns some rows of one feature, cut or padded to a width if it is indexed by token.

        Args:
            key: The feature.
            rows: The rows, [n].
            index: The same on the column's device.
            width: Tokens of a row.
            pad: The value to pad with.
        """
        value = self.features[key]
        if key in self.listed:
            return list_features.take(value, rows)
        if key not in self.by_token:
            return value[index]
        value = value[:, :width][index]
        missing = width - value.shape[1]
        return F.pad(value, [0, 0] * (value.ndim - 2) + [0, missing], value=pad) if missing else value


def may_be_by_row(key: str, value: Any) -> bool:
    """Returns True for a tensor that has rows."""
    # prompt_length is one number in any form, even as a tensor of as many entries as there are rows.
    return isinstance(value, Tensor) and value.ndim > 0 and key != "prompt_length"


def _may_index_tokens(value: Tensor, width: int) -> bool:
    """Returns True if a dimension behind the rows has as many entries as a row has tokens."""
    # A float tensor of four dimensions is an image, whose size may happen to be that number.
    return width in value.shape[1:] and not (value.is_floating_point() and value.ndim > 3)


def _equal(ours: Any, theirs: Any) -> bool:
    """Returns True if two features that belong to all rows are certainly equal."""
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return isinstance(ours, Tensor) and isinstance(theirs, Tensor) and torch.equal(ours, theirs)
    try:
        return bool(ours == theirs)
    except (RuntimeError, ValueError):  # arrays and the like have no one answer
        return False
