"""GISTEmbedLoss on the fused contrastive operation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import gist_embed as stock
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from ..logs import described
from ..ops._checks import number
from ..ops._gather import check_batches
from ..ops.contrastive import contrastive_loss
from ..values import dry
from ._drop_in import DropIn
from ._prefixes import WHOLE, Prefixes
from ._scale import as_scale, plain_scale
from ._serving import serves


class GISTEmbedLoss(DropIn, stock.GISTEmbedLoss):
    """Stock's GISTEmbedLoss as matrix products, in blocks.

    Stock broadcasts every pair of vectors into an N x N x D tensor; here the model's and the guide's similarities of a
    block of rows are two matrix products. A changed ``cross_entropy_loss``, ``similarity_fct`` or ``sim_matrix`` is
    computed by stock, which is logged once. New is a ``temperature`` that is learned.

    Args:
        model: The model, which embeds (anchor, positive) pairs or (anchor, positive, negative) triplets.
        guide: The model whose similarities decide which candidates are no negatives.
        temperature: Divides the similarities. Positive; an ``nn.Parameter`` is learned.
        margin_strategy: Excluded is what the guide finds more similar than s, the similarity of the row's own positive,
            less a margin: s - margin ("absolute") or s - |s| * margin ("relative").
        margin: See ``margin_strategy``.
        contrast_anchors: Whether anchors are candidates of anchors.
        contrast_positives: Whether positives are candidates of positives.
        gather_across_devices: Whether the positives and negatives of all ranks are candidates.
    """

    def serves(self) -> bool:
        """Whether the fused operation computes the loss; see :func:`._serving.serves`."""
        return serves(self, changed_computation(self, stock.GISTEmbedLoss))

    def forward(
        self,
        sentence_features: Iterable[dict[str, Tensor]],
        labels: Tensor | None = None,
        *,
        prefixes: Prefixes = WHOLE,
    ) -> Tensor:
        sentence_features = list(sentence_features)
        if prefixes is WHOLE and not self.serves():
            return super().forward(sentence_features, labels)
        # The guide gets copies: it writes its outputs into its features, and wrappers reuse the model's.
        guide_features = [dict(features) for features in sentence_features]
        embeddings = stock.embed_columns(self.model, sentence_features)
        with torch.no_grad():
            if self.must_retokenize:
                guide_features = [self._retokenized(features) for features in guide_features]
            guide_embeddings = stock.embed_columns(self.guide, guide_features)
        if len(embeddings) not in (2, 3):
            raise ValueError(f"Expected 2 or 3 embeddings, got {len(embeddings)}")
        return guided_loss(self, embeddings, guide_embeddings, stock, prefixes)

    def get_config_dict(self) -> dict[str, Any]:
        return plain_scale(super().get_config_dict())

    def _retokenized(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features of the same texts for the guide's tokenizer."""
        input_ids = features["input_ids"]
        check_retokenizable(self, input_ids)
        if "cu_seq_lens_q" in features:
            boundaries = features["cu_seq_lens_q"].tolist()
            flat = input_ids[0].tolist()
            input_ids = [flat[begin:end] for begin, end in pairwise(boundaries)]
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        return batch_to_device(self.guide.preprocess(texts), self.guide.device)


def check_retokenizable(loss: Any, input_ids: Tensor) -> None:
    """Raise ValueError where texts would have to be read out of token ids that hold no data."""
    if dry(input_ids):
        raise ValueError(
            f"{type(loss).__name__} tokenizes the texts once more for its guide, and these token ids hold no data (a "
            "dry run on meta or fake tensors): use a guide with the model's tokenizer there."
        )


def guided_loss(
    loss: Any,
    embeddings: Sequence[Tensor],
    guide_embeddings: Sequence[Tensor],
    namespace: Any,
    prefixes: Prefixes = WHOLE,
) -> Tensor:
    """The GIST loss of one column of embeddings [N, D], and of the guide's, for each of anchor, positive, negatives.

    ``namespace`` is the stock module whose ``all_gather_with_grad`` and ``get_rank`` are to be used.
    """
    anchors, *documents = embeddings
    guide_anchors, *guide_documents = guide_embeddings
    offset = 0
    if loss.gather_across_devices:
        check_batches("a GIST loss", embeddings)
        documents = [namespace.all_gather_with_grad(column) for column in documents]
        guide_documents = [namespace.all_gather_with_grad(column) for column in guide_documents]
        offset = namespace.get_rank() * len(anchors)
    directions = ["query_to_doc"]
    if loss.contrast_anchors:
        directions.append("query_to_query")
    if loss.contrast_positives:
        directions.append("doc_to_doc")
    return contrastive_loss(
        anchors,
        documents,
        scale=1.0 / _temperature(loss.temperature, anchors.dtype),
        directions=directions,
        guide_queries=guide_anchors,
        guide_documents=guide_documents,
        margin_strategy=loss.margin_strategy,
        margin=loss.margin,
        row_offset=offset,
        matryoshka_dims=prefixes.dims,
        matryoshka_weights=prefixes.weights,
    )


def _temperature(temperature: Any, dtype: torch.dtype) -> Any:
    """A temperature as a number, or as a 0-d tensor whose inverse has the precision of a loss of such embeddings.

    Raises:
        TypeError, ValueError: it is not one positive number; on a device it is left unread.
    """
    temperature = as_scale(temperature)
    if isinstance(temperature, Tensor) and temperature.dim() == 0:
        wide = torch.promote_types(torch.promote_types(temperature.dtype, dtype), torch.float32)
        temperature = temperature.to(wide)
        if temperature.device.type != "cpu" or torch.compiler.is_compiling():
            return temperature
        value = temperature.item()
    else:
        value = temperature = float(number("temperature", temperature))
    if not 0 < value < math.inf:
        raise ValueError(f"temperature must be positive and finite, since similarities are divided by it; got {value}.")
    return temperature


def changed_computation(loss: nn.Module, stock_class: type[nn.Module]) -> str | None:
    """What a user has replaced in a GIST loss that the operation does not compute, or None."""
    if inspect.getattr_static(loss, "sim_matrix") is not stock_class.sim_matrix:
        return "sim_matrix was replaced"
    similarity = loss.similarity_fct
    if type(similarity) is not nn.CosineSimilarity or similarity.dim not in (-1, 2) or similarity.eps != 1e-8:
        return f"similarity_fct={described(similarity)} is not a plain CosineSimilarity(dim=-1)"
    entropy, plain = loss.cross_entropy_loss, nn.CrossEntropyLoss()
    options = ("ignore_index", "label_smoothing", "reduction", "weight")
    if type(entropy) is not nn.CrossEntropyLoss or any(getattr(entropy, o) != getattr(plain, o) for o in options):
        return f"cross_entropy_loss={described(entropy)} is not a plain CrossEntropyLoss()"
    return None
