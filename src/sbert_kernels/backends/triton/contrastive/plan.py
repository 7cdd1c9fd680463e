"""Decides all about a call in one pass, before anything runs: precision, tiles, grids, chunks of rows, what is kept.

A `Plan` follows from shapes, strides, types, options and settings. It holds no tensor, reads no value of one and waits
for nothing: tensors on "meta" have a plan, too, and a plan is hashable. `run` executes it and decides nothing.

The chunked strategy: for a chunk of rows at a time, a sweep writes the matrix of softmax weights in the operands' type;
both gradients are the vendor's matrix products with it. If the logits are bounded (`unshifted`), the weights are
exp(z); their row sums come from the same sweep and are divided out after the product. Otherwise a sweep over all rows
finds each row's logsumexp first, and the weights are probabilities. Without gradients, that first sweep is all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .... import settings
from ....problems.contrastive import ContrastiveProblem, Needs, Term
from ..launching import Config, cdiv
from ..targets import Target
from . import tiles
from .precision import MatmulPrecision, choose_precision

# Blocks of a sweep for each multiprocessor, below which side B is divided into splits.
BLOCKS_PER_MULTIPROCESSOR = 4
MOST_SPLITS = 32
# Of a chunk's weights: enough rows that reading and writing the columns' gradient once a chunk costs little.
WEIGHTS_BYTES = 512 * settings.MIB


@dataclass(frozen=True)
class OperandPlan:
    """Says how a set of vectors is brought into the form that the kernels read, and what is kept for its gradient."""

    rows: int
    row_stride: int  # from one row to the next, in numbers
    dtype: torch.dtype  # the vectors are converted to it
    unit_length: bool  # the vectors are divided by their norms first, as fp16 weights times inverse norms may overflow
    cosine: bool  # the inverse norms are computed
    need: bool  # the gradient is computed
    radial: bool  # the radial part of each prefix's gradient is kept: `norms_backward` finds that of one prefix only


@dataclass(frozen=True)
class Diagonals:
    """Describes diagonals at equal distances: the columns of row 0 are first, first + stride, ..."""

    first: int = 0
    stride: int = 0
    count: int = 0

    @classmethod
    def of(cls, columns: Sequence[int]) -> Diagonals:
        """Returns the diagonals that begin at these columns of row 0."""
        first = columns[0] if columns else 0
        stride = columns[1] - first if len(columns) > 1 else 0
        if any(column != first + k * stride for k, column in enumerate(columns)):
            raise ValueError(f"the kernels know diagonals at equal distances only, got columns {tuple(columns)}.")
        return cls(first, stride, len(columns))


@dataclass(frozen=True)
class SweepPlan:
    """Says how a sweep is divided: blocks of side A, splits of side B, slices of a gradient's entries."""

    config: Config
    blocks: int
    splits: int
    b_per_split: int
    slices: int = 1

    @property
    def grid(self) -> tuple[int, int]:
        """How many programs run."""
        return self.blocks * self.splits, self.slices


@dataclass(frozen=True)
class TermPlan:
    """Holds the rule of a term, and the names of its vectors: "queries", "all_queries" or "documents"."""

    term: Term
    rows: str
    row_begin: int  # where row 0 is among the vectors of that name
    columns: str
    excluded: Diagonals
    hardness_exceptions: Diagonals


@dataclass(frozen=True)
class ChunkPlan:
    """Says how the weights of some rows are written, and how the products with them are taken, term by term."""

    begin: int
    end: int
    sweeps: tuple[SweepPlan, ...]
    # For each term: its product is the first for the gradient of its columns, and writes all of it instead of adding.
    overwrites: tuple[bool, ...]


