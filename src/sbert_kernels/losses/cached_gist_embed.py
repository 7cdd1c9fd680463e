"""CachedGISTEmbedLoss: this package's gradient cache, and a fused loss stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss as StockLoss
from sentence_transformers.util import batch_to_device
from torch import Tensor

from .._stock import cached_gist_embed as stock_module
from .._stock import widened
from ..gradcache.loss_stage import backward_to_embeddings
from ..gradcache.packing import MiniBatch
from ._drop_in import DropIn
from ._fused_or_stock import serves
from ._gradient_cache import GradientCached
from ._prefixes import WHOLE, Prefixes
from ._scale import learnable, plain_scale
from .gist_embed import changed_computation, check_retokenizable, guided_loss


class CachedGISTEmbedLoss(GradientCached, DropIn, StockLoss):
    """Is :class:`GISTEmbedLoss` over batches of any size, in the encoder memory of a mini-batch.

    The model runs over the batch twice and the guide once, mini-batch by mini-batch (GradCache). Use it when larger
    batches would help and the model's activations do not fit. Values and gradients are those of the plain loss over the
    whole batch. The loss stage is one call for the whole batch, which gathers across devices once.

    Inputs:
        +-------------------------------------------------+--------+
        | Texts                                           | Labels |
        +=================================================+========+
        | (anchor, positive) pairs                        | none   |
        +-------------------------------------------------+--------+
        | (anchor, positive, negative_1, ..., negative_n) | none   |
        +-------------------------------------------------+--------+

    Args:
        model, guide, temperature, margin_strategy, margin, contrast_anchors, contrast_positives, gather_across_devices:
            See :class:`GISTEmbedLoss`.
        mini_batch_size, mini_batch_num_tokens, show_progress_bar, packing, unique_rows, activation_budget: See
            :class:`CachedMultipleNegativesRankingLoss`, and :class:`~sbert_kernels.gradcache.options.Options` for
            more words.

    Raises:
        ValueError, TypeError: An option is not one of those there, or the model has a StaticEmbedding, which has no
            activations to save.

    Example:
        ::

            loss = losses.CachedGISTEmbedLoss(model, guide, mini_batch_size=64)
            arguments = SentenceTransformerTrainingArguments("output", per_device_train_batch_size=4096)
            SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss).train()

    Source:
        Solatorio 2024, arXiv 2402.16829, and Gao et al. 2021, arXiv 2101.06983.
    """

    temperature: Any  # float | Tensor; stock's annotation leaves the tensor out

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
            widened(temperature),
            mini_batch_size,
            mini_batch_num_tokens,
            show_progress_bar,
            widened(margin_strategy),
            margin,
            contrast_anchors,
            contrast_positives,
            gather_across_devices,
        )
        self._set_cache_options(packing, unique_rows, activation_budget)

    def serves(self) -> bool:
        """Returns True if the fused operation computes the loss stage; see ``_fused_or_stock.serves``."""
        new_options = {"temperature": "learnable"} if learnable(self.temperature) else None
        return serves(self, changed_computation(self, StockLoss.sim_matrix), new_options)

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        reps_guided: list[list[Tensor]],
        *,
        with_backward: bool = False,
        prefixes: Prefixes = WHOLE,
    ) -> Tensor:
        """Returns the loss () of the whole batch from the embeddings of its mini-batches. Stock has this method too.

        Args:
            reps: For each column, the embeddings [n, D] of each mini-batch.
            reps_guided: The same from the guide, [n, D'].
            with_backward: True leaves its gradient in ``.grad`` of every mini-batch, and detaches the loss from them.
                The loss still carries the gradient of a learnable temperature.
            prefixes: The prefixes to compute the loss of, from a MatryoshkaLoss.
        """
        if prefixes is WHOLE and not self.serves():
            return super().calculate_loss(reps, reps_guided, with_backward=with_backward)
        if len(reps) != len(reps_guided):
            raise ValueError("reps and reps_guided must have the same length")
        columns = [torch.cat(column) for column in reps]
        guide_columns = [torch.cat(column) for column in reps_guided]
        loss = guided_loss(self, columns, guide_columns, stock_module, prefixes)
        return backward_to_embeddings(loss, [part for column in reps for part in column]) if with_backward else loss

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Returns the loss () of a batch; its backward pass encodes the batch once more.

        Args:
            sentence_features: The features of each column: anchors, positives, negatives.
            labels: Not used.
        """
        if self.on_stock_engine(self.temperature):
            return super().forward(sentence_features, widened(labels))
        return self.run_cached(
            sentence_features,
            lambda columns, guided, **backward: self.calculate_loss(
                [[column] for column in columns], [[column] for column in guided], **backward
            ),
        )

    def embed_rows(self, mini_batch: MiniBatch, first: bool) -> Sequence[Tensor]:
        """Returns the model's embeddings [n, D] of a mini-batch, and in the first pass the guide's [n, D'] too."""
        embeddings = super().embed_rows(mini_batch, first)
        if not first:
            return embeddings
        with torch.no_grad():
            features: Any = mini_batch.features()
            if self.must_retokenize:
                check_retokenizable(self, features["input_ids"])
                features = batch_to_device(self.guide.preprocess(self._texts(features)), self.guide.device)
            return [*embeddings, self.guide(features)["sentence_embedding"]]

    def _texts(self, features: dict[str, Any]) -> list[str]:
        """Returns the texts of features, decoded from their token ids, for a guide with another vocabulary."""
        ids = features["input_ids"]
        if "cu_seq_lens_q" in features:
            ids = torch.tensor_split(ids[0].cpu(), features["cu_seq_lens_q"][1:-1].cpu())
        return self.tokenizer.batch_decode([row.tolist() for row in ids], skip_special_tokens=True)

    def new_options(self) -> dict[str, Any]:
        """Returns the options that are set and that stock does not have, by name."""
        return self.cache_options().changed()

    def get_config_dict(self) -> dict[str, Any]:
        """Returns the configuration for the model card: stock's, and the options that stock does not have."""
        return plain_scale(super().get_config_dict()) | self.new_options()
