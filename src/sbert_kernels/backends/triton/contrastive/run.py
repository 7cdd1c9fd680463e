"""Executes a plan of the contrastive operation: allocates, launches kernels, calls the vendor's matrix products.

Everything is decided in `plan`. The positive pair never goes through the matrix of weights: its entry is excluded
there, and its part of the loss and of the gradient is added row by row in fp32 (`softmax_statistics`, `norms`).

Norms are factors of the weights: embeddings are copied only for products in another type than theirs. All gradients are
of the dot products, times the norms' factors, until `norms_backward` takes their radial part away.

Nothing waits for the device, and no value is read back, so that a CUDA graph can hold the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....problems.contrastive import ContrastiveProblem, ContrastiveResult, weight_sum
from ..launching import cdiv, launch
from . import tiles
from .operands import Operand, add_product, finished_gradient, launch_norms_forward, stride
from .plan import ChunkPlan, Diagonals, OperandPlan, Plan, SoftmaxPlan, SweepPlan, TermPlan
from .softmax_statistics import softmax_statistics
from .sweep import sweep

# Outputs of the sweep; it computes those that are given.
_NO_OUTPUTS = dict.fromkeys(
    (
        "maximum", "total", "similarity_total", "duplicate_count", "duplicate_similarity_total", "gradient", "weights",
        "a_radial", "b_radial",
    )
)  # fmt: skip


def run(plan: Plan, problem: ContrastiveProblem) -> ContrastiveResult:
    """Returns loss and gradients of a problem, computed by its plan."""
    running = Run(plan, problem)
    for softmax_plan in plan.softmaxes:
        softmax = Softmax(running, softmax_plan)
        if softmax_plan.statistics:
            softmax.find_statistics(slice(0, plan.n), softmax_plan.statistics)
        memory = [running.weights_memory(entries) for entries in softmax_plan.weight_entries]
        for chunk in softmax_plan.chunks:
            softmax.add_gradients(chunk, memory)
    return running.result()


class Run:
    """Holds the tensors of one call: operands, positive pairs, losses."""

    def __init__(self, plan: Plan, problem: ContrastiveProblem) -> None:
        self.plan, self.problem = plan, problem
        queries = Operand((problem.queries,), plan.queries, plan.dims)
        documents = Operand(problem.documents, plan.documents, plan.dims)
        self.operands = {"queries": queries, "documents": documents}
        self.positives = {"positive": self.vector(len(plan.dims), plan.n)}  # (K, N): similarities of the positive pairs
        launch_norms_forward(
            documents, queries, plan.row_offset, plan.eps, self.positives["positive"], plan.zero_norm_gives_zero
        )
        if plan.all_queries is not None and problem.all_queries is not None:
            everyone = Operand((problem.all_queries,), plan.all_queries, plan.dims)
            positive = self.vector(len(plan.dims), everyone.rows)
            launch_norms_forward(documents, everyone, 0, plan.eps, positive, plan.zero_norm_gives_zero)
            self.operands["all_queries"] = everyone
            # The same similarities, whose gradient goes to the gathered queries.
            self.positives["gathered_positive"] = positive[:, plan.row_offset : plan.row_offset + plan.n]
        self.guides: dict[str, Operand] = {}
        self.guide_threshold: Tensor | None = None
        if plan.guide is not None and problem.guide_queries is not None:
            self._prepare_guide(problem.guide_queries, *plan.guide)
        scale = problem.scale.on_device
        self.scale_tensor = None if scale is None else scale.float()
        self.scale = 1.0 if problem.scale.value is None else problem.scale.value
        # Weights as parts of the largest, (N,), and the share of the largest in their sum, ().
        self.row_weights: Tensor | None = None
        self.share_of_largest: Tensor | None = None
        if problem.weights is not None:
            weights = problem.weights.detach().float()
            largest = weights.abs().amax()
            largest = torch.where(largest > 0, largest, 1.0)
            self.row_weights, self.share_of_largest = (weights / largest).contiguous(), largest / weight_sum(weights)
        self.losses = self.vector(plan.n)
        self.scale_gradient = self.vector(plan.n) if plan.needs.scale else None
        self.d_positives = {name: self.vector(len(plan.dims), plan.n) for name in plan.d_positives}

    def vector(self, *shape: int) -> Tensor:
        """Returns fp32 memory on the problem's device."""
        return torch.empty(shape, dtype=torch.float32, device=self.problem.device)

    def weights_memory(self, entries: int) -> Tensor:
        """Returns memory for so many weights."""
        return torch.empty(entries, dtype=self.plan.precision.dtype, device=self.problem.device)

    def _prepare_guide(self, queries: Tensor, queries_plan: OperandPlan, documents_plan: OperandPlan) -> None:
        dims = (self.plan.guide_width,)
        self.guides = {
            "queries": Operand((queries.float(),), queries_plan, dims),
            "documents": Operand(tuple(d.float() for d in self.problem.guide_documents), documents_plan, dims),
        }
        positive = self.vector(1, queries_plan.rows)
        launch_norms_forward(
            self.guides["documents"], self.guides["queries"], self.plan.row_offset, self.plan.eps, positive, False
        )
        self.guide_threshold = self.problem.guide_threshold(positive[0])

    # -- what the losses and gradients add up to -----------------------------------------------------------------------

    def result(self) -> ContrastiveResult:
        """Returns the loss and the gradients that are needed."""
        plan, weights = self.plan, self.problem.weights
        share = plan.largest_weight / len(plan.softmaxes)
        if self.row_weights is None or self.share_of_largest is None:
            loss = self.losses.mean() * share
        else:
            loss = (self.row_weights * self.share_of_largest * self.losses).sum() * share
        results: dict[str, Tensor | None] = {}
        if self.scale_gradient is not None:
            per_row = self.scale_gradient
            found = per_row.mean() if self.share_of_largest is None else per_row.sum() * self.share_of_largest
            results["scale"] = found * share
        if plan.needs.weights and weights is not None:
            results["weights"] = (self.losses * share - loss) / weight_sum(weights.detach().float())
        if plan.gradients:
            results |= self._gradients(share)
        return ContrastiveResult(loss, **results)

    def _gradients(self, share: float) -> dict[str, Tensor | None]:
        plan, operands = self.plan, self.operands
        tensors = [t for t in (self.share_of_largest, self.scale_tensor) if t is not None]
        common: dict[str, Any] = {
            "eps": plan.eps,
            "factor": share * self.scale * (1.0 if self.row_weights is not None else 1 / plan.n),
            "factor_tensor": torch.stack(tensors).prod() if len(tensors) > 1 else (tensors[0] if tensors else None),
            "width": plan.width,
        }
        if "gathered_positive" in self.d_positives:
            self._add_gathered_positives()
        pairs: dict[str, Any] = {"d_positive": self.d_positives.get("positive"), "positive": self.positives["positive"]}
        queries, documents = operands["queries"], operands["documents"]
        results: dict[str, Tensor | None] = {}
        if plan.needs.queries:
            results["queries"] = finished_gradient(queries, documents, partner_begin=plan.row_offset, **pairs, **common)
        if plan.needs.documents:
            results["documents"] = finished_gradient(documents, queries, offset=plan.row_offset, **pairs, **common)
        if plan.needs.all_queries and "all_queries" in operands:
            results["all_queries"] = finished_gradient(
                operands["all_queries"], None, d_positive=None, positive=None, **common
            )
        elif plan.needs.all_queries:
            results["all_queries"] = torch.zeros_like(self.problem.query_columns, dtype=torch.float32)
        return results

    def _add_gathered_positives(self) -> None:
        """Adds the gradient of the positive pairs whose query is a gathered one."""
        plan, documents, queries = self.plan, self.operands["documents"], self.operands["all_queries"]
        rows = slice(plan.row_offset, plan.row_offset + plan.n)
        for k, dim in enumerate(plan.dims):
            strength = self.d_positives["gathered_positive"][k]
            radial = strength * self.positives["gathered_positive"][k]
            if documents.inverse_norms is not None and queries.inverse_norms is not None:
                strength = strength * documents.inverse_norms[k, rows] * queries.inverse_norms[k, rows]
            for operand, partner in ((documents, queries), (queries, documents)):
                if operand.need:
                    operand.accumulator()[rows, :dim].addcmul_(strength[:, None], partner.values[rows, :dim].float())
                    if operand.radial is not None:
                        operand.radial[k, rows] += radial


