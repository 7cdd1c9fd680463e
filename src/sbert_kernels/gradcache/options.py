"""The options of a gradient cache, as every loss that has one takes them."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from .packing import PACKINGS


@dataclass(frozen=True)
class Options:
    """How a batch is embedded.

    Args:
        mini_batch_size: The memory of a mini-batch is that of so many rows of the batch's longest text. May be None
            where ``mini_batch_num_tokens`` is given.
        mini_batch_num_tokens: The most tokens of a mini-batch instead, padding included; without padding, as stock
            counts, where rows are taken as they come. A longer text is a mini-batch of its own.
        packing: "length" sorts the rows of all columns that preprocess alike by their length and packs them within
            that memory; "none" takes them as they come, column by column, ``mini_batch_size`` rows at a time, so that
            dropout draws what it draws in sentence-transformers.
        unique_rows: Encode rows that are equal once. Under dropout they then share a mask.
        activation_budget: Bytes of activations that may be kept from the first pass, so that as much is not embedded
            twice; "auto" is half of what a GPU has free. None keeps what takes no memory that the second pass does not
            need anyway: about one mini-batch.
        show_progress_bar: Over the tokens of both passes.

    Raises:
        ValueError, TypeError: an option that cannot be.
    """

    mini_batch_size: int | None = 32
    mini_batch_num_tokens: int | None = None
    packing: str = "length"
    unique_rows: bool = False
    activation_budget: int | str | None = None
    show_progress_bar: bool = False

    def __post_init__(self) -> None:
        if self.mini_batch_size is not None or self.mini_batch_num_tokens is None:
            _check_positive("mini_batch_size", self.mini_batch_size)
        if self.mini_batch_num_tokens is not None:
            _check_positive("mini_batch_num_tokens", self.mini_batch_num_tokens)
        if self.packing not in PACKINGS:
            raise ValueError(f"packing must be one of {list(PACKINGS)}, got {self.packing!r}.")
        if not isinstance(self.unique_rows, bool):
            raise TypeError(f"unique_rows must be True or False, got {self.unique_rows!r}.")
        if self.unique_rows and self.packing == "none":
            raise ValueError("unique_rows=True needs packing='length': in stock's order every row is encoded.")
        budget = self.activation_budget
        if budget is not None and budget != "auto" and (not _is_integer(budget) or budget < 0):
            raise ValueError(f"activation_budget must be a number of bytes, 'auto' or None, got {budget!r}.")

    def changed(self) -> dict[str, Any]:
        """The options that stock does not have, where they are not what stock does or the default."""
        return {
            name: getattr(self, name)
            for name in ("packing", "unique_rows", "activation_budget")
            if getattr(self, name) != getattr(Options, name)
        }


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_positive(name: str, value: Any) -> None:
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
