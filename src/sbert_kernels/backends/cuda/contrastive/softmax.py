"""Computes the terms of one softmax for a chunk of rows, with sums and weights by the library's operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.contrastive.arguments import Guide, Known, Rule, Side, Sums
from ...triton.contrastive.call import Call
from ...triton.contrastive.plan import ChunkPlan, SweepPlan
from ...triton.contrastive.softmax import ChunkProgram, Memory, TermProgram


class OperatorPass:
    """Starts the operator for a term and a chunk of rows, in the place of Triton's sweep.

    What it writes decides which of its policies it takes: see `planner`.
    """

    def __init__(self, term: CudaTerm) -> None:
        self.start = torch.ops.sbert_kernels_cuda.contrastive_weights.default
        of, plan = term.term, term.plan
        self.width = plan.dims[-1] if plan.dims[-1] < plan.width else None  # of a shorter prefix
        self.excluded = [term.excluded, of.excluded.stride, of.excluded.count]
        self.exceptions = [term.exceptions, of.hardness_exceptions.stride, of.hardness_exceptions.count]
        self.hard_everywhere = of.term.hard_everywhere

    def __call__(
        self,
        *,
        rows: Side,
        columns: Side,
        rule: Rule,
        guide: Guide,
        known: Known,
        sums: Sums,
        weights: Tensor | None,
        row_coefficient: Tensor | None = None,
        column_coefficient: Tensor | None = None,
        column_sums: Tensor | None = None,
    ) -> None:
        """Writes sums and weights, whichever are given.

        Args:
            rows: See `triton.contrastive.arguments`, as for the next five.
            columns: See ``rows``.
            rule: See ``rows``.
            guide: There is none.
            known: Only the shift is read.
            sums: (tiles of columns, 1, n) of each row's exponentials, if there are any.
            weights: (1, n, columns).
            row_coefficient: (n,), what the weights are multiplied by once their sums are known.
            column_coefficient: (columns,), the same for the softmax over the columns.
            column_sums: (tiles of rows, the first so many columns), of each column's exponentials.
        """
        scale, ratio = rule.scale, 1.0
        if rule.hardness:  # it is in the scale of most entries; the exceptions' logits are others by a ratio
            hard = scale + rule.hardness
            scale, ratio = (hard, scale / hard) if self.hard_everywhere else (scale, hard / scale)
        vectors, column_vectors = rows.vectors, columns.vectors
        if self.width is not None:
            vectors, column_vectors = vectors[:, : self.width], column_vectors[:, : self.width]
        self.start(
            vectors,
            column_vectors,
            rows.inverse_norms[0],
            columns.inverse_norms[0],
            scale,
            known.shift,
            self.excluded,
            self.exceptions,
            ratio,
            rule.row_ids,
            rule.column_ids,
            rule.own_column,
            row_coefficient,
            column_coefficient,
            None if weights is None else weights[0],
            None if sums.total is None else sums.total[:, 0],
            column_sums,
        )


class CudaTerm(TermProgram):
    """Knows the launches and products of one term for a chunk of rows."""

    def make_pass(self, chunk: ChunkPlan, part: SweepPlan, writes: bool) -> OperatorPass:
        """Returns what starts a pass over the columns."""
        return OperatorPass(self)

    def write_coefficients(self, call: Call, memory: Memory, to: Tensor) -> None:
        """Writes what turns the exponentials of each row, relative to the constant, into weights: (n,)."""
        self.scale_rows(
            rows=call.side(self.term.rows, self.rows_begin, self.rows_end),
            maximum=None,
            shift=call.shift,
            logsumexp=memory["logsumexp"],
            coefficient=memory.get("coefficient"),
            row_coefficient=to,
            scaled=None,
        )


class CudaChunk(ChunkProgram):
    """Knows the launches and products of one softmax for a chunk of rows."""

    Term = CudaTerm

    def write_weights(self, call: Call, memory: Memory) -> None:
        """Starts the second pass of each term, which writes the weights, as the sums of their rows are known."""
        coefficient = memory["row_coefficient"]
        for term in self.terms:
            assert isinstance(term, CudaTerm)  # a chunk makes no others
            if term.index == 0:  # all terms share a row's sum
                term.write_coefficients(call, memory, coefficient)
            weights = memory[term.weights]
            term.run_pass(
                term.second, call, memory, known=call.shift_alone, weights=weights, row_coefficient=coefficient
            )
