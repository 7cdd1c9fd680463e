"""GradCache: the gradient cache around a loss of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..logs import described
from .engine import cached_loss
from .options import Options
from .packing import Column, MiniBatch
from .stage import backward_to_embeddings


class GradCache:
    """A loss over a batch that is embedded in mini-batches, twice, in the memory of one (arXiv 2101.06983)::

        cache = GradCache(model, loss_fn, mini_batch_size=32)
        for columns in batches:
            cache(columns).backward()
            optimizer.step()

    The gradients are those of ``loss_fn([encode(model, column) for column in columns])``, whatever the options; also
    those of parameters that the loss itself has. A mean over a batch, an in-batch comparison, a gradient scaler,
    several ranks: nothing has to be adapted.

    Args:
        encoders: The module that embeds every column, or a sequence with one for each column (query and document
            towers; the same module may stand there twice). Each may be wrapped for distributed training.
        loss_fn: ``loss_fn(embeddings, *args, **kwargs)`` gives a scalar; embeddings is a list of one tensor [B, ...] a
            column, in the order of the rows.
        mini_batch_size, mini_batch_num_tokens, packing, unique_rows, activation_budget, show_progress_bar: See
            :class:`~sbert_kernels.gradcache.options.Options`.
        encode: ``encode(encoder, features)`` gives the embeddings [n, ...] of a mini-batch. By default
            ``encoder(features)``, or its "sentence_embedding" if that is a dictionary, as in sentence-transformers.

    Raises:
        ValueError, TypeError: an option that cannot be.
    """

    def __init__(
        self,
        encoders: nn.Module | Sequence[nn.Module],
        loss_fn: Callable[..., Tensor],
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        packing: str = "length",
        unique_rows: bool = False,
        activation_budget: int | str | None = None,
        show_progress_bar: bool = False,
        encode: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        modules = [encoders] if isinstance(encoders, nn.Module) else list(encoders)
        if not modules or not all(isinstance(module, nn.Module) for module in modules):
            got = described(encoders)
            raise TypeError(f"encoders must be an nn.Module or a sequence of them, one a column, got {got}.")
        self.encoders = encoders if isinstance(encoders, nn.Module) else modules
        self.loss_fn = loss_fn
        self.encode = encode or embedding_of
        self.options = Options(
            mini_batch_size, mini_batch_num_tokens, packing, unique_rows, activation_budget, show_progress_bar
        )

    def __call__(self, columns: Sequence[Column], *args: Any, **kwargs: Any) -> Tensor:
        """The loss () of a batch; its ``backward()`` embeds the batch once more.

        Args:
            columns: One dictionary of features, or one tensor, for each column; the first dimension of every tensor is
                the rows. With an ``attention_mask`` [rows, length] they are packed by length. They are not changed.
            args, kwargs: Further arguments of the loss.

        Raises:
            ValueError: columns that cannot be cut into rows, or that the loss does not use.
        """
        columns = list(columns)
        single = isinstance(self.encoders, nn.Module)
        encoders = [self.encoders] * len(columns) if single else self.encoders
        if not columns or len(encoders) != len(columns):
            wanted = "at least one" if single else f"{len(encoders)}, one an encoder"
            raise ValueError(f"columns must be {wanted}, got {len(columns)}.")
        for position, column in enumerate(columns):
            _check_column(position, column)

        def embed(mini_batch: MiniBatch, first: bool) -> list[Tensor]:
            return [self.encode(encoders[mini_batch.pool.columns[0]], mini_batch.features())]

        def stage(embeddings: list[Tensor]) -> Tensor:
            loss = self.loss_fn(embeddings, *args, **kwargs)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"loss_fn must return a scalar, got {got}.")
            loss = loss.reshape(())
            return backward_to_embeddings(loss, embeddings) if torch.is_grad_enabled() else loss

        pad = [pad_token_id(encoder) for encoder in encoders]
        return cached_loss(embed, encoders, columns, stage, self.options, pad)


def embedding_of(encoder: nn.Module, features: Any) -> Tensor:
    """The embeddings that an encoder returns, bare or as sentence-transformers does.

    Raises:
        TypeError: it returns something else.
    """
    output = encoder(features)
    if isinstance(output, Mapping) and "sentence_embedding" in output:
        output = output["sentence_embedding"]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"an encoder must return a tensor, or a dictionary with 'sentence_embedding'; {type(encoder).__name__} "
            f"returned {type(output).__name__}: give encode=."
        )
    return output


def pad_token_id(encoder: nn.Module) -> int | None:
    """What an encoder's tokenizer pads with, if it has one."""
    for wrapper in ("_orig_mod", "module", "_orig_mod"):
        encoder = getattr(encoder, wrapper, encoder)
    return getattr(getattr(encoder, "tokenizer", None), "pad_token_id", None)


def _check_column(position: int, column: Any) -> None:
    if isinstance(column, Tensor):
        if not column.ndim:
            raise ValueError(f"columns[{position}] must have rows, got a tensor without dimensions.")
        return
    if not isinstance(column, Mapping):
        raise TypeError(
            f"columns[{position}] must be a dictionary of features or a tensor, got {type(column).__name__}."
        )
    if not any(isinstance(value, Tensor) and value.ndim for value in column.values()):
        raise ValueError(f"columns[{position}] holds no tensor with rows, only {sorted(column)}.")
    if "offsets" in column:
        raise ValueError(f"columns[{position}] is an embedding bag (it has 'offsets'), which cannot be cut into rows.")
