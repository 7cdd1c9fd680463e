"""What the benchmarks of losses share: the two libraries, a model without an encoder, the compiled peer, the error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

STOCK = "sentence_transformers.sentence_transformer.losses"
OURS = "sbert_kernels.losses"


class Embedded(nn.Sequential):
    """A SentenceTransformer to the losses: its forward returns embeddings that exist already."""

    max_seq_length = 512

    def __init__(self, key: str, tokenizer: Any = None, dim: int | None = None) -> None:
        super().__init__(nn.Identity())  # the losses look at model[0]
        self.key = key
        self.tokenizer = tokenizer
        self.dim = dim

    def get_embedding_dimension(self) -> int | None:
        return self.dim

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.key]}


def compiled(
    loss: nn.Module, make_step: Callable[[nn.Module], Callable[[], object]]
) -> tuple[Callable[[], object] | None, str | None]:
    """The step of the loss under torch.compile, compiled; or None and why it cannot be."""
    torch.compiler.reset()  # or the shapes of an earlier case would make this one's dynamic
    step = make_step(torch.compile(loss))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks of the compiler on stock's code
            step()
    except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, say
        return None, f"not compiled: {str(error).strip().splitlines()[0]}"
    return step, None


def largest_error(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest |x - reference| / |reference| in the Euclidean norm; nan if any is."""
    return torch.stack([(x - y).norm() / y.norm() for x, y in zip(found, reference, strict=True)]).max().item()
