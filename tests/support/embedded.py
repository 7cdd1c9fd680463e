"""A stand-in for a SentenceTransformer, which lets a loss be tested without an encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Embedded(nn.Sequential):
    """Stands for a SentenceTransformer: its forward returns embeddings that the features hold already.

    ``key`` names the feature that holds them, ``dimension`` is the width that the model says they have.
    """

    max_seq_length = 512

    def __init__(self, key: str = "embedding", tokenizer: Any = None, dimension: int | None = None) -> None:
        super().__init__(nn.Identity())
        self.key, self.tokenizer, self.dimension = key, tokenizer, dimension

    def get_embedding_dimension(self) -> int | None:
        """Returns the width of the embeddings, or None where it was not given, which the losses take for unknown."""
        return self.dimension

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the embeddings of the features, under the name that sentence-transformers gives them."""
        return {"sentence_embedding": features[self.key]}
