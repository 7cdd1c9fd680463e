"""Decides what is otherwise about a call than for Triton's kernels: the tiles, and how weights come by their sums.

One kernel, compiled with its tile into the library, takes the place of Triton's sweep. It knows three policies:

    rows     weights and sums in one pass, the sums divided out after the products: bfloat16, whose range holds them
    sums     sums alone: where no gradient is needed, and as the first of two passes
    known    weights relative to sums that are known: the second pass for float16

A symmetric loss has two softmaxes over one matrix of similarities, one over its rows and one over its columns. Its
gradient needs one matrix of weights, which are known once the sums of both are: `TwoSidedPlan`. That takes 4 matrix
products, where each direction by itself takes 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ....problems.contrastive import ContrastiveProblem, Needs, Term
from ...triton.contrastive.memory import Buffer
from ...triton.contrastive.plan import ChunkPlan, OperandPlan, Plan, SoftmaxPlan, SweepPlan, TermPlan
from ...triton.contrastive.planner import Planner, chunk_rows, padded
from ...triton.launching import Config, cdiv
from ...triton.targets import Target

# The tile of the library's kernels (`csrc/cuda/contrastive/core.h`). The rest is for Triton's compiler: not read here.
TILE = 128
CONFIG = Config((("BLOCK_A", TILE), ("BLOCK_B", TILE)), num_warps=12, num_stages=1)


@dataclass(frozen=True)
class TwoSidedPlan(Plan):
    """Holds all that is decided about a symmetric loss.

    The first of its softmaxes has the chunks of rows whose weights are multiplied, the second one has none.
    """

    sums: tuple[ChunkPlan, ...]  # of rows whose sums, and their columns', are found at a time

    @property
    def gradient_lift(self) -> int:
        """Gradients are summed up times 2^gradient_lift: weights are, by the coefficients of their rows and columns."""
        return self.row_lift


def make_plan(problem: ContrastiveProblem, needs: Needs, target: Target) -> Plan:
    """Returns the plan of a call; see `triton.contrastive.planner.make_plan`."""
    kind = TwoSidedPlanner if is_two_sided(problem, needs) else CudaPlanner
    return kind(problem, needs, target).plan()


def is_two_sided(problem: ContrastiveProblem, needs: Needs) -> bool:
    """Returns True if a loss has two softmaxes, over the rows and over the columns of one matrix, and gradients."""
    softmaxes = problem.softmaxes()
    if not needs.vectors or [len(terms) for terms in softmaxes] != [1, 1] or problem.sums_may_vanish:
        return False
    (forward,), (back,) = softmaxes
    return (
        problem.all_queries is None
        and len(problem.documents[0]) == len(problem.queries)
        and (forward.rows_are_queries, forward.columns_are_queries) == (True, False)
        and (back.rows_are_queries, back.columns_are_queries) == (False, True)
        and all(term.positive == 0 and term.duplicates == "keep" and term.hardness == 0 for term in (forward, back))
    )


class CudaPlanner(Planner):
    """Decides the parts of a plan for the CUDA kernels."""

    def faster_way(self) -> str:
        """Returns the one way that there is."""
        return "sweep"

    def finds_maximum(self, way: str, divided_later: bool) -> bool:
        """Returns False: the kernels subtract a constant, and what that cannot serve is not theirs."""
        return False

    def row_bytes(self, way: str) -> int:
        """Returns the memory that a row of all terms takes: its weights, or without gradients its sums."""
        if self.needs.vectors:
            return super().row_bytes(way)
        return max(sum(4 * cdiv(term.columns, TILE) for term in terms) for terms in self.softmaxes)

    def sweep(self, term: TermPlan, n: int, *, one_tile: bool) -> SweepPlan:
        """Returns how some rows of a term are divided: into the kernels' tiles."""
        return SweepPlan(CONFIG, cdiv(n, TILE), cdiv(term.term.columns, TILE), TILE)

    def chunk_buffers(
        self, terms: tuple[TermPlan, ...], n: int, sweeps: tuple[SweepPlan, ...], second: tuple[SweepPlan, ...]
    ) -> tuple[Buffer, ...]:
        """Returns the memory of a chunk of n rows."""
        found = super().chunk_buffers(terms, n, sweeps, second)
        return (*found, self.layout.add("row_coefficient", n)) if second else found


