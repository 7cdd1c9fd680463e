"""The gradient cache under the Cached losses of sentence-transformers, and under those here that have none there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import has_static_embedding_input
from torch import Tensor

from .. import settings
from ..gradcache.cache import pad_token_id
from ..gradcache.engine import cached_loss
from ..gradcache.options import Options
from ..gradcache.packing import MiniBatch
from ..logs import log_once
from ._scale import learnable

logger = logging.getLogger(__name__)


def check_splits(owner: str, model: Any, instead: str) -> None:
    """Refuse a model whose inputs no gradient cache cuts into mini-batches, as stock's Cached losses do.

    Raises:
        ValueError: the model embeds with a StaticEmbedding; says what to do ``instead``.
    """
    # Wrapped for distributed training, say, it does not show its modules: then its features are refused.
    if hasattr(model, "__getitem__") and has_static_embedding_input(model):
        raise ValueError(
            f"{owner} cannot split the inputs of a model with a StaticEmbedding into mini-batches, and such a model "
            f"has no activations to save: {instead}."
        )


class GradientCached:
    """Our gradient cache in the place of stock's; a base before that of stock.

    The options are those of :class:`~sbert_kernels.gradcache.options.Options`, read off the loss at each call. What
    they mean for encoders whose rows depend on each other, or on their padding, stands there.
    """

    model: Any
    mini_batch_size: int
    mini_batch_num_tokens: int | None
    show_progress_bar: bool
    packing: str = "length"
    unique_rows: bool = False
    activation_budget: int | str | None = None

    def _set_cache_options(self, packing: str, unique_rows: bool, activation_budget: int | str | None) -> None:
        """Those that stock does not have; to be called when the others are set. Numbers become ints."""
        self.packing = packing
        self.unique_rows = unique_rows
        self.activation_budget = activation_budget
        options = self.cache_options()
        self.mini_batch_size = options.mini_batch_size
        self.mini_batch_num_tokens = options.mini_batch_num_tokens
        self.activation_budget = options.activation_budget

    def cache_options(self) -> Options:
        """The options as they are now, checked."""
        return Options(
            mini_batch_size=self.mini_batch_size,
            mini_batch_num_tokens=self.mini_batch_num_tokens,
            packing=self.packing,
            unique_rows=self.unique_rows,
            activation_budget=self.activation_budget,
            show_progress_bar=self.show_progress_bar,
        )

    def forward_cached(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch, whose backward pass embeds the batch once more; see stock."""
        return self.run_cached(
            sentence_features,
            lambda columns, **backward: self.calculate_loss([[c] for c in columns], labels, **backward),
        )

    def run_cached(self, sentence_features: Iterable[dict[str, Tensor]], stage: Callable[..., Tensor]) -> Tensor:
        """:func:`~sbert_kernels.gradcache.engine.cached_loss` of this loss's columns, options and encoder.

        Args:
            stage: Of the columns that :meth:`embed_rows` returns; gets ``with_backward=True`` if gradients are enabled.

        Raises:
            TypeError: an ``embed_minibatch_iter`` of the user's, which nothing here calls.
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
        """The embeddings [n, D] of a mini-batch, and in the first pass what else the loss stage needs of its rows."""
        return [self.model(mini_batch.features())["sentence_embedding"]]

    def on_stock_engine(self, scale: Any) -> bool:
        """Whether stock's gradient cache has to run, of a loss that is one of stock's with that (learnable) scale."""
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
        if mini_batch.pool.listed:
            log_once(
                logger,
                f"{type(self).__name__} hands {sorted(mini_batch.pool.listed)}, which are no tensors, whole to every "
                "mini-batch, as sentence-transformers does: its embed_minibatch was overridden, and has to cut them.",
            )
        embeddings, *more, _ = self.embed_minibatch(
            sentence_feature=mini_batch.pool.features,
            begin=int(mini_batch.rows[0]),
            end=int(mini_batch.rows[-1]) + 1,
            with_grad=torch.is_grad_enabled(),
            copy_random_state=False,
            random_state=None,
        )
        return [embeddings, *more] if first else [embeddings]

    def _in_stock_order(self, options: Options) -> Options:
        # A method that was told to make a graph may leave out what only the first pass needs.
        left = replace(options, packing="none", unique_rows=False, activation_budget=0)
        if left != replace(options, activation_budget=options.activation_budget or 0):
            log_once(
                logger,
                f"{type(self).__name__} embeds mini-batches in the order that rows come, not packed by length, and "
                "keeps no activations: its embed_minibatch was overridden.",
            )
        return left

    def _overridden(self, name: str) -> bool:
        """Whether a method of stock's was replaced, on the object, by a subclass or in stock's own class."""
        if name in vars(self):
            return True
        owner = next(cls for cls in type(self).__mro__ if name in vars(cls))
        # A function that wraps stock's (functools.wraps) says that it is from there, hence the class as well.
        return any(
            not str(found.__module__).startswith("sentence_transformers.") for found in (owner, vars(owner)[name])
        )
