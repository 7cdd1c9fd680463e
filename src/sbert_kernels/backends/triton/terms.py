"""The terms of one softmax, as sweeps and products: first its statistics, then gradients from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from ...problems.contrastive import Term
from . import softmax, tuning
from .launching import launch
from .operands import Operand, add_product
from .sweep import sweep
from .traits import bounded, chunk_rows, crowded, masked

if TYPE_CHECKING:
    from .call import Call

# Blocks of a sweep for each multiprocessor, below which the other side is divided into splits.
BLOCKS_PER_MULTIPROCESSOR = 4


class Softmax:
    """The terms of one softmax: statistics, then gradients."""

    def __init__(self, call: Call, group: tuple[Term, ...], add: bool) -> None:
        self.call, self.group, self.add = call, group, add
        self.products, self.n = call.products, call.n
        self.masked = masked(call.problem)
        self.further = any(term.duplicates == "positive" for term in group)
        self.online = not bounded(call.problem)
        # exp(z) itself is the weight, and its row sum is divided out at the end.
        self.unshifted = not (self.online or self.further or self.products.lift) and len(call.dims) == 1
        shape = (len(call.dims), self.n)

        def rows(wanted: bool) -> Tensor | None:
            return call.vector(call.documents, *shape) if wanted else None

        self.logsumexp, self.row_coefficient = rows(call.gradients), rows(call.gradients and self.unshifted)
        weighted = call.row_weights is not None or call.prefix_weights != (1.0,)
        self.coefficient = rows(call.gradients and weighted)
        self.further_share = rows(call.gradients and self.further)

    def run(self) -> None:
        call = self.call
        everything = slice(0, self.n)
        if not call.gradients:
            self._statistics(everything)
        elif call.strategy == "chunked":
            if not self.unshifted:
                self._statistics(everything)
            step = chunk_rows(call.problem, self.products, self.n)
            room = [
                torch.empty(len(call.dims) * step * term.columns, dtype=self.products.dtype, device=call.problem.device)
                for term in self.group
            ]
            for begin in range(0, self.n, step):
                self._chunk(slice(begin, min(begin + step, self.n)), room)
        else:
            self._tiled()

    # -- one strategy and the other ------------------------------------------------------------------------------------

    def _tiled(self) -> None:
        everything = slice(0, self.n)
        found: list[Tensor | None] = [None] * len(self.group)
        if self._in_one_sweep():
            found = self._statistics(everything, with_gradients=True)
        else:
            self._statistics(everything)
        for term, gradient in zip(self.group, found, strict=True):
            rows, begin, columns = self._sides(term)
            if rows.need:
                if gradient is not None:
                    rows.add(gradient, begin, self.row_coefficient[0])
                else:
                    rows.add(self._gradient(term, of_columns=False), begin)
            if columns.need:
                columns.add(self._gradient(term, of_columns=True), 0)

    def _chunk(self, rows: slice, room: list[Tensor]) -> None:
        """Weights of these rows, and the vendor's products with them."""
        call, dims = self.call, self.call.dims
        n = rows.stop - rows.start
        weights = [
            buffer[: len(dims) * n * term.columns].view(len(dims), n, term.columns)
            for term, buffer in zip(self.group, room, strict=True)
        ]
        if self.unshifted:
            self._statistics(rows, weights)
        else:
            for term, matrix in zip(self.group, weights, strict=True):
                self._write_weights(term, rows, matrix)
        lift = self.products.lift
        coefficient = None if self.row_coefficient is None else self.row_coefficient[0, rows, None]
        for term, matrix in zip(self.group, weights, strict=True):
            operand, begin, columns = self._sides(term)
            own = slice(begin + rows.start, begin + rows.stop)
            for k, dim in enumerate(dims):
                part = slice(dims[k - 1] if k else 0, dim)
                if operand.need:  # [n, M] @ [M, d] -> [n, d]
                    found = call.vector(operand, n, dim - part.start)
                    add_product(found, matrix[k], self._as_operand(columns.values[: term.columns, part]), True, lift)
                    if coefficient is not None:
                        found *= coefficient
                    operand.accumulator()[own, part] += found
                if columns.need:  # [M, n] @ [n, d] -> [M, d]
                    vectors = self._as_operand(operand.values[own, part])
                    if coefficient is not None:
                        vectors = (vectors * coefficient).to(self.products.dtype)
                    first = columns.gradient is None and len(dims) == 1 and term.columns == columns.rows
                    if first:
                        columns.gradient = call.vector(columns, columns.rows, dim)
                    out = columns.accumulator()[: term.columns, part]
                    add_product(out, matrix[k].T, vectors, first, lift)

    def _as_operand(self, vectors: Tensor) -> Tensor:
        return vectors.to(self.products.dtype)

    # -- sweeps --------------------------------------------------------------------------------------------------------

    def _sides(self, term: Term) -> tuple[Operand, int, Operand]:
        """Row operand, where its rows begin, column operand."""
        call = self.call
        columns = call.all_queries if term.columns_are_queries else call.documents
        return (call.queries, 0, columns) if term.rows_are_queries else (call.documents, call.offset, columns)

    def _statistics(
        self, rows: slice, weights: list[Tensor] | None = None, with_gradients: bool = False
    ) -> list[Tensor | None]:
        """The statistics of these rows, combined; on the way, unshifted weights or gradients of the rows, (n, D)."""
        call, n = self.call, rows.stop - rows.start
        plans = [self._plan(term, n, False, with_gradients, weights is not None) for term in self.group]
        splits = [plan.splits for plan in plans]
        shape = (sum(splits), len(call.dims), n)

        def partial(wanted: bool) -> Tensor | None:
            return call.vector(call.documents, *shape) if wanted else None

        maximum, total = partial(self.online), partial(True)
        similarity_total = partial(call.needs.scale)
        further_count, further_total = partial(self.further), partial(self.further)
        if self.further:  # terms without a positive have none, and write none
            further_count.zero_()
            further_total.zero_()
        gradients: list[Tensor | None] = []
        begin = 0
        for index, (term, plan) in enumerate(zip(self.group, plans, strict=True)):
            here = slice(begin, begin + plan.splits)
            begin += plan.splits
            gradient = None
            if with_gradients and self._sides(term)[0].need:
                gradient = call.vector(call.documents, plan.splits, n, call.dims[-1])
            outputs = {
                "maximum": maximum,
                "total": total,
                "similarity_total": similarity_total,
                "further_count": further_count if term.positive is not None else None,
                "further_total": further_total if term.positive is not None else None,
            }
            outputs = {name: None if value is None else value[here] for name, value in outputs.items()}
            outputs |= {"gradient": gradient, "weights": None if weights is None else weights[index]}
            self._sweep(term, rows, False, plan, outputs)
            gradients.append(None if gradient is None else gradient[0] if plan.splits == 1 else gradient.sum(0))
        self._combine(rows, maximum, total, similarity_total, further_count, further_total)
        return gradients

    def _combine(self, rows: slice, maximum: Any, total: Tensor, similarity: Any, count: Any, further: Any) -> None:
        call, n = self.call, rows.stop - rows.start
        positives = [term for term in self.group if term.positive is not None]
        owns = [call.own_gathered if call.gathered and t.columns_are_queries else call.own for t in positives]
        pulls: list[Tensor | None] = [None, None]
        if call.gradients:
            pulls = [call.pull, None]
            if any(own is call.own_gathered for own in owns if call.gathered):
                if call.pull_gathered is None:
                    call.pull_gathered = call.vector(call.documents, len(call.dims), self.n)
                pulls = [call.pull_gathered, None] if len(owns) == 1 else [call.pull, call.pull_gathered]
        add_pull = self.add and pulls[0] is not call.pull_gathered

        def of(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector[..., rows]

        again = owns[1] if len(owns) > 1 else None
        launch(
            softmax.combine,
            (triton.cdiv(n, tuning.COMBINE["BLOCK_N"]),),
            maximum,
            total,
            similarity,
            count,
            further,
            of(owns[0]),
            owns[0].stride(0),
            of(again),
            0 if again is None else again.stride(0),
            of(call.row_weights),
            call.scale,
            call.scale_tensor,
            n,
            len(total),
            of(call.losses),
            of(self.logsumexp),
            of(self.coefficient),
            of(self.row_coefficient),
            of(self.further_share),
            of(pulls[0]),
            of(pulls[1]),
            of(call.scale_gradient),
            self.n,
            config=tuning.COMBINE,
            WEIGHTS=call.prefix_weights,
            ADD=self.add,
            ADD_PULL=add_pull,
        )

    def _write_weights(self, term: Term, rows: slice, weights: Tensor) -> None:
        """Probabilities of these rows, times their coefficients, as a matrix for each slice of the dimension."""
        plan = self._plan(term, rows.stop - rows.start, False, False, True)
        operand, begin, columns = self._sides(term)
        outputs: dict[str, Tensor | None] = {"weights": weights}
        if len(self.call.dims) > 1 and operand.factors is not None:
            n, k = rows.stop - rows.start, len(self.call.dims)
            blocks = triton.cdiv(n, plan.config["BLOCK_OWN"])
            outputs["own_along"] = self.call.vector(operand, plan.splits, k, n)
            outputs["other_along"] = self.call.vector(operand, blocks, k, term.columns)
        self._sweep(term, rows, False, plan, outputs)
        if "own_along" in outputs:
            operand.add_along(outputs["own_along"], begin + rows.start)
            columns.add_along(outputs["other_along"], 0)

    def _gradient(self, term: Term, of_columns: bool) -> Tensor:
        """The gradient of a term's rows or columns, from the known logsumexp: (n_own, D)."""
        rows, _, _ = self._sides(term)
        n = term.columns if of_columns else self.n
        plan = self._plan(term, n, of_columns, True, False)
        gradient = self.call.vector(rows, plan.splits, n, self.call.dims[-1])
        self._sweep(term, slice(0, self.n), of_columns, plan, {"gradient": gradient})
        return gradient[0] if plan.splits == 1 else gradient.sum(0)

    def _in_one_sweep(self) -> bool:
        """Whether, in tiles, the rows' gradients are found along with their statistics."""
        return self.unshifted and self._slice_width() >= self.call.dims[-1]

    def _slice_width(self) -> int:
        return tuning.slice_width(self.call.dims[-1], self.products.fma, crowded(self.call.problem, self.products))

    def _plan(self, term: Term, n_own: int, of_columns: bool, gradient: bool, weights: bool) -> _Plan:
        call = self.call
        n_other = self.n if of_columns else term.columns
        slice_width = self._slice_width() if gradient else 16
        config = tuning.sweep_config(
            call.target,
            self.products.dtype.itemsize,
            fma=self.products.fma,
            split=self.products.split,
            statistics=not gradient or (self._in_one_sweep() and not of_columns),
            gradient=gradient,
            masked=self.masked,
            guided=call.guide is not None,
            prefixes=len(call.dims),
            width=slice_width,
            aligned=all(side.values.stride(0) % 16 == 0 for side in self._sides(term)[::2]),
            variant=call.variant,
        )
        blocks = triton.cdiv(n_own, config["BLOCK_OWN"])
        slices = triton.cdiv(call.dims[-1], slice_width) if gradient else 1
        blocks_of_other = triton.cdiv(n_other, config["BLOCK_OTHER"])
        if weights:
            splits = blocks_of_other  # a tile a program, as in any matrix product
        else:
            wanted = triton.cdiv(BLOCKS_PER_MULTIPROCESSOR * call.target.multiprocessors, blocks * slices)
            splits = max(1, min(wanted, blocks_of_other, 32))
        length = triton.cdiv(blocks_of_other, splits) * config["BLOCK_OTHER"]
        return _Plan(config, triton.cdiv(n_other, length), length, blocks, slices)

    def _sweep(self, term: Term, rows: slice, of_columns: bool, plan: _Plan, outputs: dict[str, Tensor | None]) -> None:
        call, problem = self.call, self.call.problem
        operand, begin, columns = self._sides(term)
        here = slice(begin + rows.start, begin + rows.stop)
        sides = [
            (operand.values[here], None if operand.factors is None else operand.factors[:, here]),
            (columns.values[: term.columns], None if columns.factors is None else columns.factors[:, : term.columns]),
        ]
        guides: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * 2
        if call.guide is not None:
            mine = call.guide.queries if term.rows_are_queries else call.guide.documents
            theirs = call.guide.queries if term.columns_are_queries else call.guide.documents
            guides = [
                (mine.values[here], mine.factors[0, here]),
                (theirs.values[: term.columns], theirs.factors[0, : term.columns]),
            ]
        if of_columns:
            sides.reverse()
            guides.reverse()
        (own, own_factors), (other, other_factors) = sides
        (guide_own, guide_own_factors), (guide_other, guide_other_factors) = guides

        def stride(tensor: Tensor | None) -> int:
            return 0 if tensor is None else tensor.stride(0)

        def of(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector[..., rows]

        excluded = (term.positive,) if term.positive is not None else term.excluded
        negatives = term.hardness_exceptions
        ids, own_column = problem.column_ids(term), term.own_column + rows.start
        weighted = any(outputs.get(name) is not None for name in ("gradient", "weights"))
        shifted = weighted and "total" not in outputs
        launch(
            sweep,
            (plan.blocks * plan.splits, plan.slices),
            own,
            own.stride(0),
            other,
            other.stride(0),
            len(own),
            len(other),
            call.dims[-1],
            own_factors,
            stride(own_factors),
            other_factors,
            stride(other_factors),
            plan.length,
            call.scale,
            call.scale_tensor,
            term.hardness,
            excluded[0] + rows.start if excluded else 0,
            excluded[1] - excluded[0] if len(excluded) > 1 else 0,
            negatives[0] + rows.start if negatives else 0,
            negatives[1] - negatives[0] if len(negatives) > 1 else 0,
            None if ids is None else ids[own_column : own_column + rows.stop - rows.start],
            ids,
            own_column,
            guide_own,
            stride(guide_own),
            guide_other,
            stride(guide_other),
            call.guide.width if call.guide else 0,
            guide_own_factors,
            guide_other_factors,
            of(call.guide.threshold) if call.guide else None,
            of(self.logsumexp) if shifted else None,
            of(self.coefficient) if shifted else None,
            of(self.further_share) if shifted and term.positive is not None else None,
            self.n,
            *(outputs.get(name) for name in _OUTPUTS),
            config=plan.config,
            DIMS=call.dims,
            GUIDE_D=call.guide.width if call.guide else 0,
            OWN_COLUMNS=of_columns,
            EXCLUDED=len(excluded),
            NEGATIVES=len(negatives),
            MOST_ARE_HARD=term.hard_everywhere,
            FURTHER=term.duplicates == "positive",
            LIFT=self.products.lift,
            **self.products.constants(),
        )


_OUTPUTS = (
    "maximum", "total", "similarity_total", "further_count", "further_total", "gradient", "weights", "own_along",
    "other_along",
)  # fmt: skip


class _Plan:
    """How a sweep is divided: blocks of own, splits of ``length`` others, slices of the gradient's entries."""

    def __init__(self, config: Any, splits: int, length: int, blocks: int, slices: int) -> None:
        self.config, self.splits, self.length, self.blocks, self.slices = config, splits, length, blocks, slices
