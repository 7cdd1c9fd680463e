"""The problem of the `contrastive` operation: its tensors, its specification, and the rule of each term.

Symbols used on every floor: N rows (the local anchors), D the embedding dimension, W rows of the positives column
(N, or ranks x N where the columns are gathered), M documents in all, o the row offset. Row i's positive is document
y_i = o + i.

A loss is a set of *terms*, one a direction. A term is a matrix of similarities between row vectors and column vectors.
Everything that is special about its entries lies on diagonals (the positive, the row itself, the row's own hard
negatives), or is decided by ids or by a guide. A diagonal is described by the column that it starts at for row 0.

A :class:`Term` holds the whole rule of its entries as data. Backends read terms and never the options that they come
from; only `reference` derives the rule from the options on its own, to judge the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._spec import Spec
from .scale import Scale

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITION_MODES = ("joint", "per_direction")
HARDNESS_MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
# For each mode: are entries hard everywhere but on the exceptions, and are the row's hard negatives the exceptions?
_HARDNESS_RULES = {"in_batch_negatives": (True, True), "hard_negatives": (False, True), "all_negatives": (True, False)}
SIMILARITIES = ("cos", "dot")
DUPLICATES = ("keep", "mask", "positive")
MARGIN_STRATEGIES = ("absolute", "relative")

# Cosine bounds the logits, so that one constant shift may serve the softmax of every row, without a search for its
# largest logit. Up to this bound few rows or none need a shift of their own. It is 1 / 0.01, with room for the rounding
# of a temperature that is learned as its logarithm.
BOUNDED_LOGIT = 101.0
# exp(logit - shift) is exp(60) at most: times 2^40 columns 1e38, and times an inverse norm of 1e12 1e38, where float32
# ends at 3.4e38.
LARGEST_EXPONENT = 60.0
# A row is right if its sum of exp(logit - shift) is exp(-53) at least: what is lost below float32's smallest normal
# number, exp(-87), is then less than exp(-34) = 2e-15 of the sum for each column.
LEAST_EXPONENT = -53.0


def check_scale(value: float) -> None:
    """Raise ValueError unless a scale is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"scale must be a positive finite number, got {value}.")


@dataclass(frozen=True)
class ContrastiveSpec(Spec):
    """All options of one call that are no tensors; :func:`sbert_kernels.contrastive_loss` says what each means."""

    similarity: str = "cos"
    directions: tuple[str, ...] = ("query_to_doc",)
    partition_mode: str = "joint"
    hardness_mode: str | None = None
    hardness_strength: float = 0.0
    label_smoothing: float = 0.0
    duplicates: str = "keep"
    margin_strategy: str = "absolute"
    margin: float = 0.0
    # Matryoshka: the loss is sum_k dim_weights[k] * (loss of the first dims[k] entries of every embedding). Strictly
    # ascending, in 1 .. D; empty for the whole embeddings.
    dims: tuple[int, ...] = ()
    dim_weights: tuple[float, ...] = ()
    # The type that torch.autocast gives matrix products where the loss is called: "bfloat16", "float16", or None.
    autocast: str | None = None


@dataclass(frozen=True)
class Term:
    """One direction: which rows meet which columns, and the whole rule of the entries of their matrix.

    Attributes:
        rows_are_queries: The rows are the queries; otherwise the rows' positives.
        columns_are_queries: The columns are the queries; otherwise the first ``columns`` documents.
        columns: Number of columns.
        softmax: Number of the softmax that the term belongs to, from 0 on; terms of one number share it.
        own_column: Column that holds row 0's own query or positive. Other columns with its id are duplicates.
        positive: The diagonal of the positives (``own_column``), or None if the term has none.
        excluded: Diagonals that are never in the softmax: the row itself, its query's other documents.
        duplicates: What becomes of columns with the id of the row's own column: "keep" (ids are not looked at), "mask"
            (excluded) or "positive" (a duplicate positive).
        guided: The guide may exclude columns of this term, but never the positive or a duplicate positive.
        hardness: Strength of the penalty ``hardness * stop_gradient(similarity)`` on hard entries; 0 for none.
        hard_everywhere: If True, all entries are hard except those on ``hardness_exceptions`` and the positives. If
            False, only those on ``hardness_exceptions`` are hard.
        hardness_exceptions: Diagonals of hard negatives that differ from most entries, see ``hard_everywhere``.
    """

    rows_are_queries: bool
    columns_are_queries: bool
    columns: int
    softmax: int
    own_column: int
    positive: int | None
    excluded: tuple[int, ...]
    duplicates: str
    guided: bool
    hardness: float
    hard_everywhere: bool
    hardness_exceptions: tuple[int, ...]


