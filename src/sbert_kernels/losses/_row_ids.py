"""Makes ids of texts from the tokens of a batch, so that a loss sees duplicates without a change to the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def row_ids(features: dict[str, Any], column: int = 0) -> Tensor:
    """Returns a 64-bit hash of each row's token ids, [rows] int64: equal for equal texts, whatever their padding.

    Args:
        features: One column as the model's ``preprocess`` gives it: padded (``input_ids`` and ``attention_mask`` [rows,
            length]), flattened (``cu_seq_lens_q``) or an embedding bag (``offsets``).
        column: The position of the column in the batch, for the errors.

    Raises:
        ValueError: The column has no token ids, or holds something else beside them (images, audio).
    """
    tokens = features.get("input_ids")
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"duplicates compares texts by their token ids, but column {column} of the batch has no 'input_ids', only "
            f"{sorted(features)}."
        )
    foreign = [key for key in features if key.startswith(("pixel_values", "input_features", "input_values"))]
    if foreign:
        raise ValueError(
            f"duplicates compares texts by their token ids, but column {column} of the batch also holds {foreign}."
        )
    if "cu_seq_lens_q" in features:
        return _ragged(tokens.flatten(), features["cu_seq_lens_q"][:-1])
    if "offsets" in features:
        return _ragged(tokens, features["offsets"])
    mask = features.get("attention_mask")
    mask = torch.ones_like(tokens) if mask is None else mask.to(tokens.dtype)
    position = mask.cumsum(dim=1)
    return (_mix(tokens, position) * mask).sum(dim=1)


def _ragged(tokens: Tensor, starts: Tensor) -> Tensor:
    """Returns the hash of each row of a flat sequence of tokens, from the index [rows] at which each row starts."""
    index = torch.arange(len(tokens), device=tokens.device)
    row = torch.searchsorted(starts.to(index.dtype), index, right=True) - 1
    position = index - starts[row] + 1
    return torch.zeros(len(starts), dtype=torch.int64, device=tokens.device).index_add_(0, row, _mix(tokens, position))


def _mix(tokens: Tensor, position: Tensor) -> Tensor:
    """Returns a well-mixed 64-bit number for each (token, position); the hash of a row is the sum of its numbers.

    It is the last step of the SplitMix64 generator (Steele, Lea and Flood 2014). Products of int64 wrap around as those
    of the unsigned original do. A right shift of int64 copies the sign, so a mask clears those bits.
    """
    x = tokens.to(torch.int64) * 0x5851F42D4C957F2D + position.to(torch.int64) * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
