"""MultipleNegativesRankingLoss and its symmetric form on the fused contrastive operation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import multiple_negatives_ranking as stock
from sentence_transformers.sentence_transformer.losses.multiple_negatives_symmetric_ranking import (
    MultipleNegativesSymmetricRankingLoss as StockSymmetric,
)
from sentence_transformers.util import all_gather, cos_sim
from torch import Tensor
from typing_extensions import deprecated

from .. import settings
from ..ops._gather import check_batches
from ..ops.contrastive import contrastive_loss
from ..problems.contrastive import DUPLICATES
from ..values import readable
from ._drop_in import DropIn
from ._prefixes import WHOLE, Prefixes
from ._row_ids import row_ids
from ._scale import as_scale, check_scale, learnable, plain_scale
from ._serving import serves, similarity_of, unsupported_embeddings

# The ids of each column's rows, by loss, of the forward passes that run in this thread; None for a column not needed.
_TEXTS: ContextVar[dict[Any, list[Tensor | None]] | None] = ContextVar("sbert_kernels_texts", default=None)


def check_duplicates(duplicates: str) -> str:
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates must be one of {list(DUPLICATES)}, got {duplicates!r}.")
    return duplicates


class MultipleNegativesRankingLoss(DropIn, stock.MultipleNegativesRankingLoss):
    """Stock's MultipleNegativesRankingLoss, without its N x N matrices.

    Values and gradients are stock's to rounding, for every option. The loss is float32 (float64 for float64
    embeddings), under autocast too. New are ``duplicates`` and a ``scale`` that is learned.

    Args:
        model: The model, which embeds (query, positive) pairs or (query, positive, negatives...) tuples.
        scale: Multiplies the similarities: the inverse temperature. Positive; an ``nn.Parameter`` is learned.
        similarity_fct: ``cos_sim`` or ``dot_score``; any other is computed by stock, which is logged once.
        gather_across_devices: Whether the documents (and queries) of all ranks are candidates.
        directions: Which candidates a row has: "query_to_doc", and any of "query_to_query", "doc_to_query" and
            "doc_to_doc".
        partition_mode: "joint", one softmax over all directions; or "per_direction", the mean of one for each.
        hardness_mode: None, or the documents that weigh more by their similarity: "in_batch_negatives",
            "hard_negatives", "all_negatives".
        hardness_strength: What multiplies that similarity in the logit; not negative.
        duplicates: What becomes of an in-batch negative whose text equals the row's own positive (or query, in the
            directions whose candidates are queries): "keep" (as stock), "mask", or "positive". Texts are compared by
            their token ids, those of candidates only. See :func:`sbert_kernels.contrastive_loss`.
    """

    duplicates: str = "keep"

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
            directions=directions,
            partition_mode=partition_mode,
            hardness_mode=hardness_mode,
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
        sentence_features = list(sentence_features)
        with self.ids_of(sentence_features):
            if prefixes is WHOLE:
                return super().forward(sentence_features, labels)
            embeddings = stock.embed_columns(self.model, sentence_features)
            return self.compute_loss(embeddings, labels, stock, prefixes)

    @contextmanager
    def ids_of(self, sentence_features: Sequence[dict[str, Tensor]]) -> Iterator[None]:
        """Know the texts of a batch, where ``duplicates`` asks for them, while its loss is computed."""
        if self.duplicates == "keep" or settings.get("disable"):
            yield
            return
        # Queries that are candidates of nothing may be no texts at all: images, whose captions are compared.
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
        return self.compute_loss(embeddings, labels, stock)

    def serves(self, embeddings: Sequence[Tensor] = (), new_options: dict[str, Any] | None = None) -> bool:
        """Whether the fused operation computes the loss (of these embeddings); see :func:`._serving.serves`."""
        unsupported = unsupported_embeddings(embeddings)
        if similarity_of(self.similarity_fct) is None:
            unsupported = (
                f"similarity_fct={stock.similarity_fct_name(self.similarity_fct)} is neither cos_sim nor dot_score"
            )
        if self.hardness_mode is not None and learnable(self.hardness_strength):
            unsupported = "hardness_strength is learnable"
        return serves(self, unsupported, self.new_options() | (new_options or {}))

    def new_options(self) -> dict[str, Any]:
        return {} if self.duplicates == "keep" else {"duplicates": self.duplicates}

    def compute_loss(
        self,
        embeddings: list[Tensor],
        labels: Tensor | None,
        namespace: Any,
        prefixes: Prefixes = WHOLE,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of one column of embeddings [N, D] for each of query, positive, negatives, and weights [N] of rows.

        ``namespace`` is the stock module whose ``all_gather_with_grad`` and ``get_rank`` are to be used. Prefixes are
        for the fused operation only: ask :meth:`serves` first.
        """
        # Named after what the user has set: rows are weighted for AnglEObjective only.
        weighted = None if weights is None else {"positive_threshold": "not None"}
        if len(embeddings) < 2 or (prefixes is WHOLE and not self.serves(embeddings, weighted)):
            return super().compute_loss_from_embeddings(embeddings, labels)
        queries, *documents = embeddings
        query_ids, document_ids = self._column_ids(embeddings)
        all_queries, offset = None, 0
        if self.gather_across_devices:
            check_batches("an in-batch loss", embeddings)
            all_queries = namespace.all_gather_with_grad(queries)
            documents = [namespace.all_gather_with_grad(column) for column in documents]
            offset = namespace.get_rank() * len(queries)
            queries = all_queries[offset : offset + len(queries)]
        return contrastive_loss(
            queries,
            documents,
            scale=as_scale(self.scale),
            # MatryoshkaLoss normalises every prefix, whatever compares them then.
            similarity=similarity_of(self.similarity_fct) if prefixes is WHOLE else "cos",
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
        """Ids of the query columns, if a direction needs them, and of all documents, gathered as the embeddings are."""
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
        return plain_scale(super().get_config_dict()) | self.new_options()


with warnings.catch_warnings():
    # Subclassing a deprecated class warns, at a point where no user has asked for it yet.
    warnings.simplefilter("ignore", DeprecationWarning)

    @deprecated(StockSymmetric.__deprecated__)
    class MultipleNegativesSymmetricRankingLoss(StockSymmetric, MultipleNegativesRankingLoss):
        """Stock's MultipleNegativesSymmetricRankingLoss, as :class:`MultipleNegativesRankingLoss` computes it.

        Args:
            model, scale, similarity_fct, gather_across_devices, duplicates: See :class:`MultipleNegativesRankingLoss`.
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
            super().__init__(model, scale, similarity_fct, gather_across_devices)
            self.duplicates = check_duplicates(duplicates)