@lru_cache(maxsize=256)
def _terms(
    spec: ContrastiveSpec,
    guided: bool,
    documents: tuple[int, ...],  # rows of each column
    row_offset: int,
    query_columns: int,
    query_offset: int,
) -> tuple[Term, ...]:
    """Returns the terms of all problems of these sizes; a training asks for the same ones at every step."""

    def term(direction: str, softmax: int) -> Term:
        world = documents[0]
        from_query, to_query = direction.startswith("query"), direction.endswith("query")
        own_column = query_offset if to_query else row_offset
        own_documents = tuple(row_offset + column * world for column in range(len(documents)))
        has_positive = from_query != to_query
        # GISTEmbedLoss contrasts positives with positives only, and lets the guide alone exclude.
        positives_only = guided and direction == "doc_to_doc"
        excluded: tuple[int, ...] = ()
        if not has_positive and not guided:
            excluded = (own_column,) if to_query else own_documents
        duplicates = spec.duplicates
        if duplicates == "positive" and not has_positive:
            duplicates = "mask"

        hardness, everywhere, exceptions = 0.0, False, False
        if spec.hardness_mode is not None and spec.hardness_strength > 0 and direction == "query_to_doc":
            # Validation sees to it that each column of negatives is then as long as the positives.
            hardness, (everywhere, exceptions) = spec.hardness_strength, _HARDNESS_RULES[spec.hardness_mode]
        return Term(
            rows_are_queries=from_query,
            columns_are_queries=to_query,
            columns=query_columns if to_query else world if positives_only else sum(documents),
            softmax=softmax,
            own_column=own_column,
            positive=own_column if has_positive else None,
            excluded=excluded,
            duplicates=duplicates,
            guided=guided,
            hardness=hardness,
            hard_everywhere=everywhere,
            hardness_exceptions=own_documents[1:] if exceptions else (),
        )

    given = [direction for direction in DIRECTIONS if direction in spec.directions]
    return tuple(term(d, 0 if spec.partition_mode == "joint" else index) for index, d in enumerate(given))


