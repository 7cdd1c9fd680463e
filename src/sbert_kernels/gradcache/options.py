"""Holds the options of a gradient cache, which every loss that has one takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..integers import as_integer
from .packing import PACKINGS, Limits


@dataclass(frozen=True)
class Options:
    """Holds and checks the options of a gradient cache.

    A number may be given in any form that equals an integer (``1e4``, ``torch.tensor(3)``); here it is an int.

    Args:
        mini_batch_size: A mini-batch takes no more memory than so many rows as long as the longest text of the batch.
            It may be None if ``mini_batch_num_tokens`` is given.
        mini_batch_num_tokens: The most tokens of a mini-batch, instead. Padding counts with ``packing="length"``; with
            "none" it does not, as in sentence-transformers. A longer text is a mini-batch of its own.
        packing: "length" sorts the rows of all columns that are preprocessed alike by their length, and fills
            mini-batches from that. "none" takes the rows as they come, column by column, so that dropout draws the same
            masks as in sentence-transformers. An encoder whose rows depend on each other (BatchNorm, spectral norm) or
            on their padding (FNet, some CNNs) gives another loss with "length". With "none" it gives the loss of
            sentence-transformers; for the same running statistics of BatchNorm, give ``activation_budget=0`` as well,
            since only then every mini-batch is encoded twice.
        unique_rows: True encodes rows that are equal only once. With dropout they then share one mask.
        activation_budget: Bytes of activations that may be kept from the first pass; what is kept is not encoded twice.
            "auto" is half of a GPU's free memory. None keeps about one mini-batch, which takes no more memory than the
            second pass needs anyway. 0 keeps nothing. If weights are changed in place before the backward pass, nothing
            that was kept is used. A change through ``.data`` (adversarial training) is not noticed, and the gradients
            then mix old and new weights: give 0 in that case.
        show_progress_bar: True shows a progress bar over the tokens of both passes.

    Raises:
        ValueError, TypeError: An option is not as above.
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
        """Replaces a number by the int that it equals, after a check that there is one and that it is large enough."""
        given = getattr(self, name)
        number = as_integer(given)
        if number is None or number < least:
            raise ValueError(f"{name} must be {wanted}, got {given!r}.")
        object.__setattr__(self, name, number)  # the dataclass is frozen

    @property
    def limits(self) -> Limits:
        """Returns the most that one mini-batch may hold."""
        return Limits(self.mini_batch_size, self.mini_batch_num_tokens)

    def changed(self) -> dict[str, Any]:
        """Returns the options that stock does not have and that differ from their defaults, by name."""
        return {
            name: getattr(self, name)
            for name in ("packing", "unique_rows", "activation_budget")
            if getattr(self, name) != getattr(Options, name)
        }
