"""Decides all about a call in one pass, before anything runs: precision, kernels, tiles, grids, chunks of rows, memory.

A `Plan` follows from shapes, strides, types, options and settings. It holds no tensor, reads no value of one and waits
for nothing: tensors on "meta" have a plan, too, and a plan is hashable. `run` executes it and decides nothing.

For a chunk of rows at a time, the matrix of softmax weights is written in the operands' type, in one of two ways:

    sweep    one kernel multiplies and weighs
    weigh    the vendor's product writes dot products in fp32, a second kernel weighs them in place

Both gradients are the vendor's products with the weights. One pass suffices if a row's weights are relative to
something that is known before their sum: to a constant, where cosines bound the logits (`problem.shift`), or, for
`weigh`, to the row's maximum. The sum is divided out after the products (`divided_later`). Otherwise a first pass finds
the sums, and a second one writes probabilities. Without gradients, the sums are all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .... import settings
from ....logs import log_once
from ....problems.contrastive import ContrastiveProblem, Needs, Term
from ..launching import cdiv
from ..targets import Target
from . import tiles
from .cost_model import accounting
from .memory import Buffer, Layout
from .multiply import vendor_multiplies
from .plan import ChunkPlan, Diagonals, OperandPlan, Plan, SoftmaxPlan, SweepPlan, TermPlan
from .precision import FULL, MatmulPrecision, choose_precision

logger = logging.getLogger(__name__)

# Blocks of a sweep for each multiprocessor, below which the columns are divided into splits.
BLOCKS_PER_MULTIPROCESSOR = 4
MOST_SPLITS = 32
# Of a chunk's weights. Fewer rows than these cost more in reading and writing the columns' gradient once a chunk than
# they save in memory, so that a chunk of them may take a sixteenth of the GPU's memory.
WEIGHTS_BYTES = 512 * settings.MIB
LEAST_ROWS = 4096
LARGEST_PART_OF_MEMORY = 16


def make_plan(
    problem: ContrastiveProblem, needs: Needs, target: Target, way: str | None = None, variant: int = 0
) -> Plan:
    """Returns the plan of a call.

    Args:
        problem: The call.
        needs: Which gradients are wanted.
        target: What it runs on.
        way: "sweep" or "weigh"; None takes the one that should be faster.
        variant: One of `tiles.VARIANTS`.
    """
    return Planner(problem, needs, target, way, variant).plan()


def precision_of(problem: ContrastiveProblem, target: Target) -> MatmulPrecision:
    """Returns how the embeddings of a problem are multiplied."""
    vectors = (problem.queries, *problem.documents, problem.all_queries)
    dtypes = {x.dtype for x in vectors if x is not None}
    return choose_precision(dtypes, target, len(problem.dims), problem.autocast)


def is_masked(terms: Sequence[Term]) -> bool:
    """Returns True if ids or hardness tell the entries of a tile apart."""
    return any(term.duplicates != "keep" or term.hardness > 0 for term in terms)


def chunk_rows(n: int, row_bytes: int, target: Target) -> int:
    """Returns how many rows exist at the same time: a multiple of 128, which is a block's, that the budget holds."""
    budget = settings.get("block_bytes")
    if budget is None:
        budget = max(WEIGHTS_BYTES, min(LEAST_ROWS * row_bytes, target.memory_bytes // LARGEST_PART_OF_MEMORY))
    rows = budget // row_bytes
    return max(1, min(n, rows if rows < 128 else rows // 128 * 128))


def padded(columns: int) -> int:
    """Returns how far rows of a matrix are apart, so that each begins at a whole line of memory."""
    return cdiv(columns, 32) * 32


class Planner:
    """Decides the parts of a plan, and holds what several of them need.

    What is decided otherwise for other kernels that make weights are the methods without an underscore.
    """

    def __init__(
        self, problem: ContrastiveProblem, needs: Needs, target: Target, way: str | None = None, variant: int = 0
    ) -> None:
        self.problem, self.needs, self.target, self.variant = problem, needs, target, variant
        self.precision = precision_of(problem, target)
        self.n, self.prefixes = len(problem.queries), len(problem.dims)
        self.largest_weight = max(map(abs, problem.dim_weights)) or 1.0
        self.prefix_weights = tuple(weight / self.largest_weight for weight in problem.dim_weights)
        self.has_coefficient = problem.weights is not None or self.prefix_weights != (1.0,)
        self.softmaxes = problem.softmaxes()
        self.terms = tuple(term for terms in self.softmaxes for term in terms)
        self.masked = is_masked(self.terms)
        self.gathered = problem.all_queries is not None and any(term.columns_are_queries for term in self.terms)
        self.way = way or self.faster_way()
        self.operands = {
            "queries": self._operand((problem.queries,), needs.queries),
            "documents": self._operand(problem.documents, needs.documents),
        }
        if self.gathered and problem.all_queries is not None:
            self.operands["all_queries"] = self._operand((problem.all_queries,), needs.all_queries)
        multiplied = self.multiplied_terms()
        self.row_names = [self._rows_name(term) for term in multiplied]
        self.column_names = [self._columns_name(term) for term in multiplied]
        self.started = {name for name in self.operands if self._rows_alone(name)}  # written to, or need no first write
        self.zeroed: set[str] = set()
        self.layout = Layout()
        self.divided_later = needs.vectors and self.divides_later(self.way)
        self.online = self.finds_maximum(self.way, self.divided_later)
        # Beside a constant, rows whose sum vanished are done again.
        self.redoes = problem.sums_may_vanish and not self.online

    def plan(self) -> Plan:
        """Returns the plan."""
        problem = self.problem
        guide = None
        if problem.guide_queries is not None:
            guide = (self._guide_operand((problem.guide_queries,)), self._guide_operand(problem.guide_documents))
        buffers = self.buffers(guide)
        softmaxes = tuple(self._softmax(terms, index) for index, terms in enumerate(self.softmaxes))
        operands = {
            name: replace(operand, rows_alone=self._rows_alone(name), zeroed=name in self.zeroed)
            for name, operand in self.operands.items()
        }
        plan_type = self.plan_type(softmaxes)
        return plan_type(
            target=self.target,
            precision=self.precision,
            way=self.way,
            vendor=vendor_multiplies(self.precision, self.target),
            guide_vendor=vendor_multiplies(FULL, self.target),
            online=self.online,
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
            queries=operands["queries"],
            documents=operands["documents"],
            all_queries=operands.get("all_queries"),
            guide=guide,
            guide_width=0 if problem.guide_queries is None else problem.guide_queries.shape[1],
            softmaxes=softmaxes,
            buffers=buffers,
            workspace_bytes=self.layout.bytes,
        )

    def plan_type(self, softmaxes: tuple[SoftmaxPlan, ...]) -> Callable[..., Plan]:
        """Returns what makes the plan of its parts; called before the workspace is measured, so it may still grow."""
        return Plan

    def faster_way(self) -> str:
        """Returns the way asked for, or the one that the cost model expects to be faster."""
        asked_for = settings.get("weights")
        if self.problem.guided:  # a kernel with two products would have registers for neither
            if asked_for == "sweep":
                log_once(logger, "SBERT_KERNELS_WEIGHTS='sweep' takes no guide, so that 'weigh' takes its place.")
            return "weigh"
        return asked_for or min(settings.WEIGHTS, key=self._seconds)

    def multiplied_terms(self) -> tuple[Term, ...]:
        """Returns the terms whose weights are multiplied, each for the gradients of its rows and its columns."""
        return self.terms

    def _seconds(self, way: str) -> float:
        if way == "sweep" and (self.precision.fma or self.precision.split):
            return float("inf")  # without tensor cores Triton's products take four times as long as the vendor's
        passes = 1 if self.divides_later(way) and not (way == "weigh" and self.finds_maximum(way, True)) else 2
        weight_bytes = self.precision.dtype.itemsize
        return sum(
            accounting(
                self.n,
                term.columns,
                self.problem.dims,
                weight_bytes,
                way,
                passes=passes,
                gradients=self.needs.vectors,
                chunk_rows=chunk_rows(self.n, self.row_bytes(way), self.target),
            ).seconds(self.target.gpu, self.precision.rate)
            for term in self.terms
        )

    def divides_later(self, way: str) -> bool:
        """Returns True if weights may be written before their sum is known, and the rows' factors applied later."""
        if self.prefixes > 1 or any(term.duplicates == "positive" for term in self.terms):
            return False  # one matrix holds weights of several sums; or has entries that are no exponentials
        if self.precision.lift and not self.problem.cosine:
            return False  # rows of any length times a lifted factor may leave fp16
        return way == "weigh" or (self.problem.bounded and not self.precision.lift)

    def finds_maximum(self, way: str, divided_later: bool) -> bool:
        """Returns True if each row's maximum must be found: no constant serves, or a sum might vanish beside it."""
        if not self.problem.bounded or (divided_later and self.precision.lift):
            return True
        if way == "weigh" and not divided_later:
            return True  # of two passes, the first one may as well find it
        # A sweep whose weights are divided later may do the rows again that vanish.
        return self.problem.sums_may_vanish and not (divided_later and way == "sweep")

    # -- operands and memory -------------------------------------------------------------------------------------------

    def _rows_name(self, term: Term) -> str:
        return "queries" if term.rows_are_queries else "documents"

    def _columns_name(self, term: Term) -> str:
        return "documents" if not term.columns_are_queries else "all_queries" if self.gathered else "queries"

    def _rows_alone(self, name: str) -> bool:
        return self.row_names.count(name) == 1 and name not in self.column_names and self.operands[name].rows == self.n

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

    def buffers(self, guide: tuple[OperandPlan, OperandPlan] | None) -> tuple[Buffer, ...]:
        """Returns the memory of the whole call; the chunks' begins behind it."""
        add, k, n = self.layout.add, self.prefixes, self.n
        found = [add("positive", k, n), add("losses", n)]
        for name, operand in self.operands.items():
            if operand.cosine:
                found.append(add(f"norms.{name}", k, operand.rows))
            if self._rows_alone(name) and operand.need and self.divided_later:
                found.append(add(f"row_coefficient.{name}", operand.rows))
        if "all_queries" in self.operands:
            found.append(add("gathered_positive", k, self.operands["all_queries"].rows))
        if guide is not None:
            found += [
                add(f"guide.norms.{name}", 1, of.rows) for name, of in zip(("queries", "documents"), guide, strict=True)
            ]
            found.append(add("guide.positive", 1, n))
        if self.needs.scale:
            found.append(add("scale_gradient", n))
        if self.needs.vectors:
            found.append(add("d_positive", k, n))
            if self.gathered:
                found.append(add("d_gathered_positive", k, n))
        self.layout.begin_chunks()
        return tuple(found)

    def row_bytes(self, way: str) -> int:
        """Returns the memory that a row of all terms takes, of one softmax at most; 1 if it takes none."""

        def of(term: Term) -> int:
            stride, weights = padded(term.columns), self.precision.dtype.itemsize * self.prefixes
            if way == "sweep":
                return stride * weights if self.needs.vectors else 0
            apart = weights if self.needs.vectors and not self._in_place() else 0
            return stride * (4 * self.prefixes + apart + (4 if term.guided else 0))

        return max(1, *(sum(map(of, terms)) for terms in self.softmaxes))

    def _in_place(self) -> bool:
        """Returns True if weights are written over the dot products.

        Of several prefixes, weights of half the size would overwrite dot products of other rows. On ROCm a barrier does
        not order loads before the stores of other threads.
        """
        return self.target.backend != "hip" and (self.prefixes == 1 or self.precision.dtype.itemsize == 4)

    # -- softmaxes -----------------------------------------------------------------------------------------------------

    def _softmax(self, terms: tuple[Term, ...], index: int) -> SoftmaxPlan:
        planned = tuple(map(self._term, terms))
        gradients = self.needs.vectors
        positives = tuple(
            "gathered_positive" if term.columns == "all_queries" else "positive"
            for term in planned
            if term.term.positive is not None
        )
        d_positives: tuple[str | None, str | None] = (None, None)
        if gradients:  # each softmax has a positive pair: validation sees to that
            d_positives = (f"d_{positives[0]}", None if len(set(positives)) == 1 else f"d_{positives[1]}")
        return SoftmaxPlan(
            terms=planned,
            add=index > 0,
            divided_later=self.divided_later,
            chunks=tuple(self.chunks(planned)),
            positives=positives,
            d_positives=d_positives,
            add_d_positive=gradients and index > 0 and d_positives[0] != "d_gathered_positive",
            radial=gradients and self.problem.cosine and self.prefixes > 1,
        )

    def _term(self, term: Term) -> TermPlan:
        return TermPlan(
            term=term,
            rows=self._rows_name(term),
            row_begin=0 if term.rows_are_queries else self.problem.row_offset,
            columns=self._columns_name(term),
            # The positive is added row by row, not through the matrix of weights.
            excluded=Diagonals.of(term.excluded if term.positive is None else (term.positive,)),
            hardness_exceptions=Diagonals.of(term.hardness_exceptions),
        )

    def chunks(self, terms: tuple[TermPlan, ...]) -> Iterator[ChunkPlan]:
        """Yields the chunks of the rows of a softmax."""
        row_bytes = self.row_bytes(self.way)
        step = self.n if row_bytes == 1 else chunk_rows(self.n, row_bytes, self.target)
        known: dict[int, tuple[Any, ...]] = {}
        for begin in range(0, self.n, step):
            end = min(begin + step, self.n)
            n = end - begin
            if n not in known:
                passes = self.passes(terms, n)
                known[n] = (*passes, self.chunk_buffers(terms, n, *passes[:2]))
            sweeps, second, redo, buffers = known[n]
            yield ChunkPlan(
                begin,
                end,
                sweeps,
                second,
                redo,
                tuple(map(self._overwrites, terms)) if self.needs.vectors else (),
                buffers,
            )

    def passes(
        self, terms: tuple[TermPlan, ...], n: int
    ) -> tuple[tuple[SweepPlan, ...], tuple[SweepPlan, ...], tuple[SweepPlan, ...]]:
        """Returns the passes over a chunk of n rows: the first, the second, and that which does rows again."""
        # As in any matrix product, a program of a sweep that writes weights computes one tile.
        sweeps = tuple(self.sweep(term, n, one_tile=self.divided_later) for term in terms)
        second: tuple[SweepPlan, ...] = ()
        if self.needs.vectors and not self.divided_later:
            second = tuple(self.sweep(term, n, one_tile=True) for term in terms)
        redo: tuple[SweepPlan, ...] = ()
        if self.redoes:
            config = tiles.redo_config(self.target, self.precision)
            redo = tuple(SweepPlan(config, cdiv(n, config["BLOCK_A"]), 1, term.term.columns) for term in terms)
        return sweeps, second, redo

    def _overwrites(self, term: TermPlan) -> bool:
        """Follows which gradients have been written to, in the order of a run: rows, then columns, term by term."""
        for name in (term.rows, term.columns):
            if not self.operands[name].need or name in self.started:
                continue
            self.started.add(name)
            if name == term.columns and term.term.columns == self.operands[name].rows:
                return True
            self.zeroed.add(name)
        return False

    def sweep(self, term: TermPlan, n: int, *, one_tile: bool) -> SweepPlan:
        """Returns how some rows of a term are divided; ``one_tile``: each program of a sweep computes one tile."""
        m = term.term.columns
        if self.way == "weigh":
            masked = self.masked or term.term.guided
            config = tiles.weigh_config(self.target, m, self.prefixes, masked, self.variant)
            return SweepPlan(config, cdiv(n, config["BLOCK_A"]), 1, m)
        sides = (self.operands[term.rows], self.operands[term.columns])
        config = tiles.sweep_config(
            self.target,
            self.precision,
            masked=self.masked,
            prefixes=self.prefixes,
            aligned=all(side.row_stride % 16 == 0 for side in sides),
            variant=self.variant,
        )
        blocks, column_blocks = cdiv(n, config["BLOCK_A"]), cdiv(m, config["BLOCK_B"])
        splits = column_blocks
        if not one_tile:
            wanted = cdiv(BLOCKS_PER_MULTIPROCESSOR * self.target.processors, blocks)
            splits = max(1, min(wanted, column_blocks, MOST_SPLITS))
        columns_per_program = cdiv(column_blocks, splits) * config["BLOCK_B"]
        return SweepPlan(config, blocks, cdiv(m, columns_per_program), columns_per_program)

    def chunk_buffers(
        self,
        terms: tuple[TermPlan, ...],
        n: int,
        sweeps: tuple[SweepPlan, ...],
        second: tuple[SweepPlan, ...],
    ) -> tuple[Buffer, ...]:
        """Returns the memory of a chunk of n rows; names end with the number of the term where each has its own."""
        add, k, gradients = self.layout.add, self.prefixes, self.needs.vectors
        self.layout.begin_chunk()
        splits = sum(sweep.splits for sweep in sweeps)
        found = [add("total", splits, k, n)]
        if self.online:
            found.append(add("maximum", splits, k, n))
        if self.needs.scale:
            found.append(add("similarity_total", splits, k, n))
        if any(term.term.duplicates == "positive" for term in terms):
            found += [add(name, splits, k, n) for name in ("duplicate_count", "duplicate_similarity_total")]
            found.append(add("positive_share", k, n))
        if self.redoes:
            found += [add(f"redone.{name}", len(terms), 1, n) for name in ("maximum", "total", "similarity_total")]
        if not gradients:
            return tuple(found + self._dots(terms, n))
        found.append(add("logsumexp", k, n))
        if self.has_coefficient:
            found.append(add("coefficient", k, n))
        dtype, width = self.precision.dtype, self.problem.dims[-1]
        if self.divided_later:
            found.append(add("scaled", n, width, dtype=dtype))
            if not all(self._rows_alone(term.rows) and self.operands[term.rows].need for term in terms):
                found += [add("row_coefficient", n), add("found", n, width)]
        found += self._dots(terms, n)
        for index, term in enumerate(terms):
            m = term.term.columns
            over = f"dots.{index}" if self.way == "weigh" and self._in_place() else None
            found.append(add(f"weights.{index}", k, n, m, dtype=dtype, row_stride=padded(m), over=over))
            if second and self.problem.cosine and k > 1:
                found.append(add(f"row_radial.{index}", second[index].splits, k, n))
                found.append(add(f"column_radial.{index}", second[index].blocks, k, m))
        return tuple(found)

    def _dots(self, terms: tuple[TermPlan, ...], n: int) -> list[Buffer]:
        found = []
        for index, term in enumerate(terms if self.way == "weigh" else ()):
            m = term.term.columns
            found.append(self.layout.add(f"dots.{index}", self.prefixes, n, m, row_stride=padded(m)))
            if term.term.guided:
                found.append(self.layout.add(f"guide.dots.{index}", n, m, row_stride=padded(m)))
        return found