@dataclass(frozen=True)
class ContrastiveProblem:
    """Validated inputs of one call (see :func:`sbert_kernels.contrastive_loss` for their meaning)."""

    queries: Tensor  # (N, D)
    documents: tuple[Tensor, ...]  # (W, D), then a (K, D) for each negatives column
    scale: Scale
    all_queries: Tensor | None = None  # (W, D)
    weights: Tensor | None = None  # (N,)
    query_ids: Tensor | None = None  # (columns of the query terms,) int64
    document_ids: Tensor | None = None  # (M,) int64
    guide_queries: Tensor | None = None  # (N, G)
    guide_documents: tuple[Tensor, ...] = ()  # as documents, (., G); the guide's vectors stay whole for all prefixes
    row_offset: int = 0
    spec: ContrastiveSpec = ContrastiveSpec()

    @property
    def device(self) -> torch.device:
        """The device of all embeddings."""
        return self.queries.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of accumulators, softmax statistics and loss."""
        return torch.float64 if self.queries.dtype == torch.float64 else torch.float32

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns all tensors of the call."""
        found = (
            self.queries,
            self.all_queries,
            self.scale.tensor,
            self.weights,
            self.query_ids,
            self.document_ids,
            self.guide_queries,
            *self.documents,
            *self.guide_documents,
        )
        return tuple([tensor for tensor in found if tensor is not None])

    @property
    def cosine(self) -> bool:
        """True if similarities are cosines, so that vectors are divided by their norms."""
        return self.spec.similarity == "cos"

    @property
    def guided(self) -> bool:
        """True if a guide decides which columns are false negatives."""
        return self.guide_queries is not None

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that autocast gives matrix products, of whatever type the embeddings are; None outside of it."""
        return None if self.spec.autocast is None else getattr(torch, self.spec.autocast)

    @property
    def eps(self) -> float:
        """The least norm: that of ``torch.nn.functional.normalize``, or of ``CosineSimilarity`` as GIST uses it."""
        return 1e-8 if self.guided else 1e-12

    @property
    def dims(self) -> tuple[int, ...]:
        """Widths of the prefixes, strictly ascending; (D,) without Matryoshka."""
        return self.spec.dims or (self.queries.shape[1],)

    @property
    def dim_weights(self) -> tuple[float, ...]:
        """The weight of each prefix in the loss."""
        return self.spec.dim_weights or (1.0,)

    @property
    def query_columns(self) -> Tensor:
        """The queries as columns: those of all ranks if they are gathered, (W, D) or (N, D)."""
        return self.queries if self.all_queries is None else self.all_queries

    @property
    def query_offset(self) -> int:
        """Column of row 0's own query among the query columns."""
        return 0 if self.all_queries is None else self.row_offset

    @property
    def document_rows(self) -> int:
        """Number of documents M, of all columns together."""
        return sum(len(column) for column in self.documents)

    @cached_property
    def logit_bound(self) -> float:
        """The largest possible |logit|, or infinity if it can't be known without waiting for a device."""
        scale = self.scale.value
        if not self.cosine or scale is None:
            return math.inf
        return abs(scale) + max([term.hardness for term in self.terms()])

    @property
    def bounded(self) -> bool:
        """True if no |logit| is larger than ``BOUNDED_LOGIT``, so that one constant shift serves all rows."""
        return self.logit_bound <= BOUNDED_LOGIT

    @property
    def shift(self) -> float:
        """What is subtracted from every logit of a bounded problem, so that sums of exponentials stay finite.

        In natural units.
        """
        return max(0.0, self.logit_bound - LARGEST_EXPONENT)

    @property
    def sums_may_vanish(self) -> bool:
        """True if a row of a bounded problem may have too small a sum, and must then be computed again.

        That is a sum of exp(logit - shift), the positive included, below exp(``LEAST_EXPONENT``). The row is right with
        a shift of its own, its largest logit.
        """
        return self.bounded and self.logit_bound + self.shift > -LEAST_EXPONENT

    def terms(self) -> tuple[Term, ...]:
        """Returns the terms, in stock's order of concatenation."""
        return self._found_terms

    @cached_property  # several times in a call; it takes as long as torch takes for a small operation
    def _found_terms(self) -> tuple[Term, ...]:
        lengths = tuple([len(column) for column in self.documents])
        return _terms(self.spec, self.guided, lengths, self.row_offset, len(self.query_columns), self.query_offset)

    def softmaxes(self) -> list[tuple[Term, ...]]:
        """Returns the terms of each softmax: all of them (joint), or each alone (per direction)."""
        terms = self.terms()
        return [tuple(t for t in terms if t.softmax == softmax) for softmax in range(terms[-1].softmax + 1)]

    def column_ids(self, term: Term) -> Tensor | None:
        """Returns the ids of a term's columns, (columns,) int64, or None if the term does not look at ids."""
        ids = self.query_ids if term.columns_are_queries else self.document_ids
        return None if term.duplicates == "keep" or ids is None else ids[: term.columns].contiguous()

    @property
    def guide_margins(self) -> tuple[float, float]:
        """The margin below the guide similarity s of the row's positive: the first number plus the second times |s|."""
        margin = self.spec.margin
        return (margin, 0.0) if self.spec.margin_strategy == "absolute" else (0.0, margin)

    def guide_threshold(self, own_similarity: Tensor) -> Tensor:
        """Returns the guide similarity above which a column is a false negative, from that of the row's positive.

        A copy of the positive ties with it exactly; a matrix product may round the two differently, so a few units
        in the last place are still a tie, as they are where stock computes both by the same sum.
        """
        absolute, relative = self.guide_margins
        margin = own_similarity.abs() * relative if relative else absolute
        return own_similarity - margin + 8 * torch.finfo(own_similarity.dtype).eps


def weight_sum(weights: Tensor) -> Tensor:
    """Returns what the weighted sum over the rows is divided by: 1 if no row counts, so that the loss is 0 then."""
    return torch.where((weights != 0).any(), weights.sum(), 1)


class Needs(NamedTuple):
    """Says which gradients the caller will use."""

    queries: bool = False
    documents: bool = False
    all_queries: bool = False
    scale: bool = False
    weights: bool = False

    @property
    def vectors(self) -> bool:
        """True if any embeddings get a gradient."""
        return self.queries or self.documents or self.all_queries


class ContrastiveResult(NamedTuple):
    """The loss and the gradients that were asked for, for a gradient of one on the loss; accumulator dtype."""

    loss: Tensor  # ()
    queries: Tensor | None = None  # (N, D)
    documents: Tensor | None = None  # (M, D)
    all_queries: Tensor | None = None  # (W, D)
    scale: Tensor | None = None  # ()
    weights: Tensor | None = None  # (N,)