@dataclass(frozen=True)
class SoftmaxPlan:
    """Says how the terms of one softmax are computed."""

    terms: tuple[TermPlan, ...]
    add: bool  # its losses are added to those of the softmaxes before it
    unshifted: bool  # exp(z) is the weight; the chunks' sweeps find the row sums
    statistics: tuple[SweepPlan, ...]  # over all rows; empty if the chunks' sweeps find them
    chunks: tuple[ChunkPlan, ...]  # empty without gradients
    weight_entries: tuple[int, ...]  # memory for the weights of the largest chunk, in numbers, term by term
    kept: tuple[str, ...]  # (K, N) outputs of `softmax_statistics` that the weights need
    positives: tuple[str, ...]  # positive pairs, one or two: "positive", "gathered_positive"
    d_positives: tuple[str | None, str | None]  # where their gradients go; (name, None): both into one
    add_d_positive: bool  # the gradient of the first positive pair is added to that from the softmaxes before it
    online: bool  # sweeps find the maximum of each row on the way, to subtract it
    duplicates_are_positive: bool  # in some term
    radial: bool  # the sweeps that write weights find the radial part of the gradient of each prefix, too


@dataclass(frozen=True)
class Plan:
    """Holds all that is decided about a call."""

    target: Target
    precision: MatmulPrecision
    needs: Needs
    dims: tuple[int, ...]
    prefix_weights: tuple[float, ...]  # as parts of the largest
    largest_weight: float
    n: int
    width: int  # of the embeddings; entries beyond the longest prefix have no gradient
    row_offset: int
    eps: float
    zero_norm_gives_zero: bool
    queries: OperandPlan
    documents: OperandPlan
    all_queries: OperandPlan | None  # None if they are the queries, or no term's columns
    guide: tuple[OperandPlan, OperandPlan] | None  # queries, documents
    guide_width: int
    softmaxes: tuple[SoftmaxPlan, ...]

    @property
    def gradients(self) -> bool:
        """True if any embeddings get a gradient."""
        return self.needs.vectors

    @property
    def d_positives(self) -> tuple[str, ...]:
        """The positive pairs whose similarities get a gradient."""
        found = [name for softmax in self.softmaxes for name in softmax.d_positives if name is not None]
        return tuple(dict.fromkeys(found))


def make_plan(problem: ContrastiveProblem, needs: Needs, target: Target, variant: int = 0) -> Plan:
    """Returns the plan of a call; ``variant`` is one of `tiles.VARIANTS`."""
    return _Planner(problem, needs, target, variant).plan()


def precision_of(problem: ContrastiveProblem, target: Target) -> MatmulPrecision:
    """Returns how the embeddings of a problem are multiplied."""
    vectors = (problem.queries, *problem.documents, problem.all_queries)
    dtypes = {x.dtype for x in vectors if x is not None}
    return choose_precision(dtypes, target, len(problem.dims), problem.autocast)


def is_masked(terms: Sequence[Term]) -> bool:
    """Returns True if ids or hardness tell the entries of a tile apart."""
    return any(term.duplicates != "keep" or term.hardness > 0 for term in terms)


def has_high_register_pressure(terms: Sequence[Term], precision: MatmulPrecision) -> bool:
    """Returns True if masks, a guide or products in parts leave fewer registers to a gradient."""
    return is_masked(terms) or any(term.guided for term in terms) or precision.split


