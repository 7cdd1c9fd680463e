"""The strategy `tiled`, whose similarities never leave the chip.

A sweep of the rows sums up their statistics and gradients, one of the columns computes the similarities again for
theirs. No memory beyond operands, gradients and statistics. Of a `Plan` it uses what both strategies have in common.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ....problems.contrastive import ContrastiveProblem, ContrastiveResult, Needs
from ..launching import cdiv
from ..targets import Target
from .operands import Operand
from .plan import (
    Plan,
    SoftmaxPlan,
    SweepPlan,
    TermPlan,
    has_high_register_pressure,
    is_aligned,
    is_masked,
    make_plan,
    sweep_plan,
)
from .run import Run, Softmax
from .tiles import slice_width, sweep_config


def tiled(problem: ContrastiveProblem, needs: Needs, target: Target, variant: int) -> ContrastiveResult:
    """Returns loss and gradients of a problem."""
    # Weights of one prefix are not those of another: without their matrix each prefix is a call of its own.
    parts = []
    for dim, weight in zip(problem.dims, problem.dim_weights, strict=True):
        part = replace(problem, spec=replace(problem.spec, dims=(dim,), dim_weights=(weight,)))
        parts.append(_of_one_prefix(part, needs, target, variant))
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return ContrastiveResult._make(None if found[0] is None else sum(found[1:], found[0]) for found in columns)


def _of_one_prefix(problem: ContrastiveProblem, needs: Needs, target: Target, variant: int) -> ContrastiveResult:
    plan = make_plan(problem, needs, target, variant)
    running = Run(plan, problem)
    for softmax_plan in plan.softmaxes:
        _Tiled(running, softmax_plan, variant).run()
    return running.result()


class _Tiled:
    """Computes one softmax."""

    def __init__(self, running: Run, plan: SoftmaxPlan, variant: int) -> None:
        self.running, self.plan, self.variant = running, plan, variant
        self.call: Plan = running.plan
        self.softmax = Softmax(running, plan)
        self.dim = self.call.dims[-1]
        pressure = has_high_register_pressure(running.problem.terms(), self.call.precision)
        self.slice_width = slice_width(self.dim, self.call.precision.fma, pressure)
        # The rows' gradients are found together with their statistics.
        self.in_one_sweep = plan.unshifted and self.slice_width >= self.dim

    def run(self) -> None:
        """Finds the statistics and adds the gradients of rows and columns."""
        everything, operands = slice(0, self.call.n), self.running.operands
        sweeps = tuple(self._sweep_plan(t, self.call.n, False, self.in_one_sweep) for t in self.plan.terms)
        found: list[Tensor | None] = [None] * len(sweeps)
        if self.in_one_sweep:
            found = [
                self._partial_gradients(plan, self.call.n) if operands[term.rows].need else None
                for term, plan in zip(self.plan.terms, sweeps, strict=True)
            ]
        outputs: list[dict[str, Tensor]] = [{} if part is None else {"gradient": part} for part in found]
        self.softmax.find_statistics(everything, sweeps, outputs)
        for term, part in zip(self.plan.terms, found, strict=True):
            rows, columns = operands[term.rows], operands[term.columns]
            if rows.need and part is not None:
                coefficient = self.softmax.kept["row_coefficient"][0]
                _add(rows, _summed(part), term.row_begin, coefficient)
            elif rows.need:
                _add(rows, self._gradient(term, of_columns=False), term.row_begin)
            if columns.need:
                _add(columns, self._gradient(term, of_columns=True), 0)

    def _gradient(self, term: TermPlan, of_columns: bool) -> Tensor:
        """Returns the gradient of a term's rows or columns, from the known logsumexp: (n, D)."""
        n = term.term.columns if of_columns else self.call.n
        plan = self._sweep_plan(term, n, of_columns, True)
        outputs = {"gradient": self._partial_gradients(plan, n)}
        self.softmax.sweep(term, slice(0, self.call.n), plan, outputs, after_statistics=True, a_is_columns=of_columns)
        return _summed(outputs["gradient"])

    def _partial_gradients(self, plan: SweepPlan, n: int) -> Tensor:
        return self.running.vector(plan.splits, n, self.dim)

    def _sweep_plan(self, term: TermPlan, n_a: int, of_columns: bool, gradient: bool) -> SweepPlan:
        problem, call = self.running.problem, self.call
        operands = {"queries": call.queries, "documents": call.documents, "all_queries": call.all_queries}
        sides = [operand for name in (term.rows, term.columns) if (operand := operands[name]) is not None]
        width = self.slice_width if gradient else 16
        config = sweep_config(
            call.target,
            call.precision,
            statistics=not gradient or (self.in_one_sweep and not of_columns),
            gradient=gradient,
            masked=is_masked(problem.terms()),
            guided=problem.guided,
            prefixes=1,
            width=width,
            aligned=is_aligned(*sides),
            variant=self.variant,
        )
        n_b = call.n if of_columns else term.term.columns
        return sweep_plan(call.target, config, n_a, n_b, slices=cdiv(self.dim, width) if gradient else 1)


def _summed(partial_gradients: Tensor) -> Tensor:
    return partial_gradients[0] if len(partial_gradients) == 1 else partial_gradients.sum(0)


def _add(operand: Operand, part: Tensor, begin: int, coefficient: Tensor | None = None) -> None:
    """Adds a gradient of the rows from ``begin`` on, (n, d), to be multiplied by a coefficient of each row."""
    if operand.gradient is None and len(part) == operand.rows:
        operand.gradient, operand.row_coefficient = part, coefficient
        return
    gradient = operand.accumulator()[begin : begin + len(part)]
    if coefficient is None:
        gradient += part
    else:
        gradient.addcmul_(part, coefficient[:, None])
