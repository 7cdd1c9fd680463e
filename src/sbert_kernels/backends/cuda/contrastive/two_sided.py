"""Computes both directions of a symmetric loss from one matrix of weights.

With s the similarities of the N queries (rows) and M documents (columns), of which the first N are the positives, and

    e_mn = exp(scale s_mn - shift)
    R_m = 1 / (the sum of row m)                # query_to_doc: over all documents
    C_n = 1 / (the sum of column n)             # doc_to_query: over all queries; 0 beyond column N

each times its row's weight, both directions' weights are e_mn (R_m + C_n), so that one matrix of them is multiplied for
the gradients of both. C is known once all rows have been seen, so they are seen twice: 4 matrix products in all.

The sums are partial ones, of tiles, and are added up in their order: no atomics, the same bits each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.contrastive.arguments import NO_SUMS
from ...triton.contrastive.call import Call
from ...triton.contrastive.rows import prepared_scale_rows
from ...triton.contrastive.statistics import Statistics
from .planner import TwoSidedPlan
from .softmax import CudaTerm


class TwoSided:
    """Knows the launches and products of a symmetric loss; made once a plan, and holds no tensor."""

    def __init__(self, plan: TwoSidedPlan) -> None:
        self.n = plan.n
        forward, back = plan.softmaxes
        self.sums = []
        for chunk in plan.sums:
            statistics = Statistics(plan, forward, chunk.begin, chunk.end, chunk.sweeps[0].splits)
            self.sums.append((chunk, CudaTerm(plan, forward, chunk, 0, 0), statistics))
        splits = len(plan.sums) if len(plan.sums) > 1 else plan.sums[0].sweeps[0].blocks
        self.column_statistics = Statistics(plan, back, 0, plan.n, splits)
        self.scale_columns = prepared_scale_rows(plan, plan.n)
        self.weights = [(chunk, CudaTerm(plan, forward, chunk, 0, 0)) for chunk in forward.chunks]

    def run(self, call: Call) -> None:
        """Computes losses, and the gradients that the weights give."""
        self._find_column_coefficients(call, self._find_row_coefficients(call))
        for chunk, term in self.weights:
            memory = call.workspace.tensors(chunk.buffers)
            term.run_pass(
                term.second,
                call,
                memory,
                known=call.shift_alone,
                weights=memory[term.weights],
                row_coefficient=call.memory["row_coefficient"][chunk.begin : chunk.end],
                column_coefficient=call.memory["column_coefficient"],
            )
            term.add_products(call, memory)

    def _find_row_coefficients(self, call: Call) -> Tensor:
        """Computes what the sums over rows give; returns the sums over columns, in parts, (splits, N)."""
        totals = call.memory.get("column_totals")  # of each chunk, if there are several
        total: Tensor | None = None
        for index, (chunk, term, statistics) in enumerate(self.sums):
            memory = call.workspace.tensors(chunk.buffers)
            sums, total = NO_SUMS._replace(total=memory["total"]), memory["column_total"]
            term.run_pass(term.first, call, memory, known=call.shift_alone, sums=sums, column_sums=total)
            statistics(call, memory, sums)
            term.write_coefficients(call, memory, call.memory["row_coefficient"][chunk.begin : chunk.end])
            if totals is not None:
                torch.sum(total, 0, out=totals[index])
        assert total is not None  # a plan has a chunk at least
        return total if totals is None else totals

    def _find_column_coefficients(self, call: Call, totals: Tensor) -> None:
        """Computes the same of the softmax over columns, whose sums came in parts."""
        memory = {"logsumexp": call.memory["column_logsumexp"]}
        if "column_weights" in call.memory:
            memory["coefficient"] = call.memory["column_weights"]
        self.column_statistics(call, memory, NO_SUMS._replace(total=totals))
        coefficient = call.memory["column_coefficient"]
        self.scale_columns(
            rows=call.side("documents", 0, self.n),
            maximum=None,
            shift=call.shift,
            logsumexp=memory["logsumexp"],
            coefficient=memory.get("coefficient"),
            row_coefficient=coefficient[: self.n],
            scaled=None,
        )
        if len(coefficient) > self.n:  # no query has a hard negative for its positive
            coefficient[self.n :].zero_()
