"""Computes the terms of one softmax for a chunk of rows: sums, then weights, then the products with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ....problems.contrastive import LEAST_EXPONENT
from ..launching import Prepared
from .arguments import NO_GUIDE, NO_SUMS, Guide, Known, Rule, Sums
from .call import Call
from .multiply import multiply
from .plan import ChunkPlan, Diagonals, Plan, SoftmaxPlan, SweepPlan
from .precision import FULL
from .redo import redo
from .rows import prepared_add_rows, prepared_scale_rows
from .statistics import Statistics
from .sweep import sweep
from .weigh import weigh

Memory = dict[str, Tensor]
# What starts a pass: it is called with rows, columns, rule, guide, known, sums and weights, all by their names.
Pass = Callable[..., None]


class TermProgram:
    """Knows the launches and products of one term for a chunk of rows.

    Other kernels that make weights are launched by a subclass, whose `make_pass` returns them.
    """

    def __init__(self, plan: Plan, softmax: SoftmaxPlan, chunk: ChunkPlan, index: int, first_split: int) -> None:
        self.plan, self.term, self.index = plan, softmax.terms[index], index
        rule = self.term.term
        self.n, self.m = chunk.end - chunk.begin, rule.columns
        self.begin, self.end = chunk.begin, chunk.end
        # Of the rows among the vectors of their name.
        self.rows_begin = self.term.row_begin + chunk.begin
        self.rows_end = self.rows_begin + self.n
        self.splits = slice(first_split, first_split + (chunk.sweeps[index].splits if chunk.sweeps else 0))
        self.excluded = _from(self.term.excluded, chunk.begin)
        self.exceptions = _from(self.term.hardness_exceptions, chunk.begin)
        self.own_column = rule.own_column + chunk.begin
        self.weights, self.dots, self.guide_dots = (f"{name}.{index}" for name in ("weights", "dots", "guide.dots"))
        self.overwrites = bool(chunk.overwrites) and chunk.overwrites[index]
        self.first = self.make_pass(chunk, chunk.sweeps[index], softmax.divided_later) if chunk.sweeps else None
        self.second = self.make_pass(chunk, chunk.weights[index], True) if chunk.weights else None
        self.redo = self._prepared_redo(chunk, sum(part.splits for part in chunk.sweeps)) if chunk.redo else None
        self.scale_rows, self.add_rows = prepared_scale_rows(plan, self.n), prepared_add_rows(plan, self.n)

    def make_pass(self, chunk: ChunkPlan, part: SweepPlan, writes: bool) -> Pass:
        """Returns what starts a pass over the columns; ``writes``: it writes weights, and not only sums."""
        plan, term = self.plan, self.term
        strides = {buffer.name: buffer.strides[1] for buffer in chunk.buffers if len(buffer.strides) == 3}
        fixed: dict[str, Any] = {
            "n_rows": self.n,
            "n_columns": self.m,
            "weights_stride": strides[self.weights] if writes else 0,
            "EXCLUDED": term.excluded.count,
            "EXCEPTIONS": term.hardness_exceptions.count,
            "HARD_EVERYWHERE": term.term.hard_everywhere,
            "DUPLICATES_ARE_POSITIVE": term.term.duplicates == "positive",
            "LIFT": plan.precision.lift,
        }
        if plan.way == "weigh":
            fixed |= {"dots_stride": strides[self.dots], "PREFIXES": len(plan.dims)}
            return Prepared(weigh, part.grid, config=part.config, **fixed)
        fixed |= {"width": plan.dims[-1], "columns_per_program": part.columns_per_program, "DIMS": plan.dims}
        return Prepared(sweep, part.grid, config=part.config, **fixed, **plan.precision.constants())

    def _prepared_redo(self, chunk: ChunkPlan, splits: int) -> Prepared:
        term, part = self.term, chunk.redo[self.index]
        strides = [buffer.strides[1] for buffer in chunk.buffers if buffer.name == self.weights]
        return Prepared(
            redo,
            part.grid,
            config=part.config,
            n_rows=self.n,
            n_columns=self.m,
            width=self.plan.dims[-1],
            guide=NO_GUIDE,
            least=math.exp(LEAST_EXPONENT),
            splits=(splits, self.splits.start, self.splits.stop),
            weights_stride=strides[0] if strides else 0,
            DIMS=self.plan.dims,
            DIAGONALS=(term.excluded.count, term.hardness_exceptions.count),
            HARD_EVERYWHERE=term.term.hard_everywhere,
            **self.plan.precision.constants(),
        )

    # -- passes --------------------------------------------------------------------------------------------------------

    def run_pass(
        self,
        start: Pass | None,
        call: Call,
        memory: Memory,
        *,
        known: Known,
        sums: Sums = NO_SUMS,
        weights: Tensor | None = None,
        **others: Tensor | None,
    ) -> None:
        """Starts the first pass or the second; ``others`` are arguments that only some kernels have."""
        assert start is not None  # the chunk's plan has it
        if self.plan.way == "weigh":
            others["dots"] = memory[self.dots]
        start(
            rows=call.side(self.term.rows, self.rows_begin, self.rows_end),
            columns=call.side(self.term.columns, 0, self.m),
            rule=self.rule(call),
            guide=self._guide(call, memory) if self.term.term.guided else NO_GUIDE,
            known=known,
            sums=sums,
            weights=weights,
            **others,
        )

    def rule(self, call: Call) -> Rule:
        """Returns the term's rule with the tensors and numbers of this call."""
        term, ids = self.term, call.problem.column_ids(self.term.term)
        return Rule(
            call.scale,
            call.scale_tensor,
            term.term.hardness,
            self.excluded,
            term.excluded.stride,
            self.exceptions,
            term.hardness_exceptions.stride,
            None if ids is None else ids[self.own_column : self.own_column + self.n],
            ids,
            self.own_column,
        )

    def multiply(self, call: Call, memory: Memory) -> None:
        """Writes the dot products of each prefix, and those of the guide."""
        plan, dots = self.plan, memory[self.dots]
        rows = call.side(self.term.rows, self.rows_begin, self.rows_end).vectors
        columns = call.side(self.term.columns, 0, self.m).vectors
        for k, (begin, end) in enumerate(zip((0, *plan.dims), plan.dims, strict=False)):
            if k > 0:
                dots[k].copy_(dots[k - 1])
            # [n, d] @ [d, M] -> [n, M]
            self._product(dots[k], rows[:, begin:end], columns[:, begin:end].T, add=k > 0)
        if self.term.term.guided:
            guide_rows, guide_columns = self._guide_sides(call)
            multiply(
                memory[self.guide_dots],
                guide_rows.vectors,
                guide_columns.vectors.T,
                add=False,
                precision=FULL,
                vendor=plan.guide_vendor,
                target=plan.target,
            )

    def _guide(self, call: Call, memory: Memory) -> Guide:
        assert call.guide_threshold is not None  # a guided term is one of a problem with a guide
        rows, columns = self._guide_sides(call)
        dots, threshold = memory[self.guide_dots], call.guide_threshold[self.begin : self.end]
        return Guide(dots, dots.stride(0), rows.inverse_norms, columns.inverse_norms, threshold)

    def _guide_sides(self, call: Call) -> tuple[Any, Any]:
        rows = call.guides["queries" if self.term.term.rows_are_queries else "documents"]
        columns = call.guides["queries" if self.term.term.columns_are_queries else "documents"]
        return rows.side(self.rows_begin, self.rows_end), columns.side(0, self.m)

    # -- products ------------------------------------------------------------------------------------------------------

    def _product(self, out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
        plan = self.plan
        multiply(out, a, b, add=add, precision=plan.precision, vendor=plan.vendor, target=plan.target)

    def add_products(self, call: Call, memory: Memory) -> None:
        """Adds the products with probabilities (K, n, columns) to the gradients of rows and columns."""
        rows, columns, dims = call.operands[self.term.rows], call.operands[self.term.columns], self.plan.dims
        weights, here = memory[self.weights], slice(self.rows_begin, self.rows_end)
        for k, (begin, end) in enumerate(zip((0, *dims), dims, strict=False)):
            part = slice(begin, end)
            if rows.need:  # [n, M] @ [M, d] -> [n, d]
                to, add = rows.summed()[here, part], not rows.plan.rows_alone
                self._product(to, weights[k], columns.vectors[: self.m, part], add=add)
            if columns.need:  # [M, n] @ [n, d] -> [M, d]
                to, add = columns.summed()[: self.m, part], not self.overwrites
                self._product(to, weights[k].T, rows.vectors[here, part], add=add)

    def add_divided_products(self, call: Call, memory: Memory, maximum: Tensor | None) -> None:
        """Does the same with weights whose sum, and whose rows' factors, are still to come.

        ``maximum``: (n,), what was subtracted from the logits of each row; None if it was the constant.
        """
        rows, columns = call.operands[self.term.rows], call.operands[self.term.columns]
        side, weights = call.side(self.term.rows, self.rows_begin, self.rows_end), memory[self.weights][0]
        if rows.row_coefficient is not None:
            coefficient = rows.row_coefficient[self.begin : self.end]
        else:
            coefficient = memory["row_coefficient"]
        scaled = memory["scaled"] if columns.need else None
        self.scale_rows(
            rows=side,
            maximum=maximum,
            shift=call.shift,
            logsumexp=memory["logsumexp"],
            coefficient=memory.get("coefficient"),
            row_coefficient=coefficient,
            scaled=scaled,
        )
        if rows.need:  # [n, M] @ [M, D] -> [n, D]
            vectors = columns.vectors[: self.m, : self.plan.dims[-1]]
            gradient = rows.summed()[self.rows_begin : self.rows_end]
            to = gradient if rows.plan.rows_alone else memory["found"]
            self._product(to, weights, vectors, add=False)
            if not rows.plan.rows_alone:
                self.add_rows(
                    found=to, row_coefficient=coefficient, inverse_norms=side.inverse_norms, gradient=gradient
                )
        if scaled is not None:  # [M, n] @ [n, D] -> [M, D]
            self._product(columns.summed()[: self.m], weights.T, scaled, add=not self.overwrites)


class ChunkProgram:
    """Knows the launches and products of one softmax for a chunk of rows; made once a plan, and holds no tensor."""

    Term: type[TermProgram] = TermProgram

    def __init__(self, plan: Plan, softmax: SoftmaxPlan, chunk: ChunkPlan) -> None:
        self.plan, self.softmax, self.chunk = plan, softmax, chunk
        self.n, splits = chunk.end - chunk.begin, 0
        self.terms: list[TermProgram] = []
        for index, part in enumerate(chunk.sweeps):
            self.terms.append(self.Term(plan, softmax, chunk, index, splits))
            splits += part.splits
        self.counts = any(term.term.duplicates == "positive" for term in softmax.terms)
        splits = len(self.terms) if chunk.redo else splits
        self.statistics = Statistics(plan, softmax, chunk.begin, chunk.end, splits)

    def run(self, call: Call) -> None:
        """Computes losses of the rows of the chunk, and adds to the gradients what their weights give."""
        memory, divided_later = call.workspace.tensors(self.chunk.buffers), self.softmax.divided_later
        sums = Sums(*[memory.get(name) for name in Sums._fields])
        if self.counts:  # terms whose duplicates are no positives count none
            memory["duplicate_count"].zero_()
            memory["duplicate_similarity_total"].zero_()
        for term in self.terms:
            if self.plan.way == "weigh":
                term.multiply(call, memory)
            weights = memory[term.weights] if divided_later else None
            term.run_pass(
                term.first, call, memory, known=call.shift_alone, sums=self._sums_of(term, sums), weights=weights
            )
        if self.chunk.redo:
            sums = self._redo(call, memory, sums)
        self.statistics(call, memory, sums)
        if self.chunk.weights:
            self.write_weights(call, memory)
        if not self.plan.gradients:
            return
        for term in self.terms:
            if divided_later:  # a maximum is of one split a term
                maximum = None if sums.maximum is None else sums.maximum[term.index]
                term.add_divided_products(call, memory, maximum)
            else:
                term.add_products(call, memory)

    def _sums_of(self, term: TermProgram, sums: Sums) -> Sums:
        """Returns where a term's splits go."""
        if len(self.terms) == 1:
            return sums
        of_term = Sums(*[None if part is None else part[term.splits] for part in sums])
        if term.term.term.duplicates != "positive":
            of_term = of_term._replace(duplicate_count=None, duplicate_similarity_total=None)
        return of_term

    def _redo(self, call: Call, memory: Memory, sums: Sums) -> Sums:
        """Does rows again whose sum vanished; returns sums of one split for each term."""
        positives = self.statistics.positives(call)
        redone = {name: memory[f"redone.{name}"] for name in ("maximum", "total", "similarity_total")}
        if sums.similarity_total is None:
            del redone["similarity_total"]
        for term in self.terms:
            assert term.redo is not None  # the chunk's plan has one for each term
            term.redo(
                rows=call.side(term.term.rows, term.rows_begin, term.rows_end),
                columns=call.side(term.term.columns, 0, term.m),
                rule=term.rule(call),
                known=call.shift_alone,
                swept=sums,
                positives=positives,
                sums=NO_SUMS._replace(**{name: part[term.index] for name, part in redone.items()}),
                weights=memory.get(term.weights),
            )
        return NO_SUMS._replace(**redone)

    def write_weights(self, call: Call, memory: Memory) -> None:
        """Starts the second pass of each term, which writes the weights, as all is known of their rows by now."""
        coefficient = memory.get("coefficient")
        for term in self.terms:
            share = memory.get("positive_share") if term.term.term.positive is not None else None
            known = Known(call.shift, memory["logsumexp"], coefficient, share, self.n)
            radial: Memory = {}
            if self.softmax.radial:
                radial = {name: memory[f"{name}.{term.index}"] for name in ("row_radial", "column_radial")}
            sums = NO_SUMS._replace(**radial)
            term.run_pass(term.second, call, memory, known=known, sums=sums, weights=memory[term.weights])
            if radial:
                call.operands[term.term.rows].add_radial(radial["row_radial"], term.rows_begin)
                call.operands[term.term.columns].add_radial(radial["column_radial"], 0)


def _from(diagonals: Diagonals, row: int) -> int:
    """Returns the column of the first diagonal in a row; 0 if there are none."""
    return diagonals.first + row if diagonals.count else 0
