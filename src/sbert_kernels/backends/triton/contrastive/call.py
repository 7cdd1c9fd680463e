"""What a call does once, before and after the chunks of rows: vectors, norms, positive pairs; loss and gradients.

The positive pair never goes through the matrix of weights: its entry is excluded
there, and its part of the loss and of the gradient is added row by row in fp32 (`softmax_statistics`, `norms`).

Norms are factors of weights and rows: embeddings are copied only for products in another type than theirs. All
gradients are of the dot products, times the norms' factors, until `norms_backward` takes their radial part away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....problems.contrastive import ContrastiveProblem, ContrastiveResult, weight_sum
from .arguments import Known, Side
from .memory import Workspace
from .operands import Finish, Norms, Operand
from .plan import OperandPlan, Plan


class CallProgram:
    """Knows the launches of a call before and after its chunks; made once a plan, and holds no tensor."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.norms = Norms(plan, plan.documents, plan.queries, plan.row_offset, plan.dims, plan.zero_norm_gives_zero)
        if plan.all_queries is not None:
            self.gathered_norms = Norms(plan, plan.documents, plan.all_queries, 0, plan.dims, plan.zero_norm_gives_zero)
        if plan.guide is not None:
            queries, documents = plan.guide
            self.guide_norms = Norms(plan, documents, queries, plan.row_offset, (plan.guide_width,), False)
        pairs = {"queries": ("documents", plan.row_offset, 0), "documents": ("queries", 0, plan.row_offset)}
        self.finish = {
            name: Finish(plan, operand, *pairs.get(name, (None, 0, 0)))
            for name, operand in plan.operands.items()
            if operand.need
        }


