"""One call of the contrastive operation: its operands, its softmaxes one after the other, and what they add up to."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problems.contrastive import ContrastiveProblem, ContrastiveResult, Needs, weight_sum
from .launching import target_of
from .operands import Operand, Products, finish, prepare
from .terms import Softmax
from .traits import products_of


class Call:
    """Operands, statistics and launches of one call."""

    def __init__(self, problem: ContrastiveProblem, needs: Needs, strategy: str, variant: int) -> None:
        self.problem, self.needs, self.strategy, self.variant = problem, needs, strategy, variant
        self.target = target_of(problem.device)
        self.products = products_of(problem, self.target)
        self.gradients = any(needs[:3])
        self.n, self.offset, self.dims = len(problem.queries), problem.row_offset, problem.dims
        self.terms = problem.terms()
        cosine = problem.cosine

        def operand(parts: tuple[Tensor, ...], need: bool) -> Operand:
            return Operand(parts, need, cosine, self.products, self.dims)

        self.queries = operand((problem.queries,), needs.queries)
        self.documents = operand(problem.documents, needs.documents)
        self.all_queries = self.queries
        self.gathered = problem.all_queries is not None and any(term.columns_are_queries for term in self.terms)
        absent_is_zero = problem.queries.dtype == torch.float16  # which cannot hold a gradient over eps
        self.own = self.vector(self.documents, len(self.dims), self.n)  # (K, N): similarity of the own pair
        prepare(self.documents, self.queries, self.offset, problem.eps, self.own, absent_is_zero)
        self.own_gathered: Tensor | None = None  # the same of the gathered query, whose gradient goes elsewhere
        if self.gathered:
            self.all_queries = operand((problem.all_queries,), needs.all_queries)
            everyone = self.vector(self.documents, len(self.dims), self.all_queries.rows)
            prepare(self.documents, self.all_queries, 0, problem.eps, everyone, absent_is_zero)
            self.own_gathered = everyone[:, self.offset : self.offset + self.n]
        self.guide = Guide(problem) if problem.guided else None
        on_device = problem.scale.on_device
        self.scale_tensor = None if on_device is None else on_device.float()
        self.scale = 1.0 if on_device is not None else problem.scale.read()
        self.peak = max(map(abs, problem.dim_weights)) or 1.0
        self.prefix_weights = tuple(weight / self.peak for weight in problem.dim_weights)
        self.row_weights, self.share_of_peak = self._row_weights()

    def vector(self, like: Operand, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=like.values.device)

    def _row_weights(self) -> tuple[Tensor | None, Tensor | None]:
        """Weights as parts of the largest, (N,), and the share of the largest in their sum, ()."""
        weights = self.problem.weights
        if weights is None:
            return None, None
        weights = weights.detach().float()
        largest = weights.abs().amax()
        largest = torch.where(largest > 0, largest, 1.0)
        return (weights / largest).contiguous(), largest / weight_sum(weights)

    def run(self) -> ContrastiveResult:
        problem, needs, groups = self.problem, self.needs, self.problem.softmaxes()
        self.losses = self.vector(self.documents, self.n)
        self.scale_gradient = self.vector(self.documents, self.n) if needs.scale else None
        self.pull = self.vector(self.documents, len(self.dims), self.n) if self.gradients else None
        self.pull_gathered: Tensor | None = None
        for index, group in enumerate(groups):
            Softmax(self, group, add=index > 0).run()

        share = self.peak / len(groups)
        if self.row_weights is None:
            loss, scale_gradient = self.losses.mean() * share, None
            if needs.scale:
                scale_gradient = self.scale_gradient.mean() * share
        else:
            share_of_rows = self.row_weights * self.share_of_peak
            loss = (share_of_rows * self.losses).sum() * share
            if needs.scale:
                scale_gradient = self.scale_gradient.sum() * self.share_of_peak * share
        results: dict[str, Tensor | None] = {}
        if needs.scale:
            results["scale"] = scale_gradient
        if needs.weights:
            results["weights"] = (self.losses * share - loss) / weight_sum(problem.weights.detach().float())
        if self.gradients:
            results |= self._finished(share)
        return ContrastiveResult(loss, **results)

    def _finished(self, share: float) -> dict[str, Tensor | None]:
        problem, needs, width = self.problem, self.needs, self.problem.queries.shape[1]
        factor = share * self.scale * (1.0 if self.row_weights is not None else 1 / self.n)
        tensors = [t for t in (self.share_of_peak, self.scale_tensor) if t is not None]
        factor_tensor = torch.stack(tensors).prod() if len(tensors) > 1 else (tensors[0] if tensors else None)
        if self.pull_gathered is not None:
            self._pull_gathered()
        common = (self.pull, self.own, problem.eps, factor, factor_tensor, width)
        results: dict[str, Tensor | None] = {}
        if needs.queries:
            results["queries"] = finish(self.queries, self.documents, self.offset, 0, *common)
        if needs.documents:
            results["documents"] = finish(self.documents, self.queries, 0, self.offset, *common)
        if needs.all_queries:
            results["all_queries"] = (
                finish(self.all_queries, None, 0, 0, None, None, *common[2:])
                if self.gathered
                else torch.zeros(problem.all_queries.shape, dtype=torch.float32, device=problem.device)
            )
        return results

    def _pull_gathered(self) -> None:
        """The gradient of the own pairs whose query is a gathered one."""
        own = slice(self.offset, self.offset + self.n)
        for k, dim in enumerate(self.dims):
            strength = self.pull_gathered[k]
            if self.documents.factors is not None:
                along = strength * self.own_gathered[k]
                strength = strength * self.documents.factors[k, own] * self.all_queries.factors[k, own]
            for mine, other in ((self.documents, self.all_queries), (self.all_queries, self.documents)):
                if mine.need:
                    mine.accumulator()[own, :dim].addcmul_(strength[:, None], other.values[own, :dim].float())
                    if mine.along is not None:
                        mine.along[k, own] += along


class Guide:
    """Unit-length similarities of another model decide what is excluded."""

    def __init__(self, problem: ContrastiveProblem) -> None:
        width = problem.guide_queries.shape[1]
        fp32 = Products("float32", torch.float32, fma=True)
        self.queries, self.documents = (
            Operand(tuple(part.float() for part in parts), False, True, fp32, (width,))
            for parts in ((problem.guide_queries,), problem.guide_documents)
        )
        own = torch.empty(1, self.queries.rows, dtype=torch.float32, device=problem.device)
        prepare(self.documents, self.queries, problem.row_offset, problem.eps, own, absent_is_zero=False)
        self.threshold = problem.guide_threshold(own[0])
        self.width = width
