"""CachedGISTEmbedLoss: the gradient cache of this package, and a fused loss stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import cached_gist_embed as stock
from sentence_transformers.util import batch_to_device
from torch import Tensor

from ..gradcache.packing import MiniBatch
from ..gradcache.stage import backward_to_embeddings
from ._cached import GradientCached
from ._drop_in import DropIn
from ._prefixes import WHOLE, Prefixes
from ._scale import learnable, plain_scale
from ._serving import serves
from .gist_embed import changed_computation, check_retokenizable, guided_loss


class CachedGISTEmbedLoss(GradientCached, DropIn, stock.CachedGISTEmbedLoss):
    """Stock's CachedGISTEmbedLoss with a fused loss stage and our gradient cache.

    The loss stage is one call over the whole batch, without chunks, and gathers across devices once.

    Args:
        model: The model, which embeds (anchor, positive) pairs or (anchor, positive, negatives...) tuples.
        guide: The model whose similarities decide which candidates are no negatives.
        temperature: Divides the similarities. Positive; an ``nn.Parameter`` is learned.
        mini_batch_size: Encode in the memory that so many rows of the longest text take.
        mini_batch_num_tokens: Encode so many tokens at once, instead.
        show_progress_bar: Whether to show a progress bar over both passes.
        margin_strategy: Excluded is what the guide finds more similar than s, the similarity of the row's own positive,
            less a margin: s - margin ("absolute") or s - |s| * margin ("relative").
        margin: See ``margin_strategy``.
        contrast_anchors: Whether anchors are candidates of anchors.
        contrast_positives: Whether positives are candidates of positives.
        gather_across_devices: Whether the positives and negatives of all ranks are candidates.
        packing: "length" puts rows of like length into a mini-batch; "none" takes them as they come, as stock does.
        unique_rows: Whether rows that are equal are encoded once.
        activation_budget: Bytes of activations that may be kept for the second pass, or "auto".

    The options of the cache are those of :class:`~sbert_kernels.gradcache.options.Options`, in more words there.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        guide: SentenceTransformer,
        temperature: float | Tensor = 0.01,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        margin_strategy: str = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        *,
        packing: str = "length",
        unique_rows: bool = False,
        activation_budget: int | str | None = None,
    ) -> None:
        super().__init__(
            model,
            guide,
            temperature,
            mini_batch_size,
            mini_batch_num_tokens,
            show_progress_bar,
            margin_strategy,
            margin,
            contrast_anchors,
            contrast_positives,
            gather_across_devices,
        )
        self._set_cache_options(packing, unique_rows, activation_budget)

    def serves(self) -> bool:
        """Whether the fused operation computes the loss stage; see :func:`._serving.serves`."""
        new_options = {"temperature": "learnable"} if learnable(self.temperature) else None
        return serves(self, changed_computation(self, stock.CachedGISTEmbedLoss), new_options)

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        reps_guided: list[list[Tensor]],
        *,
        with_backward: bool = False,
        prefixes: Prefixes = WHOLE,
    ) -> Tensor:
        """The loss of the whole batch from its mini-batches of embeddings and of the guide's; see stock."""
        if prefixes is WHOLE and not self.serves():
            return super().calculate_loss(reps, reps_guided, with_backward=with_backward)
        if len(reps) != len(reps_guided):
            raise ValueError("reps and reps_guided must have the same length")
        columns = [torch.cat(column) for column in reps]
        guide_columns = [torch.cat(column) for column in reps_guided]
        loss = guided_loss(self, columns, guide_columns, stock, prefixes)
        return backward_to_embeddings(loss, [part for column in reps for part in column]) if with_backward else loss

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        if self.on_stock_engine(self.temperature):
            return super().forward(sentence_features, labels)
        return self.run_cached(
            sentence_features,
            lambda columns, guided, **backward: self.calculate_loss(
                [[column] for column in columns], [[column] for column in guided], **backward
            ),
        )

    def embed_rows(self, mini_batch: MiniBatch, first: bool) -> Sequence[Tensor]:
        embeddings = super().embed_rows(mini_batch, first)
        if not first:
            return embeddings
        with torch.no_grad():
            features = mini_batch.features()
            if self.must_retokenize:
                check_retokenizable(self, features["input_ids"])
                features = batch_to_device(self.guide.preprocess(self._texts(features)), self.guide.device)
            return [*embeddings, self.guide(features)["sentence_embedding"]]

    def _texts(self, features: dict[str, Any]) -> list[str]:
        """What was tokenized, as far as the tokens tell, for a guide with another vocabulary."""
        ids = features["input_ids"]
        if "cu_seq_lens_q" in features:
            ids = torch.tensor_split(ids[0].cpu(), features["cu_seq_lens_q"][1:-1].cpu())
        return self.tokenizer.batch_decode([row.tolist() for row in ids], skip_special_tokens=True)

    def new_options(self) -> dict[str, Any]:
        return self.cache_options().changed()

    def get_config_dict(self) -> dict[str, Any]:
        return plain_scale(super().get_config_dict()) | self.new_options()
