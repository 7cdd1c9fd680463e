"""The options of a gradient cache, as every loss that has one takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..integers import as_integer
from .packing import PACKINGS, Limits


@dataclass(frozen=True)
class Options:
    """How a batch is embedded.

    Numbers may come in any form that equals an integer (``1e4``, ``torch.tensor(3)``), and are ints here.

    Args:
        mini_batch_size: The memory of a mini-batch is that of so many rows of the batch's longest text. May be None
            where ``mini_batch_num_tokens`` is given.
        mini_batch_num_tokens: The most tokens of a mini-batch instead, padding included; without padding, as stock
            counts, where rows are taken as they come. A longer text is a mini-batch of its own.
        packing: "length" sorts the rows of all columns that preprocess alike by their length and packs them within
            that memory; "none" takes them as they come, column by column, ``mini_batch_size`` rows at a time, so that
            dropout draws what it draws in sentence-transformers. An encoder whose rows depend on each other (BatchNorm,
            spectral norm) or on their padding (FNet, some CNNs) gives another loss with "length". With "none" its loss
            is that of sentence-transformers; what changes in every forward pass, as BatchNorm's running statistics do,
            is so with ``activation_budget=0`` as well, as then every mini-batch is embedded twice.
        unique_rows: Encode rows that are equal once. Under dropout they then share a mask.
        activation_budget: Bytes of activations that may be kept from the first pass, so that as much is not embedded
            twice; "auto" is half of what a GPU has free. None keeps what takes no memory that the second pass does not
            need anyway: about one mini-batch; 0 keeps nothing. Weights that are changed in place before the backward
            pass are noticed, and nothing kept is used; changes through ``.data`` (adversarial training) are not
            noticed, and the gradients of what was kept then mix old and new weights: give 0 there.
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
            self._as_integer("mini_batch_size", 1, "a positive integer")
        if self.mini_batch_num_tokens is not None:
            self._as_integer("mini_batch_num_tokens", 1, "a positive integer")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing must be one of {list(PACKINGS)}, got {self.packing!r}.")
        if not isinstance(self.unique_rows, bool):
            raise TypeError(f"unique_rows must be True or False, got {self.unique_rows!r}.")
        if self.unique_rows and self.packing == "none":
            raise ValueError("unique_rows=True needs packing='length': in stock's order every row is encoded.")
        budget = self.activation_budget
        if budget is not None and not (isinstance(budget, str) and budget == "auto"):
            self._as_integer("activation_budget", 0, "a number of bytes, 'auto' or None")

    def _as_integer(self, name: str, least: int, wanted: str) -> None:
        """Put the int in the place of the number that was given."""
        given = getattr(self, name)
        number = as_integer(given)
        if number is None or number < least:
            raise ValueError(f"{name} must be {wanted}, got {given!r}.")
        object.__setattr__(self, name, number)  # the dataclass is frozen

    @property
    def limits(self) -> Limits:
        return Limits(self.mini_batch_size, self.mini_batch_num_tokens)

    def changed(self) -> dict[str, Any]:
        """The options that stock does not have, where they are not what stock does or the default."""
        return {
            name: getattr(self, name)
            for name in ("packing", "unique_rows", "activation_budget")
            if getattr(self, name) != getattr(Options, name)
        }
