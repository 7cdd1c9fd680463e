"""MultipleNegativesRankingLoss and its symmetric form on the fused contrastive operation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss as StockLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesSymmetricRankingLoss as StockSymmetric
from sentence_transformers.util import all_gather, cos_sim, similarity_fct_name
from torch import Tensor
from typing_extensions import deprecated

from .. import settings
from .._stock import deprecation_of, widened
from .._stock import multiple_negatives_ranking as stock_module
from ..ops._gather import check_batches
from ..ops.contrastive import contrastive_loss
from ..problems.contrastive import DUPLICATES
from ..values import readable
from ._drop_in import DropIn
from ._fused_or_stock import serves, similarity_of, why_not_embeddings
from ._prefixes import WHOLE, Prefixes
from ._row_ids import row_ids
from ._scale import as_scale, check_scale, learnable, plain_scale

# The ids of each column's rows (None for a column that is not needed), by loss, of the forward passes in this thread.
_TEXTS: ContextVar[dict[Any, list[Tensor | None]] | None] = ContextVar("sbert_kernels_texts", default=None)


def check_duplicates(duplicates: str) -> str:
    """Returns the option ``duplicates``, after a check that it is one of "keep", "mask" and "positive".

    Raises:
        ValueError: It is something else.
    """
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates must be one of {list(DUPLICATES)}, got {duplicates!r}.")
    return duplicates


class MultipleNegativesRankingLoss(DropIn, StockLoss):
    """Trains each anchor to be more similar to its own positive than to everything else in the batch.

    This is InfoNCE with in-batch negatives: for each anchor a softmax over its similarities with all candidates of the
    batch, times ``scale``, and the cross-entropy of its own positive. It is the loss to start with for retrieval, when
    the data are pairs of texts that belong together. The larger the batch, the more negatives and the better the model.

    Values and gradients are those of stock's class to rounding, for every option, but the N x N matrices of
    similarities are never held: memory grows with the batch, not with its square. The loss is float32 (float64 for
    float64 embeddings), under autocast too, where only the matrix products take autocast's type. New are ``duplicates``
    and a ``scale`` that is learned.

    Inputs:
        +-------------------------------------------------+--------+
        | Texts                                           | Labels |
        +=================================================+========+
        | (anchor, positive) pairs                        | none   |
        +-------------------------------------------------+--------+
        | (anchor, positive, negative) triplets           | none   |
        +-------------------------------------------------+--------+
        | (anchor, positive, negative_1, ..., negative_n) | none   |
        +-------------------------------------------------+--------+

    Args:
        model: The model.
        scale: Multiplies the similarities; it is 1 / temperature. Positive, usually 10 to 100. A 0-d ``nn.Parameter``
            is learned.
        similarity_fct: ``cos_sim`` or ``dot_score``. For any other function stock computes the loss, and one logged
            line says so. With ``dot_score`` a ``scale`` of 1 is usual.
        gather_across_devices: True takes the texts of all ranks as candidates. Recommended with several GPUs.
        directions: Which similarities are candidates. "query_to_doc" (anchor with every positive and negative) is
            always needed; it can be joined by "doc_to_query" (positive with every anchor), "query_to_query" (anchor
            with every other anchor) and "doc_to_doc" (positive with the positives and negatives of other rows).
        partition_mode: "joint" is one softmax over the candidates of all directions. "per_direction" is the mean of one
            loss for each direction; it goes with "query_to_doc" and "doc_to_query" only.
        hardness_mode: Which negatives weigh more the more similar they are: None, "in_batch_negatives" (Lan et al.
            2025, arXiv 2503.04812), "hard_negatives" (Schechter Vera et al. 2025, arXiv 2509.20354) or "all_negatives".
        hardness_strength: Multiplies the similarity that is added to the logit of such a negative; not negative. The
            papers use 9 for "in_batch_negatives" and 5 for "hard_negatives".
        duplicates: What becomes of an in-batch negative whose text equals that of the row's own positive (or of the
            anchor itself, where anchors are candidates). "keep" leaves it a negative, as stock does. "mask" leaves it
            out. "positive" makes it one more positive of the row. Texts are compared by their token ids; see
            :func:`sbert_kernels.contrastive_loss`.

    Raises:
        ValueError, TypeError: An option is not one of those above.

    Recommendations:
        - For pairs alone, all four directions with "joint" often give a stronger signal (Li et al. 2023, arXiv
          2308.03281); so do the two directions "query_to_doc" and "doc_to_query" with "per_direction" (Günther et al.
          2023, arXiv 2310.19923).
        - If texts occur more than once in the data, use ``duplicates="mask"`` or "positive", or stock's sampler
          ``BatchSamplers.NO_DUPLICATES``.
        - If the encoder's memory limits the batch, use :class:`CachedMultipleNegativesRankingLoss`.
        - If many in-batch negatives are in truth positives, use :class:`GISTEmbedLoss`.

    Example:
        ::

            from datasets import Dataset
            from sbert_kernels import losses
            from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

            model = SentenceTransformer("microsoft/mpnet-base")
            train_dataset = Dataset.from_dict({
                "anchor": ["It's nice weather outside today.", "He drove to work."],
                "positive": ["It's so sunny.", "He took the car to the office."],
            })
            loss = losses.MultipleNegativesRankingLoss(model)
            SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss).train()

    Source:
        van den Oord et al. 2018, Representation Learning with Contrastive Predictive Coding, arXiv 1807.03748;
        Henderson et al. 2017, Efficient Natural Language Response Suggestion for Smart Reply, arXiv 1705.00652.
    """

    duplicates: str = "keep"
    scale: Any  # float | Tensor; stock's annotation leaves the tensor out

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        duplicates: str = "keep",
    ) -> None:
        super().__init__(
            model=model,
            scale=check_scale(scale) if readable(scale) else 1.0,  # stock compares it with 0
            similarity_fct=similarity_fct,
            gather_across_devices=gather_across_devices,
            directions=widened(directions),
            partition_mode=widened(partition_mode),
            hardness_mode=widened(hardness_mode),
            hardness_strength=hardness_strength,
        )
        self.scale = scale
        self.duplicates = check_duplicates(duplicates)

    def forward(
        self,
        sentence_features: Iterable[dict[str, Tensor]],
        labels: Tensor | None = None,
        *,
        prefixes: Prefixes = WHOLE,
    ) -> Tensor:
        """Returns the loss () of a batch.

        Args:
            sentence_features: The features of each column: anchors, positives, negatives.
            labels: Not used.
            prefixes: The prefixes of the embeddings to compute the loss of, from a MatryoshkaLoss.
        """
        sentence_features = list(sentence_features)
        with self.ids_of(sentence_features):
            if prefixes is WHOLE:
                return super().forward(sentence_features, widened(labels))
            embeddings = stock_module.embed_columns(self.model, sentence_features)
            return self.compute_loss(embeddings, labels, stock_module, prefixes)

    @contextmanager
    def ids_of(self, sentence_features: Sequence[dict[str, Tensor]]) -> Iterator[None]:
        """Keeps the ids of a batch's texts for a block that computes its loss, if ``duplicates`` needs them."""
        if self.duplicates == "keep" or settings.get("disable"):
            yield
            return
        # Anchors that are no candidates may be no texts at all, such as images with captions as positives.
        queries_needed = not {"query_to_query", "doc_to_query"}.isdisjoint(self.directions)
        ids = [
            row_ids(features, column) if column > 0 or queries_needed else None
            for column, features in enumerate(sentence_features)
        ]
        token = _TEXTS.set({**(_TEXTS.get() or {}), self: ids})
        try:
            yield
        finally:
            _TEXTS.reset(token)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """Returns the loss () of embeddings [N, D] of the anchors, the positives and each column of negatives."""
        return self.compute_loss(embeddings, labels, stock_module)

    def serves(self, embeddings: Sequence[Tensor] = (), new_options: dict[str, Any] | None = None) -> bool:
        """Returns True if the fused operation computes the loss of these embeddings; see ``_fused_or_stock.serves``."""
        why_not = why_not_embeddings(embeddings)
        if similarity_of(self.similarity_fct) is None:
            why_not = f"similarity_fct={similarity_fct_name(self.similarity_fct)} is neither cos_sim nor dot_score"
        if self.hardness_mode is not None and learnable(self.hardness_strength):
            why_not = "hardness_strength is learnable"
        return serves(self, why_not, self.new_options() | (new_options or {}))

    def new_options(self) -> dict[str, Any]:
        """Returns the options that are set and that stock does not have, by name."""
        return {} if self.duplicates == "keep" else {"duplicates": self.duplicates}

    def compute_loss(
        self,
        embeddings: list[Tensor],
        labels: Tensor | None,
        namespace: Any,
        prefixes: Prefixes = WHOLE,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss () of embeddings.

        Args:
            embeddings: [N, D] of the anchors, the positives and each column of negatives.
            labels: Not used.
            namespace: The module of stock whose ``all_gather_with_grad`` and ``get_rank`` are called.
            prefixes: The prefixes to compute the loss of. Only the fused operation takes them: ask :meth:`serves`.
            weights: A weight [N] for each row, or None for the plain mean.
        """
        # The option has the name that the user has set: only AnglEObjective gives weights.
        weighted = None if weights is None else {"positive_threshold": "not None"}
        if len(embeddings) < 2 or (prefixes is WHOLE and not self.serves(embeddings, weighted)):
            return super().compute_loss_from_embeddings(embeddings, widened(labels))
        queries, *documents = embeddings
        query_ids, document_ids = self._column_ids(embeddings)
        all_queries, offset = None, 0
        if self.gather_across_devices:
            check_batches("an in-batch loss", embeddings)
            all_queries = namespace.all_gather_with_grad(queries)
            documents = [namespace.all_gather_with_grad(column) for column in documents]
            offset = namespace.get_rank() * len(queries)
            queries = all_queries[offset : offset + len(queries)]
        # MatryoshkaLoss normalises every prefix, so the cosine is what any similarity function would give then.
        similarity = similarity_of(self.similarity_fct) if prefixes is WHOLE else "cos"
        assert similarity is not None  # serves() has refused any other
        return contrastive_loss(
            queries,
            documents,
            scale=as_scale(self.scale),
            similarity=similarity,
            directions=self.directions,
            partition_mode=self.partition_mode,
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
            weights=weights,
            query_ids=query_ids,
            document_ids=document_ids,
            duplicates=self.duplicates,
            all_queries=all_queries,
            row_offset=offset,
            matryoshka_dims=prefixes.dims,
            matryoshka_weights=prefixes.weights,
        )

    def _column_ids(self, embeddings: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Returns the ids of the queries [N], if a direction needs them, and of all documents [columns * N].

        With ``gather_across_devices`` they are those of all ranks, in the order of the gathered embeddings.
        """
        if self.duplicates == "keep":
            return None, None
        ids = (_TEXTS.get() or {}).get(self)
        if ids is None:
            raise ValueError(
                f"duplicates={self.duplicates!r} compares the texts of a batch, which only forward(sentence_features, "
                "labels) sees: call that, or contrastive_loss(..., query_ids=, document_ids=) with ids of your own."
            )
        known = torch.stack([column for column in ids if column is not None]).to(embeddings[0].device)  # (columns, N)
        if self.gather_across_devices:
            known = all_gather(known.T.contiguous()).T
        queries, documents = (None, known) if ids[0] is None else (known[0].contiguous(), known[1:])
        return queries, documents.flatten()

    def get_config_dict(self) -> dict[str, Any]:
        """Returns the configuration for the model card: stock's, and the options that stock does not have."""
        return plain_scale(super().get_config_dict()) | self.new_options()


with warnings.catch_warnings():
    # A deprecated class warns when it is subclassed, which no user has done here.
    warnings.simplefilter("ignore", DeprecationWarning)

    @deprecated(deprecation_of(StockSymmetric))
    class MultipleNegativesSymmetricRankingLoss(StockSymmetric, MultipleNegativesRankingLoss):
        """Trains each anchor to find its positive among the batch, and each positive to find its anchor.

        It is :class:`MultipleNegativesRankingLoss` with ``directions=("query_to_doc", "doc_to_query")`` and
        ``partition_mode="per_direction"``, and deprecated in favour of it. Use it only in scripts that have it already.

        Inputs:
            +-------------------------------------------------+--------+
            | Texts                                           | Labels |
            +=================================================+========+
            | (anchor, positive) pairs                        | none   |
            +-------------------------------------------------+--------+
            | (anchor, positive, negative_1, ..., negative_n) | none   |
            +-------------------------------------------------+--------+

        Args:
            model, scale, similarity_fct, gather_across_devices, duplicates: See :class:`MultipleNegativesRankingLoss`.

        Example:
            ::

                loss = losses.MultipleNegativesRankingLoss(
                    model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
                )  # instead of losses.MultipleNegativesSymmetricRankingLoss(model)
        """

        def __init__(
            self,
            model: SentenceTransformer,
            scale: float | Tensor = 20.0,
            similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
            gather_across_devices: bool = False,
            *,
            duplicates: str = "keep",
        ) -> None:
            super().__init__(model, widened(scale), similarity_fct, gather_across_devices)
            self.duplicates = check_duplicates(duplicates)