def chunk_rows(n: int, terms: Sequence[Term], prefixes: int, precision: MatmulPrecision) -> int:
    """Returns the rows whose weights fit into the byte budget; a multiple of 128, which is a block's.

    Smaller chunks stay in L2, but each reads and writes the columns' whole gradient once more; the budget wins as soon
    as a chunk has fewer than some thousand rows.
    """
    row_bytes = precision.dtype.itemsize * prefixes * sum(term.columns for term in terms)
    rows = settings.block_bytes(WEIGHTS_BYTES) // row_bytes
    return max(1, min(n, rows if rows < 128 else rows // 128 * 128))


def sweep_plan(
    target: Target, config: Config, n_a: int, n_b: int, *, slices: int = 1, a_tile_each: bool = False
) -> SweepPlan:
    """Returns how a sweep of n_a by n_b vectors is divided.

    ``a_tile_each``: each program computes one tile, as in any matrix product; otherwise side B is divided into splits
    only where blocks of A do not occupy the GPU.
    """
    blocks, b_blocks = cdiv(n_a, config["BLOCK_A"]), cdiv(n_b, config["BLOCK_B"])
    splits = b_blocks
    if not a_tile_each:
        wanted = cdiv(BLOCKS_PER_MULTIPROCESSOR * target.processors, blocks * slices)
        splits = max(1, min(wanted, b_blocks, MOST_SPLITS))
    b_per_split = cdiv(b_blocks, splits) * config["BLOCK_B"]
    return SweepPlan(config, blocks, cdiv(n_b, b_per_split), b_per_split, slices)


def joined_dtype(parts: Sequence[Tensor]) -> torch.dtype:
    """Returns the type that parts of a set of vectors are concatenated in: theirs if they are alike, else float32."""
    return parts[0].dtype if len({part.dtype for part in parts}) == 1 else torch.float32


class _Planner:
    """Decides the parts of a plan, and holds what several of them need."""

    def __init__(self, problem: ContrastiveProblem, needs: Needs, target: Target, variant: int) -> None:
        self.problem, self.needs, self.target, self.variant = problem, needs, target, variant
        self.precision = precision_of(problem, target)
        self.n, self.prefixes = len(problem.queries), len(problem.dims)
        self.largest_weight = max(map(abs, problem.dim_weights)) or 1.0
        self.prefix_weights = tuple(weight / self.largest_weight for weight in problem.dim_weights)
        self.softmaxes, self.unshifted = problem.softmaxes(), problem.unshifted
        self.terms = tuple(term for terms in self.softmaxes for term in terms)
        self.masked = is_masked(self.terms)
        self.gathered = problem.all_queries is not None and any(term.columns_are_queries for term in self.terms)
        self.operands = {
            "queries": self._operand((problem.queries,), needs.queries),
            "documents": self._operand(problem.documents, needs.documents),
        }
        if self.gathered and problem.all_queries is not None:
            self.operands["all_queries"] = self._operand((problem.all_queries,), needs.all_queries)
        self.started: set[str] = set()  # operands whose gradient has been written to

    def plan(self) -> Plan:
        """Returns the plan."""
        problem = self.problem
        guide = None
        if problem.guide_queries is not None:
            guide = (self._guide_operand((problem.guide_queries,)), self._guide_operand(problem.guide_documents))
        return Plan(
            target=self.target,
            precision=self.precision,
            needs=self.needs,
            dims=problem.dims,
            prefix_weights=self.prefix_weights,
            largest_weight=self.largest_weight,
            n=self.n,
            width=problem.queries.shape[1],
            row_offset=problem.row_offset,
            eps=problem.eps,
            # fp16 cannot hold a gradient over eps, nor a weight.
            zero_norm_gives_zero=torch.float16 in (problem.queries.dtype, self.precision.dtype),
            queries=self.operands["queries"],
            documents=self.operands["documents"],
            all_queries=self.operands.get("all_queries"),
            guide=guide,
            guide_width=0 if problem.guide_queries is None else problem.guide_queries.shape[1],
            softmaxes=tuple(self._softmax(terms, index) for index, terms in enumerate(self.softmaxes)),
        )

    def _operand(self, parts: tuple[Tensor, ...], need: bool) -> OperandPlan:
        cosine, dtype = self.problem.cosine, self.precision.dtype
        unit_length = dtype == torch.float16 and cosine
        copied = len(parts) > 1 or unit_length or dtype != parts[0].dtype or parts[0].stride(1) != 1
        return OperandPlan(
            rows=sum(map(len, parts)),
            row_stride=parts[0].shape[1] if copied else parts[0].stride(0),
            dtype=dtype,
            unit_length=unit_length,
            cosine=cosine,
            need=need,
            radial=need and cosine and self.prefixes > 1,
        )

    @staticmethod
    def _guide_operand(parts: tuple[Tensor, ...]) -> OperandPlan:
        rows, width = sum(map(len, parts)), parts[0].shape[1]
        return OperandPlan(rows, width, torch.float32, unit_length=False, cosine=True, need=False, radial=False)

    def _softmax(self, terms: tuple[Term, ...], index: int) -> SoftmaxPlan:
        problem, planned = self.problem, tuple(map(self._term, terms))
        gradients = self.needs.vectors
        duplicates_are_positive = any(term.duplicates == "positive" for term in terms)
        unshifted = self.unshifted and not duplicates_are_positive and not self.precision.lift and self.prefixes == 1
        positives = tuple(
            "gathered_positive" if term.columns == "all_queries" else "positive"
            for term in planned
            if term.term.positive is not None
        )
        d_positives: tuple[str | None, str | None] = (None, None)
        if gradients:  # each softmax has a positive pair: validation sees to that
            d_positives = (positives[0], None if len(set(positives)) == 1 else positives[1])
        weighted = problem.weights is not None or self.prefix_weights != (1.0,)
        kept = {
            "logsumexp": gradients,
            "coefficient": gradients and weighted,
            "row_coefficient": gradients and unshifted,
            "positive_share": gradients and duplicates_are_positive,
        }
        chunks = tuple(self._chunks(planned)) if gradients else ()
        first_in_chunks = gradients and unshifted
        return SoftmaxPlan(
            terms=planned,
            add=index > 0,
            unshifted=unshifted,
            statistics=() if first_in_chunks else tuple(self._sweep(term, self.n, weights=False) for term in planned),
            chunks=chunks,
            weight_entries=tuple(self.prefixes * chunks[0].end * t.columns for t in terms) if chunks else (),
            kept=tuple(name for name, wanted in kept.items() if wanted),
            positives=positives,
            d_positives=d_positives,
            add_d_positive=gradients and index > 0 and d_positives[0] != "gathered_positive",
            online=not self.unshifted,
            duplicates_are_positive=duplicates_are_positive,
            radial=gradients and problem.cosine and self.prefixes > 1,
        )

    def _term(self, term: Term) -> TermPlan:
        return TermPlan(
            term=term,
            rows="queries" if term.rows_are_queries else "documents",
            row_begin=0 if term.rows_are_queries else self.problem.row_offset,
            columns="documents" if not term.columns_are_queries else "all_queries" if self.gathered else "queries",
            # The positive is added row by row, not through the matrix of weights.
            excluded=Diagonals.of(term.excluded if term.positive is None else (term.positive,)),
            hardness_exceptions=Diagonals.of(term.hardness_exceptions),
        )

    def _chunks(self, terms: tuple[TermPlan, ...]) -> Iterator[ChunkPlan]:
        step = chunk_rows(self.n, self.terms, self.prefixes, self.precision)
        sweeps = {n: tuple(self._sweep(term, n, weights=True) for term in terms) for n in {step, self.n % step} if n}
        for begin in range(0, self.n, step):
            end = min(begin + step, self.n)
            yield ChunkPlan(begin, end, sweeps[end - begin], tuple(map(self._overwrites, terms)))

    def _overwrites(self, term: TermPlan) -> bool:
        """Follows which gradients have been written to, in the order of a run: rows, then columns, term by term."""
        if self.operands[term.rows].need:
            self.started.add(term.rows)
        columns = self.operands[term.columns]
        overwrites = (
            columns.need
            and term.columns not in self.started
            and self.prefixes == 1
            and term.term.columns == columns.rows
        )
        if columns.need:
            self.started.add(term.columns)
        return overwrites

    def _sweep(self, term: TermPlan, n: int, *, weights: bool) -> SweepPlan:
        config = tiles.sweep_config(
            self.target,
            self.precision,
            statistics=True,
            gradient=False,
            masked=self.masked,
            guided=self.problem.guided,
            prefixes=self.prefixes,
            width=16,
            aligned=is_aligned(self.operands[term.rows], self.operands[term.columns]),
            variant=self.variant,
        )
        return sweep_plan(self.target, config, n, term.term.columns, a_tile_each=weights)


def is_aligned(*operands: OperandPlan) -> bool:
    """Returns True if the rows of all of these are a multiple of 16 numbers apart."""
    return all(operand.row_stride % 16 == 0 for operand in operands)
