"""GISTEmbedLoss on the fused contrastive operation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss as StockLoss
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from .._stock import gist_embed as stock_module
from .._stock import widened
from ..logs import described
from ..ops._checks import number
from ..ops._gather import check_batches
from ..ops.contrastive import contrastive_loss
from ..values import dry
from ._drop_in import DropIn
from ._fused_or_stock import serves
from ._prefixes import WHOLE, Prefixes
from ._scale import as_scale, plain_scale


class GISTEmbedLoss(DropIn, StockLoss):
    """Is an in-batch-negatives loss whose negatives a second model, the guide, has looked through.

    In a batch, some texts of other rows are in truth positives of an anchor. The guide finds them: a candidate that it
    takes to be more similar to the anchor than the anchor's own positive (less a margin) does not count as a negative.
    Use it when such false negatives are common and a good embedding model for the data exists already.

    Values and gradients are those of stock's class to rounding. Stock compares every pair of vectors in a tensor of
    N x N x D numbers; here the similarities of both models are matrix products, in blocks, which is hundreds of times
    faster and leaner for large batches. New is a ``temperature`` that is learned. If ``cross_entropy_loss``,
    ``similarity_fct`` or ``sim_matrix`` was replaced, stock computes the loss, and one logged line says so.

    Inputs:
        +---------------------------------------+--------+
        | Texts                                 | Labels |
        +=======================================+========+
        | (anchor, positive) pairs              | none   |
        +---------------------------------------+--------+
        | (anchor, positive, negative) triplets | none   |
        +---------------------------------------+--------+

    Args:
        model: The model that is trained.
        guide: The model whose similarities decide which candidates are no negatives. It is not trained. If it has the
            same tokenizer as the model, the texts are not tokenized again.
        temperature: Divides the similarities. Positive; a 0-d ``nn.Parameter`` is learned.
        margin_strategy: With s, the guide's similarity of the row's own positive, a candidate is excluded if the guide
            finds it more similar than s - margin ("absolute") or s - abs(s) * margin ("relative").
        margin: See ``margin_strategy``.
        contrast_anchors: True counts the other anchors as negatives of an anchor too.
        contrast_positives: True counts the similarities of a row's positive with the other positives too. False may
            be better for retrieval.
        gather_across_devices: True takes the positives and negatives of all ranks as candidates.

    Raises:
        ValueError, TypeError: The temperature is not one positive number, or a column is missing or too many.

    Recommendations:
        - A guide that is better than the model at the start of training; it may be small.
        - If the encoder's memory limits the batch, use :class:`CachedGISTEmbedLoss`.

    Example:
        ::

            model = SentenceTransformer("microsoft/mpnet-base")
            guide = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
            loss = losses.GISTEmbedLoss(model, guide)
            SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()

    Source:
        Solatorio 2024, GISTEmbed: Guided In-sample Selection of Training Negatives, arXiv 2402.16829. The margins:
        de Souza P. Moreira et al. 2024, NV-Retriever, arXiv 2407.15831.
    """

    temperature: Any  # float | Tensor; stock's annotation leaves the tensor out

    def serves(self) -> bool:
        """Returns True if the fused operation computes the loss; see ``_fused_or_stock.serves``."""
        return serves(self, changed_computation(self, StockLoss.sim_matrix))

    def forward(
        self,
        sentence_features: Iterable[dict[str, Tensor]],
        labels: Tensor | None = None,
        *,
        prefixes: Prefixes = WHOLE,
    ) -> Tensor:
        """Returns the loss () of a batch.

        Args:
            sentence_features: The features of the anchors, the positives and, if there are any, the negatives.
            labels: Not used.
            prefixes: The prefixes of the embeddings to compute the loss of, from a MatryoshkaLoss.
        """
        sentence_features = list(sentence_features)
        if prefixes is WHOLE and not self.serves():
            return super().forward(sentence_features, widened(labels))
        # Copies, because the guide writes its outputs into its features, and wrappers use the model's again.
        guide_features: list[dict[str, Any]] = [dict(features) for features in sentence_features]
        embeddings = stock_module.embed_columns(self.model, sentence_features)
        with torch.no_grad():
            if self.must_retokenize:
                guide_features = [self._retokenized(features) for features in guide_features]
            guide_embeddings = stock_module.embed_columns(self.guide, guide_features)
        if len(embeddings) not in (2, 3):
            raise ValueError(f"Expected 2 or 3 embeddings, got {len(embeddings)}")
        return guided_loss(self, embeddings, guide_embeddings, stock_module, prefixes)

    def get_config_dict(self) -> dict[str, Any]:
        """Returns the configuration for the model card, as stock's class does."""
        return plain_scale(super().get_config_dict())

    def _retokenized(self, features: dict[str, Any]) -> dict[str, Any]:
        """Returns the features of the same texts for the guide's tokenizer."""
        input_ids = features["input_ids"]
        check_retokenizable(self, input_ids)
        if "cu_seq_lens_q" in features:
            boundaries = features["cu_seq_lens_q"].tolist()
            flat = input_ids[0].tolist()
            input_ids = [flat[begin:end] for begin, end in pairwise(boundaries)]
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        return batch_to_device(self.guide.preprocess(texts), self.guide.device)


def check_retokenizable(loss: Any, input_ids: Tensor) -> None:
    """Raises ValueError if the texts would have to be read from token ids that hold no data."""
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
    """Returns the GIST loss () of embeddings.

    Args:
        loss: The drop-in, for its options.
        embeddings: [N, D] of the anchors, the positives and each column of negatives.
        guide_embeddings: [N, D'] of the same texts, from the guide.
        namespace: The module of stock whose ``all_gather_with_grad`` and ``get_rank`` are called.
        prefixes: The prefixes to compute the loss of.
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
    """Returns a temperature as a float, or as a 0-d tensor of at least the precision of the loss.

    Args:
        temperature: A number, or a tensor of one.
        dtype: The type of the embeddings.

    Raises:
        TypeError, ValueError: It is not one positive number. The value of a tensor on a GPU is not checked, because
            reading it would wait for the GPU.
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


def changed_computation(loss: Any, sim_matrix: Any) -> str | None:
    """Returns what a user has replaced in a GIST loss that the operation does not compute, or None.

    Args:
        loss: The drop-in.
        sim_matrix: The method of that name of its stock class.
    """
    if inspect.getattr_static(loss, "sim_matrix") is not sim_matrix:
        return "sim_matrix was replaced"
    similarity = loss.similarity_fct
    if type(similarity) is not nn.CosineSimilarity or similarity.dim not in (-1, 2) or similarity.eps != 1e-8:
        return f"similarity_fct={described(similarity)} is not a plain CosineSimilarity(dim=-1)"
    entropy, plain = loss.cross_entropy_loss, nn.CrossEntropyLoss()
    options = ("ignore_index", "label_smoothing", "reduction", "weight")
    if type(entropy) is not nn.CrossEntropyLoss or any(getattr(entropy, o) != getattr(plain, o) for o in options):
        return f"cross_entropy_loss={described(entropy)} is not a plain CrossEntropyLoss()"
    return None
