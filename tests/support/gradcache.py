"""An encoder of tokens, batches for it and a loss: what the tests of GradCache share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 8


class Tokens(nn.Module):
    """Encodes a text as the masked mean of its tokens' embeddings, through a layer.

    It writes into the features, as the modules of sentence-transformers do, and counts its calls and their rows.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(50, 8, dtype=torch.float64)
        self.linear = nn.Linear(8, 6, dtype=torch.float64)
        self.rows = 0
        self.calls = 0

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Returns the features with their embeddings: float64, [rows, 6]; their mask is zero from then on."""
        mask = features["attention_mask"]
        self.calls += 1
        self.rows += len(mask)
        weights = mask.unsqueeze(-1) * (1 + torch.arange(mask.shape[1])).unsqueeze(-1).sqrt()
        mean = (self.embedding(features["input_ids"]) * weights).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        features["sentence_embedding"] = torch.tanh(self.linear(mean))
        mask.zero_()
        return features


def token_column(rows: int, width: int, generator: torch.Generator, distinct: int | None = None) -> dict[str, Tensor]:
    """Returns features of texts of 1 to ``width`` tokens, padded at the end; ``distinct`` says how many differ."""
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    mask = (torch.arange(width) < lengths).to(torch.int64)
    ids = torch.randint(1, 50, (rows, width), generator=generator) * mask
    which = torch.arange(rows) % (distinct or rows)
    return {"input_ids": ids[which], "attention_mask": mask[which]}


def two_columns(rows: int = ROWS, seed: int = 2) -> list[dict[str, Tensor]]:
    """Returns features of two columns, of texts of up to 5 and 7 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [token_column(rows, 5, generator), token_column(rows, 7, generator)]


def contrast(embeddings: Sequence[Tensor], scale: Tensor | float = 3.0) -> Tensor:
    """Returns an in-batch loss of the first column against the others, in which no two rows have the same part."""
    anchors, candidates = embeddings[0], torch.cat(list(embeddings[1:]) or list(embeddings))
    own = torch.arange(len(anchors))
    value = F.cross_entropy(scale * anchors @ candidates.T, own)
    return (
        value
        + (torch.cat(list(embeddings)).square().sum(1) * torch.linspace(0, 1, len(anchors) * len(embeddings))).mean()
    )


def embed(encoders: Any, columns: Sequence[Any], encode: Callable[..., Any] | None = None) -> list[Tensor]:
    """Returns the embeddings of every column, each encoded in one piece, from a copy of its features."""
    encoders = [encoders] * len(columns) if isinstance(encoders, nn.Module) else encoders
    outputs = []
    for encoder, column in zip(encoders, copy.deepcopy(list(columns)), strict=True):
        output = (encode or (lambda module, features: module(features)))(encoder, column)
        outputs.append(output if isinstance(output, Tensor) else output["sentence_embedding"])
    return outputs


def parameters(encoders: Any) -> list[Tensor]:
    """Returns the parameters of an encoder, or of several, each parameter once."""
    return list((encoders if isinstance(encoders, nn.Module) else nn.ModuleList(encoders)).parameters())


def assert_unchanged(columns: Sequence[Any], before: Sequence[Any]) -> None:
    """Fails unless the columns are what they were, to the bit."""
    for column, old in zip(columns, before, strict=True):
        if isinstance(column, Tensor):
            assert torch.equal(column, old)
            continue
        assert list(column) == list(old)
        for key, value in column.items():
            if isinstance(value, str):
                assert value == old[key]
            else:
                torch.testing.assert_close(value, old[key], rtol=0, atol=0)
