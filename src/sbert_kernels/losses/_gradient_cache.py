"""Puts the gradient cache of this package under the Cached losses, in the place of stock's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import settings
from .._stock import has_static_embedding_input
from ..gradcache.cache import pad_token_id
from ..gradcache.engine import cached_loss
from ..gradcache.options import Options
from ..gradcache.packing import MiniBatch, Sliced
from ..logs import log_once
from ._scale import learnable

logger = logging.getLogger(__name__)


def check_splits(owner: str, model: Any, instead: str) -> None:
    """Refuses a model whose inputs cannot be cut into mini-batches, as stock's Cached losses do.

    Args:
        owner: The name of the loss, for the error.
        model: The model.
        instead: What the user can do instead, for the error.

    Raises:
        ValueError: The model embeds with a StaticEmbedding.
    """
    # A model that is wrapped, for distributed training say, does not show its modules; its features are refused later.
    if hasattr(model, "__getitem__") and has_static_embedding_input(model):
        raise ValueError(
            f"{owner} cannot split the inputs of a model with a StaticEmbedding into mini-batches, and such a model "
            f"has no activations to save: {instead}."
        )


class GradientCached:
    """Is a base of every loss with a gradient cache. It stands before stock's class among the bases.

    The attributes ``mini_batch_size``, ``mini_batch_num_tokens``, ``show_progress_bar``, ``packing``, ``unique_rows``
    and ``activation_budget`` are the options of the cache, read at each call;
    :class:`~sbert_kernels.gradcache.options.Options` explains them, also for encoders whose rows depend on each other.
    """

    # What the class that it is mixed into has.
    model: Any
    mini_batch_size: Any  # int | None; stock's annotation leaves the None out
    mini_batch_num_tokens: int | None
    show_progress_bar: bool
    calculate_loss: Any  # the loss stage; its arguments differ from class to class
    embed_minibatch: Any  # stock's; a user's version of it is called

    packing: str = "length"
    unique_rows: bool = False
    activation_budget: int | str | None = None

    def _set_cache_options(self, packing: str, unique_rows: bool, activation_budget: int | str | None) -> None:
        """Sets the options that stock does not have, then checks all of them; numbers become ints.

        To be called when the options that stock has too are set.
        """
        self.packing = packing
        self.unique_rows = unique_rows
        self.activation_budget = activation_budget
        options = self.cache_options()
        self.mini_batch_size = options.mini_batch_size
        self.mini_batch_num_tokens = options.mini_batch_num_tokens
        self.activation_budget = options.activation_budget

    def cache_options(self) -> Options:
        """Returns the options as they are now, checked."""
        return Options(
            mini_batch_size=self.mini_batch_size,
            mini_batch_num_tokens=self.mini_batch_num_tokens,
            packing=self.packing,
            unique_rows=self.unique_rows,
            activation_budget=self.activation_budget,
            show_progress_bar=self.show_progress_bar,
        )

    def forward_cached(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Returns the loss () of a batch; its backward pass embeds the batch once more. Stock has this method too."""
        return self.run_cached(
            sentence_features,
            lambda columns, **backward: self.calculate_loss([[c] for c in columns], labels, **backward),
        )

    def run_cached(self, sentence_features: Iterable[dict[str, Tensor]], stage: Callable[..., Tensor]) -> Tensor:
        """Returns the loss () of a batch, as :func:`~sbert_kernels.gradcache.engine.cached_loss` computes it.

        Args:
            sentence_features: The features of each column.
            stage: ``stage(*outputs)`` returns the loss. Each of the outputs is what :meth:`embed_rows` returns at that
                position, for every column: a list of tensors [B, ...]. If gradients are enabled it is also given
                ``with_backward=True``.

        Raises:
            TypeError: The user has overridden ``embed_minibatch_iter``, which nothing here calls.
        """
        if self._overridden("embed_minibatch_iter"):
            raise TypeError(
                f"{type(self).__name__} does not call the embed_minibatch_iter of your own: override embed_minibatch."
            )
        columns = list(sentence_features)
        options = self.cache_options()
        embed = self.embed_rows
        if self._overridden("embed_minibatch"):
            options = self._in_stock_order(options)
            embed = self._embed_through_override
        backward = {"with_backward": True} if torch.is_grad_enabled() else {}
        return cached_loss(
            embed,
            [self.model] * len(columns),
            columns,
            lambda outputs: stage(*map(list, zip(*outputs, strict=True)), **backward),
            options,
            [pad_token_id(self.model)] * len(columns),
            trained=1,
        )

    def embed_rows(self, mini_batch: MiniBatch, first: bool) -> Sequence[Tensor]:
        """Returns the embeddings [n, D] of a mini-batch, and behind them what else the loss needs of its rows.

        Args:
            mini_batch: The rows.
            first: True in the first pass. In the second pass only the embeddings are needed.
        """
        return [self.model(mini_batch.features())["sentence_embedding"]]

    def on_stock_engine(self, scale: Any) -> bool:
        """Returns True if a loss that stock has must run on stock's gradient cache. One logged line says why.

        Args:
            scale: The loss's scale or temperature.

        Raises:
            ValueError: It must, but its scale is learnable, which stock's cache does not train right.
        """
        if settings.get("disable"):
            return True
        if not self._overridden("embed_minibatch_iter"):
            return False
        if learnable(scale):
            raise ValueError(
                f"{type(self).__name__} cannot combine a learnable scale with an embed_minibatch_iter of your own, "
                "which only sentence-transformers' gradient cache calls: override embed_minibatch instead."
            )
        log_once(
            logger,
            f"{type(self).__name__} runs on sentence-transformers' gradient cache: its embed_minibatch_iter was "
            "overridden.",
        )
        return True

    def _embed_through_override(self, mini_batch: MiniBatch, first: bool) -> Sequence[Tensor]:
        """Returns what :meth:`embed_rows` does, from the user's own ``embed_minibatch``."""
        pool = mini_batch.pool
        assert isinstance(pool, Sliced)  # _in_stock_order has asked for that
        if pool.listed:
            log_once(
                logger,
                f"{type(self).__name__} hands {sorted(pool.listed)}, which are no tensors, whole to every "
                "mini-batch, as sentence-transformers does: its embed_minibatch was overridden, and has to cut them.",
            )
        embeddings, *more, _ = self.embed_minibatch(
            sentence_feature=pool.features,
            begin=int(mini_batch.rows[0]),
            end=int(mini_batch.rows[-1]) + 1,
            with_grad=torch.is_grad_enabled(),
            copy_random_state=False,
            random_state=None,
        )
        return [embeddings, *more] if first else [embeddings]

    def _in_stock_order(self, options: Options) -> Options:
        """Returns the options without those that a user's own ``embed_minibatch`` does not allow, with one log line."""
        # Nothing is kept: a method that is told to make a graph may leave out what only the first pass needs.
        left = replace(options, packing="none", unique_rows=False, activation_budget=0)
        if left != replace(options, activation_budget=options.activation_budget or 0):
            log_once(
                logger,
                f"{type(self).__name__} embeds mini-batches in the order that rows come, not packed by length, and "
                "keeps no activations: its embed_minibatch was overridden.",
            )
        return left

    def _overridden(self, name: str) -> bool:
        """Returns True if a method of stock's was replaced: on the object, by a subclass or in stock's own class."""
        if name in vars(self):
            return True
        owner = next(cls for cls in type(self).__mro__ if name in vars(cls))
        # Both are asked: a function that wraps stock's (functools.wraps) says that it comes from stock's module.
        return any(
            not str(found.__module__).startswith("sentence_transformers.") for found in (owner, vars(owner)[name])
        )