class Call:
    """Holds the tensors of one call: operands, positive pairs, losses."""

    def __init__(self, program: CallProgram, problem: ContrastiveProblem) -> None:
        plan = program.plan
        self.program, self.plan, self.problem = program, plan, problem
        self.workspace = Workspace(plan.workspace_bytes, problem.device)
        memory = self.memory = self.workspace.tensors(plan.buffers)
        self.losses = memory["losses"]
        self.scale_gradient = memory.get("scale_gradient")
        self.d_positives = {name: memory[name] for name in plan.d_positives}  # (K, N) each
        self.positives = {"positive": memory["positive"]}  # (K, N): similarities of the positive pairs
        parts: dict[str, tuple[Tensor, ...]] = {"queries": (problem.queries,), "documents": problem.documents}
        if plan.all_queries is not None and problem.all_queries is not None:
            parts["all_queries"] = (problem.all_queries,)
        self.operands = {
            name: Operand(of, plan.operands[name], plan.dims, memory.get(f"norms.{name}")) for name, of in parts.items()
        }
        for name in plan.rows_alone:
            self.operands[name].row_coefficient = memory[f"row_coefficient.{name}"]
        queries, documents = self.operands["queries"], self.operands["documents"]
        program.norms(documents, queries, self.positives["positive"])
        if "all_queries" in self.operands:
            everyone, positive = self.operands["all_queries"], memory["gathered_positive"]
            program.gathered_norms(documents, everyone, positive)
            # The same similarities, whose gradient goes to the gathered queries.
            self.positives["gathered_positive"] = positive[:, plan.row_offset : plan.row_offset + plan.n]
        self.guides: dict[str, Operand] = {}
        self.guide_threshold: Tensor | None = None
        if plan.guide is not None and problem.guide_queries is not None:
            self._prepare_guide(problem.guide_queries, plan.guide, memory)
        scale = problem.scale.factor(torch.float32, problem.device)
        self.scale_tensor = scale if isinstance(scale, Tensor) else None
        self.scale = 1.0 if isinstance(scale, Tensor) else scale
        self.shift = problem.shift if problem.bounded else 0.0
        self.shift_alone = Known(self.shift, None, None, None, 0)
        # Weights as parts of the largest, (N,), and the share of the largest in their sum, ().
        self.row_weights: Tensor | None = None
        self.share_of_largest: Tensor | None = None
        if problem.weights is not None:
            weights = problem.weights.detach().float()
            largest = weights.abs().amax()
            largest = torch.where(largest > 0, largest, 1.0)
            self.row_weights, self.share_of_largest = (weights / largest).contiguous(), largest / weight_sum(weights)
        self._sides: dict[tuple[str, int, int], Side] = {}

    def side(self, name: str, begin: int, end: int) -> Side:
        """Returns some vectors of an operand as the kernels take them."""
        key = (name, begin, end)
        found = self._sides.get(key)
        if found is None:
            found = self._sides[key] = self.operands[name].side(begin, end)
        return found

    def _prepare_guide(
        self, queries: Tensor, plans: tuple[OperandPlan, OperandPlan], memory: dict[str, Tensor]
    ) -> None:
        dims = (self.plan.guide_width,)
        parts = (queries.float(),), tuple(d.float() for d in self.problem.guide_documents)
        self.guides = {
            name: Operand(of, plan, dims, memory[f"guide.norms.{name}"])
            for name, of, plan in zip(("queries", "documents"), parts, plans, strict=True)
        }
        positive = memory["guide.positive"]
        self.program.guide_norms(self.guides["documents"], self.guides["queries"], positive)
        self.guide_threshold = self.problem.guide_threshold(positive[0])

    # -- what the losses and gradients add up to -----------------------------------------------------------------------

    def result(self) -> ContrastiveResult:
        """Returns the loss and the gradients that are needed."""
        plan, weights = self.plan, self.problem.weights
        share = plan.largest_weight / len(plan.softmaxes)
        loss = self._mean(self.losses, share)
        results: dict[str, Tensor | None] = {}
        if self.scale_gradient is not None:
            # Its rows have their weights already, as parts of the largest.
            found = self.scale_gradient.mean()
            if self.share_of_largest is not None:
                found = self.scale_gradient.sum() * self.share_of_largest
            results["scale"] = found * share
        if plan.needs.weights and weights is not None:
            results["weights"] = (self.losses * share - loss) / weight_sum(weights.detach().float())
        if plan.gradients:
            results |= self._gradients(share)
        return ContrastiveResult(loss, **results)

    def _mean(self, losses: Tensor, share: float) -> Tensor:
        if self.row_weights is not None and self.share_of_largest is not None:
            return (self.row_weights * self.share_of_largest * losses).sum() * share
        return losses.mean() if share == 1.0 else losses.mean() * share

    def _gradients(self, share: float) -> dict[str, Tensor | None]:
        plan, finish = self.plan, self.program.finish
        tensors = [t for t in (self.share_of_largest, self.scale_tensor) if t is not None]
        factor = share * self.scale * (1.0 if self.row_weights is not None else 1 / plan.n)
        factor_tensor = torch.stack(tensors).prod() if len(tensors) > 1 else (tensors[0] if tensors else None)
        if "d_gathered_positive" in self.d_positives:
            self._add_gathered_positives()
        d_positive, positive = self.d_positives.get("d_positive"), self.positives["positive"]
        results: dict[str, Tensor | None] = {
            name: finish[name](self.operands, name, d_positive, positive, factor, factor_tensor) for name in finish
        }
        if plan.needs.all_queries and "all_queries" not in results:
            results["all_queries"] = torch.zeros_like(self.problem.query_columns, dtype=torch.float32)
        return results

    def _add_gathered_positives(self) -> None:
        """Adds the gradient of the positive pairs whose query is a gathered one."""
        plan, documents, queries = self.plan, self.operands["documents"], self.operands["all_queries"]
        rows = slice(plan.row_offset, plan.row_offset + plan.n)
        for k, dim in enumerate(plan.dims):
            strength = self.d_positives["d_gathered_positive"][k]
            radial = strength * self.positives["gathered_positive"][k]
            strength = strength * 2.0**plan.gradient_lift  # as the gradients that it is added to
            if documents.inverse_norms is not None and queries.inverse_norms is not None:
                strength = strength * documents.inverse_norms[k, rows] * queries.inverse_norms[k, rows]
            for operand, partner in ((documents, queries), (queries, documents)):
                if operand.need:
                    operand.summed()[rows, :dim].addcmul_(strength[:, None], partner.vectors[rows, :dim].float())
                    if operand.radial is not None:
                        operand.radial[k, rows] += radial