class TwoSidedPlanner(CudaPlanner):
    """Decides the parts of the plan of a symmetric loss."""

    def divides_later(self, way: str) -> bool:
        """Returns False: the weights of both directions are relative to sums that are known."""
        return False

    def multiplied_terms(self) -> tuple[Term, ...]:
        """Returns the term over the rows: its weights are those of both."""
        return self.terms[:1]

    def plan_type(self, softmaxes: tuple[SoftmaxPlan, ...]) -> Callable[..., Plan]:
        """Returns what makes the plan, with the chunks whose sums come first."""
        (term,), (chunk, *_) = softmaxes[0].terms, softmaxes[0].chunks
        step = self._rows_at_a_time(chunk.end)
        sums = tuple(self._sums(term, begin, min(begin + step, self.n)) for begin in range(0, self.n, step))
        return partial(TwoSidedPlan, sums=sums)

    def buffers(self, guide: tuple[OperandPlan, OperandPlan] | None) -> tuple[Buffer, ...]:
        """Returns the memory of the whole call; the chunks' begins behind it."""
        found, add, n = super().buffers(guide), self.layout.add, self.n
        found += (add("row_coefficient", n), add("column_coefficient", self.terms[0].columns))
        found += (add("column_logsumexp", 1, n),)
        if self.has_coefficient:
            found += (add("column_weights", 1, n),)
        step = self._rows_at_a_time(chunk_rows(n, self.row_bytes(self.way), self.target))
        if step < n:
            found += (add("column_totals", cdiv(n, step), n),)
        self.layout.begin_chunks()
        return found

    def chunks(self, terms: tuple[TermPlan, ...]) -> Iterator[ChunkPlan]:
        """Yields the chunks of the rows of the first softmax."""
        return super().chunks(terms) if terms[0].term.softmax == 0 else iter(())

    def passes(
        self, terms: tuple[TermPlan, ...], n: int
    ) -> tuple[tuple[SweepPlan, ...], tuple[SweepPlan, ...], tuple[SweepPlan, ...]]:
        """Returns the one pass over a chunk of n rows: when it comes, all sums are known."""
        return (), tuple(self.sweep(term, n, one_tile=True) for term in terms), ()

    def chunk_buffers(
        self, terms: tuple[TermPlan, ...], n: int, sweeps: tuple[SweepPlan, ...], second: tuple[SweepPlan, ...]
    ) -> tuple[Buffer, ...]:
        """Returns the memory of a chunk of n rows: that of its weights."""
        self.layout.begin_chunk()
        m = terms[0].term.columns
        return (self.layout.add("weights.0", 1, n, m, dtype=self.precision.dtype, row_stride=padded(m)),)

    def _rows_at_a_time(self, weighed: int) -> int:
        """Returns how many rows' sums, and sums of columns over them, take the memory of so many rows' weights."""
        of_row = 4 * (self.terms[0].columns + self.n) / TILE
        rows = int(weighed * self.row_bytes(self.way) / of_row)
        return min(self.n, max(TILE, rows // TILE * TILE))

    def _sums(self, term: TermPlan, begin: int, end: int) -> ChunkPlan:
        """Returns how the sums of some rows are found."""
        self.layout.begin_chunk()
        n, add, part = end - begin, self.layout.add, self.sweep(term, end - begin, one_tile=True)
        buffers = [add("total", part.splits, 1, n), add("column_total", part.blocks, self.n), add("logsumexp", 1, n)]
        if self.has_coefficient:
            buffers.append(add("coefficient", 1, n))
        return ChunkPlan(begin, end, (part,), (), (), (), tuple(buffers))