class Softmax:
    """Computes the terms of one softmax: its statistics, then the gradients from them."""

    def __init__(self, running: Run, plan: SoftmaxPlan) -> None:
        self.running, self.plan, self.call = running, plan, running.plan
        shape = (len(self.call.dims), self.call.n)
        self.kept = {name: running.vector(*shape) for name in plan.kept}  # (K, N) each, see `softmax_statistics`

    def add_gradients(self, chunk: ChunkPlan, memory: list[Tensor]) -> None:
        """Writes the weights of the rows of a chunk, and adds the products with them to the operands' gradients.

        ``memory``: for the weights of each term; the chunks use it one after the other.
        """
        rows, n, prefixes = slice(chunk.begin, chunk.end), chunk.end - chunk.begin, len(self.call.dims)
        weights = [
            of_term[: prefixes * n * term.term.columns].view(prefixes, n, term.term.columns)
            for term, of_term in zip(self.plan.terms, memory, strict=True)
        ]
        if self.plan.unshifted:
            self.find_statistics(rows, chunk.sweeps, [{"weights": matrix} for matrix in weights])
        else:
            for term, sweep_plan, matrix in zip(self.plan.terms, chunk.sweeps, weights, strict=True):
                self._write_weights(term, rows, sweep_plan, matrix)
        for term, matrix, overwrites in zip(self.plan.terms, weights, chunk.overwrites, strict=True):
            self._add_products(term, rows, matrix, overwrites)

    def _add_products(self, term: TermPlan, rows: slice, weights: Tensor, overwrites: bool) -> None:
        """Adds the vendor's products with the weights (K, n, columns) of some rows."""
        operand, columns, m = self.running.operands[term.rows], self.running.operands[term.columns], term.term.columns
        here = slice(term.row_begin + rows.start, term.row_begin + rows.stop)
        dims, dtype, lift = self.call.dims, self.call.precision.dtype, self.call.precision.lift
        coefficient = self.kept["row_coefficient"][0, rows, None] if self.plan.unshifted else None
        if overwrites:
            columns.gradient = self.running.vector(columns.rows, dims[0])
        for k, (begin, end) in enumerate(zip((0, *dims), dims, strict=False)):
            part = slice(begin, end)
            if operand.need:  # [n, M] @ [M, d] -> [n, d]
                found = self.running.vector(rows.stop - rows.start, end - begin)
                add_product(found, weights[k], columns.values[:m, part].to(dtype), True, lift)
                if coefficient is not None:
                    found *= coefficient
                operand.accumulator()[here, part] += found
            if columns.need:  # [M, n] @ [n, d] -> [M, d]
                vectors = operand.values[here, part].to(dtype)
                if coefficient is not None:
                    vectors = (vectors * coefficient).to(dtype)
                add_product(columns.accumulator()[:m, part], weights[k].T, vectors, overwrites, lift)

    def _write_weights(self, term: TermPlan, rows: slice, plan: SweepPlan, weights: Tensor) -> None:
        """Writes the probabilities of these rows, times their coefficients: a matrix for each slice of the entries."""
        operand, columns = self.running.operands[term.rows], self.running.operands[term.columns]
        outputs = {"weights": weights}
        prefixes, n = weights.shape[:2]
        if self.plan.radial:
            outputs["a_radial"] = self.running.vector(plan.splits, prefixes, n)
            outputs["b_radial"] = self.running.vector(plan.blocks, prefixes, term.term.columns)
        self.sweep(term, rows, plan, outputs, after_statistics=True)
        if self.plan.radial:
            operand.add_radial(outputs["a_radial"], term.row_begin + rows.start)
            columns.add_radial(outputs["b_radial"], 0)

    def find_statistics(
        self, rows: slice, sweeps: tuple[SweepPlan, ...], outputs: list[dict[str, Tensor]] | None = None
    ) -> None:
        """Finds losses, logsumexps and what else is kept of these rows; ``outputs`` are written on the way, by term."""
        plan, n, prefixes = self.plan, rows.stop - rows.start, len(self.call.dims)
        splits = sum(sweep_plan.splits for sweep_plan in sweeps)
        names = {
            "maximum": plan.online,
            "total": True,
            "similarity_total": self.call.needs.scale,
            "duplicate_count": plan.duplicates_are_positive,
            "duplicate_similarity_total": plan.duplicates_are_positive,
        }
        # Terms whose duplicates are no positives count none.
        found = {
            name: torch.zeros((splits, prefixes, n), dtype=torch.float32, device=self.running.problem.device)
            if name.startswith("duplicate")
            else self.running.vector(splits, prefixes, n)
            for name, wanted in names.items()
            if wanted
        }
        begin = 0
        for index, (term, sweep_plan) in enumerate(zip(plan.terms, sweeps, strict=True)):
            here = slice(begin, begin + sweep_plan.splits)
            begin += sweep_plan.splits
            of_term = {
                name: vector[here]
                for name, vector in found.items()
                if not name.startswith("duplicate") or term.term.duplicates == "positive"
            }
            self.sweep(term, rows, sweep_plan, of_term | (outputs[index] if outputs else {}))
        self._launch_statistics(rows, {name: found.get(name) for name in names}, splits)

    def _launch_statistics(self, rows: slice, found: dict[str, Tensor | None], splits: int) -> None:
        plan, running, n = self.plan, self.running, rows.stop - rows.start

        def of(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector[..., rows]

        positive, second = (*(running.positives[name] for name in plan.positives), None)[:2]
        d_positive, d_second = (None if name is None else running.d_positives[name] for name in plan.d_positives)
        launch(
            softmax_statistics,
            (cdiv(n, tiles.SOFTMAX_STATISTICS["BLOCK_N"]),),
            config=tiles.SOFTMAX_STATISTICS,
            **found,
            positive=of(positive),
            positive_stride=stride(positive),
            second_positive=of(second),
            second_positive_stride=stride(second),
            row_weight=of(running.row_weights),
            scale=running.scale,
            scale_tensor=running.scale_tensor,
            n=n,
            splits=splits,
            losses=of(running.losses),
            logsumexp=of(self.kept.get("logsumexp")),
            coefficient=of(self.kept.get("coefficient")),
            row_coefficient=of(self.kept.get("row_coefficient")),
            positive_share=of(self.kept.get("positive_share")),
            d_positive=of(d_positive),
            d_second_positive=of(d_second),
            scale_gradient=of(running.scale_gradient),
            rows_stride=self.call.n,
            WEIGHTS=self.call.prefix_weights,
            ADD=plan.add,
            ADD_D_POSITIVE=plan.add_d_positive,
        )

    def sweep(
        self,
        term: TermPlan,
        rows: slice,
        plan: SweepPlan,
        outputs: dict[str, Tensor],
        *,
        after_statistics: bool = False,
        a_is_columns: bool = False,
    ) -> None:
        """Launches a sweep of some rows of a term and all of its columns.

        ``after_statistics``: it uses the logsumexps. ``a_is_columns``: the columns are side A of the kernel.
        """
        running, rule = self.running, term.term
        here, m = slice(term.row_begin + rows.start, term.row_begin + rows.stop), rule.columns
        sides = (_side(running.operands[term.rows], here), _side(running.operands[term.columns], slice(0, m)))
        guides: tuple[_Side, _Side] = ((None, None), (None, None))
        if rule.guided:
            row_guide = running.guides["queries" if rule.rows_are_queries else "documents"]
            column_guide = running.guides["queries" if rule.columns_are_queries else "documents"]
            guides = (_side(row_guide, here), _side(column_guide, slice(0, m)))
        if a_is_columns:
            sides, guides = sides[::-1], guides[::-1]
        (a, a_inverse_norms), (b, b_inverse_norms) = sides
        (guide_a, guide_a_inverse_norms), (guide_b, guide_b_inverse_norms) = guides
        ids, own_column = running.problem.column_ids(rule), rule.own_column + rows.start
        kept = self.kept if after_statistics else {}

        def of(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector[..., rows]

        launch(
            sweep,
            plan.grid,
            config=plan.config,
            a=a,
            a_stride=stride(a),
            b=b,
            b_stride=stride(b),
            n_a=len(a),
            n_b=len(b),
            width=self.call.dims[-1],
            a_inverse_norms=a_inverse_norms,
            a_inverse_norms_stride=stride(a_inverse_norms),
            b_inverse_norms=b_inverse_norms,
            b_inverse_norms_stride=stride(b_inverse_norms),
            b_per_split=plan.b_per_split,
            scale=running.scale,
            scale_tensor=running.scale_tensor,
            hardness=rule.hardness,
            excluded_column=_from(term.excluded, rows.start),
            excluded_stride=term.excluded.stride,
            exceptions_column=_from(term.hardness_exceptions, rows.start),
            exceptions_stride=term.hardness_exceptions.stride,
            row_ids=None if ids is None else ids[own_column : own_column + rows.stop - rows.start],
            column_ids=ids,
            own_column=own_column,
            guide_a=guide_a,
            guide_a_stride=stride(guide_a),
            guide_b=guide_b,
            guide_b_stride=stride(guide_b),
            guide_width=self.call.guide_width,
            guide_a_inverse_norms=guide_a_inverse_norms,
            guide_b_inverse_norms=guide_b_inverse_norms,
            guide_threshold=of(running.guide_threshold),
            shift=of(kept.get("logsumexp")),
            coefficient=of(kept.get("coefficient")),
            positive_share=of(kept.get("positive_share")) if rule.positive is not None else None,
            rows_stride=self.call.n,
            **(_NO_OUTPUTS | outputs),
            DIMS=self.call.dims,
            GUIDE_D=self.call.guide_width,
            A_IS_COLUMNS=a_is_columns,
            EXCLUDED=term.excluded.count,
            EXCEPTIONS=term.hardness_exceptions.count,
            HARD_EVERYWHERE=rule.hard_everywhere,
            DUPLICATES_ARE_POSITIVE=rule.duplicates == "positive",
            LIFT=self.call.precision.lift,
            **self.call.precision.constants(),
        )


_Side = tuple[Tensor | None, Tensor | None]  # vectors (n, D), inverse norms (K, n)


def _side(operand: Operand, part: slice) -> tuple[Tensor, Tensor | None]:
    return operand.values[part], None if operand.inverse_norms is None else operand.inverse_norms[:, part]


def _from(diagonals: Diagonals, row: int) -> int:
    """Returns the column of the first diagonal in a row; 0 if there are none."""
    return diagonals.first + row if diagonals.count else 0
