"""A few real texts, of different lengths."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# A row: a query, a text that answers it, and one that does not.
TEXTS = [
    ("how tall is it", "the height of the tower", "a recipe for soup"),
    ("who wrote this", "the author of the book is known", "rain in the north"),
    ("where is the station", "the station lies behind the old market hall", "tall trees"),
    ("what does it cost", "the price of one ticket", "the price of fame, and how few are willing to pay it"),
    ("how to cook rice", "boil rice in twice its volume of water, covered", "water the plants"),
    ("when does it open", "opening hours are nine to five", "the door"),
    ("why is the sky blue", "light is scattered by air", "blue paint"),
]


def text_features(model: Any, rows: int = len(TEXTS), columns: int = 2) -> list[dict[str, Tensor]]:
    """Returns the features of that many rows and columns of real text, as the data collator makes them."""
    return [model.preprocess([row[column] for row in TEXTS[:rows]]) for column in range(columns)]
