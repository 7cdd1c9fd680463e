"""What a backend of the `contrastive` operation is handed, and what it hands back.

Symbols used on every floor: N rows (the local anchors), D the embedding dimension, W rows of the positives column
(N, or ranks x N where the columns are gathered), M documents in all, o the row offset. Row i's own positive is
document y_i = o + i.

A loss is a set of *terms*, one a direction. A term is a matrix of similarities between row vectors and column
vectors; everything that is special about its entries lies on diagonals (own positive, excluded self, own hard
negatives), so a diagonal is described by the column that it starts at for row 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITION_MODES = ("joint", "per_direction")
HARDNESS_MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
SIMILARITIES = ("cos", "dot")
DUPLICATES = ("keep", "mask", "positive")
MARGIN_STRATEGIES = ("absolute", "relative")


def check_scale(value: float) -> None:
    """Raise ValueError unless a scale is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"scale must be a positive finite number, got {value}.")


@dataclass(frozen=True)
class Term:
    """One direction: which rows meet which columns, and where its special diagonals start."""

    direction: str
    rows_are_queries: bool
    columns_are_queries: bool
    columns: int
    positive: int | None  # the row's own positive pair
    excluded: tuple[int, ...]  # never in the softmax: the row itself, its query's other documents
    own_negatives: tuple[int, ...]  # the row's own hard negatives, which hardness weighting tells apart


@dataclass(frozen=True)
class ContrastiveProblem:
    """Validated inputs of one call (see :func:`sbert_kernels.contrastive_loss` for their meaning)."""

    queries: Tensor  # (N, D)
    documents: tuple[Tensor, ...]  # (W, D), then a (K, D) for each negatives column
    all_queries: Tensor | None  # (W, D)
    scale: float | Tensor  # 0-d
    similarity: str
    directions: tuple[str, ...]
    partition_mode: str
    hardness_mode: str | None
    hardness_strength: float
    weights: Tensor | None  # (N,)
    query_ids: Tensor | None  # (columns of the query terms,) int64
    document_ids: Tensor | None  # (M,) int64
    duplicates: str
    guide_queries: Tensor | None  # (N, G)
    guide_documents: tuple[Tensor, ...]  # as documents, (., G)
    margin_strategy: str
    margin: float
    row_offset: int
    # Matryoshka: the loss is sum_k dim_weights[k] * (loss of the first dims[k] entries of every embedding); the guide's
    # vectors stay whole. (D,) and (1.0,) without it.
    dims: tuple[int, ...]  # strictly ascending, in 1 .. D
    dim_weights: tuple[float, ...]

    @property
    def device(self) -> torch.device:
        return self.queries.device

    def tensors(self) -> tuple[Tensor, ...]:
        own = (self.queries, self.all_queries, self.scale, self.weights, self.query_ids, self.document_ids)
        found = (*own, *self.documents, self.guide_queries, *self.guide_documents)
        return tuple(value for value in found if isinstance(value, Tensor))

    @property
    def guided(self) -> bool:
        return self.guide_queries is not None

    @property
    def dtype(self) -> torch.dtype:
        """The type of accumulators, softmax statistics and loss."""
        return torch.float64 if self.queries.dtype == torch.float64 else torch.float32

    @property
    def eps(self) -> float:
        """The least norm: that of ``torch.nn.functional.normalize``, or of ``CosineSimilarity`` as GIST uses it."""
        return 1e-8 if self.guided else 1e-12

    @property
    def query_columns(self) -> Tensor:
        return self.queries if self.all_queries is None else self.all_queries

    @property
    def query_offset(self) -> int:
        """Column of row 0's own query among the query columns."""
        return 0 if self.all_queries is None else self.row_offset

    @property
    def document_rows(self) -> int:
        return sum(len(column) for column in self.documents)

    @property
    def hardness(self) -> float:
        return self.hardness_strength if self.hardness_mode is not None else 0.0

    def terms(self) -> tuple[Term, ...]:
        """The terms, in stock's order of concatenation."""
        offset, world = self.row_offset, len(self.documents[0])
        own_documents = tuple(offset + column * world for column in range(len(self.documents)))
        aligned = all(len(column) == world for column in self.documents)
        terms = []
        for direction in DIRECTIONS:
            if direction not in self.directions:
                continue
            from_query, to_query = direction.startswith("query"), direction.endswith("query")
            has_positive = from_query != to_query
            own = self.query_offset if to_query else offset
            # GISTEmbedLoss contrasts positives with positives only, and lets the guide alone exclude.
            positives_only = self.guided and direction == "doc_to_doc"
            documents = world if positives_only else self.document_rows
            if has_positive or self.guided:
                excluded: tuple[int, ...] = ()
            else:
                excluded = (own,) if to_query else own_documents
            terms.append(
                Term(
                    direction=direction,
                    rows_are_queries=from_query,
                    columns_are_queries=to_query,
                    columns=len(self.query_columns) if to_query else documents,
                    positive=own if has_positive else None,
                    excluded=excluded,
                    own_negatives=own_documents[1:] if direction == "query_to_doc" and aligned else (),
                )
            )
        return tuple(terms)

    def groups(self) -> list[tuple[Term, ...]]:
        """The terms that share a softmax: all of them (joint), or each its own (per direction)."""
        terms = self.terms()
        return [terms] if self.partition_mode == "joint" else [(term,) for term in terms]

    def column_ids(self, term: Term) -> Tensor | None:
        if self.duplicates == "keep":
            return None
        ids = self.query_ids if term.columns_are_queries else self.document_ids
        return ids[: term.columns]

    def own_column(self, term: Term) -> int:
        """Column that row 0's duplicates are duplicates of: its positive, or itself."""
        return self.query_offset if term.columns_are_queries else self.row_offset

    def guide_threshold(self, own_similarity: Tensor) -> Tensor:
        """Guide similarity above which a column is a false negative, from that of the row's own positive.

        A copy of the positive ties with it exactly; a matrix product may round the two differently, so a few units
        in the last place are still a tie, as they are where stock computes both by the same sum.
        """
        slack = self.margin if self.margin_strategy == "absolute" else own_similarity.abs() * self.margin
        return own_similarity - slack + 8 * torch.finfo(own_similarity.dtype).eps


def weight_sum(weights: Tensor) -> Tensor:
    """What the weighted sum over the rows is divided by; 1 where no row counts, so that the loss is 0 then."""
    return torch.where((weights != 0).any(), weights.sum(), 1)


class Needs(NamedTuple):
    """Which gradients the caller will use."""

    queries: bool = False
    documents: bool = False
    all_queries: bool = False
    scale: bool = False
    weights: bool = False


class ContrastiveResult(NamedTuple):
    """The loss and the gradients that were asked for, for a gradient of one on the loss; accumulator dtype."""

    loss: Tensor  # ()
    queries: Tensor | None = None  # (N, D)
    documents: Tensor | None = None  # (M, D)
    all_queries: Tensor | None = None  # (W, D)
    scale: Tensor | None = None  # ()
    weights: Tensor | None = None  # (N,)
