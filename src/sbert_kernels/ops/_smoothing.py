"""Label smoothing of the contrastive loss, which is linear in the logits and so needs no matrix of them.

With K candidates in a row's softmax, the target puts 1 - a on the positives and a / K on each candidate, so that

    loss = logsumexp(z) - (1 - a) mean of the positives' z - a mean of the candidates' z
         = plain loss + a (mean of the positives' z - mean of the candidates' z)

The sum of a row's similarities is its product with the sum of the columns, the few excluded or hard entries lie on
diagonals, and duplicates are summed up by their ids. So the second part takes O((N + M) D) time and memory in torch
operations, beside every backend and on every device. Its gradients, up to one factor, come with it, as the plain ones.
A column that is not finite makes the loss not a number, even where it is excluded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import Backend
from ..problems.contrastive import ContrastiveProblem, ContrastiveResult, Needs, Term, weight_sum


def compute_with_smoothing(backend: Backend, problem: ContrastiveProblem, needs: Needs) -> ContrastiveResult:
    """Returns loss and gradients of the contrastive operation: the backend's, and what smoothing adds to them."""
    plain = backend.operations.contrastive.contrastive(problem, needs)
    if problem.spec.label_smoothing == 0 or backend.by_definition:
        return plain
    smoothing = _Smoothing(problem, needs)
    for dim, weight in zip(problem.dims, problem.dim_weights, strict=True):
        smoothing.add_prefix(dim, weight)
    extra = smoothing.result()
    gradients = (None if a is None or b is None else a + b for a, b in zip(plain[1:], extra[1:], strict=True))
    return ContrastiveResult(plain.loss + extra.loss, *gradients)


class _Vectors:
    """A set of vectors, the prefix of them that is looked at, and their gradient."""

    def __init__(self, parts: tuple[Tensor, ...], problem: ContrastiveProblem, need: bool) -> None:
        self.problem = problem
        self.whole = torch.cat([part.detach().to(problem.dtype) for part in parts])  # (rows, D)
        self.total = torch.zeros_like(self.whole) if need else None
        self.values = self.whole  # (rows, d), of unit length where similarities are cosines
        self.gradient: Tensor | None = None  # (rows, d), of these values

    def begin(self, dim: int) -> None:
        """Looks at the first ``dim`` entries."""
        self.values = self.whole[:, :dim]
        if self.problem.cosine:
            norms = torch.linalg.vector_norm(self.values, dim=1, keepdim=True)
            self.below_eps, self.norms = norms < self.problem.eps, norms.clamp(min=self.problem.eps)
            self.values = self.values / self.norms
        self.gradient = None if self.total is None else torch.zeros_like(self.values)

    def finish(self) -> None:
        """Carries the gradient of this prefix through its norm: dx = (g - (g . x) x) / |x|."""
        if self.total is None or self.gradient is None:
            return
        gradient = self.gradient
        if self.problem.cosine:
            radial = (gradient * self.values).sum(dim=1, keepdim=True).masked_fill(self.below_eps, 0)
            gradient = (gradient - radial * self.values) / self.norms
            if self.problem.queries.dtype == torch.float16:  # which cannot hold a gradient over eps
                gradient = gradient.masked_fill(self.below_eps, 0)
        self.total[:, : self.values.shape[1]] += gradient


@dataclass
class _TermSums:
    """Sums of the similarities of one term, for each row; and where they come from."""

    term: Term
    positives: Tensor  # (N,)
    positive_count: Tensor  # (N,)
    candidates: Tensor  # (N,), positives among them
    count: Tensor  # (N,)
    hard: Tensor  # (N,): those of the candidates that get the hardness penalty
    column_sum: Tensor  # (d,)
    excluded: list[tuple[int, Tensor]]  # diagonals, and where their entries are no candidates, (N,) of 0 and 1


class _Smoothing:
    """One call: sums over the prefixes, and their gradients."""

    def __init__(self, problem: ContrastiveProblem, needs: Needs) -> None:
        self.problem, self.needs, self.n = problem, needs, problem.queries.shape[0]
        self.queries = _Vectors((problem.queries,), problem, needs.queries)
        self.documents = _Vectors(problem.documents, problem, needs.documents)
        self.all_queries = self.queries
        if problem.all_queries is not None:
            self.all_queries = _Vectors((problem.all_queries,), problem, needs.all_queries)
        self.vectors = list({id(v): v for v in (self.queries, self.documents, self.all_queries)}.values())
        self.scale = problem.scale.factor(problem.dtype, problem.device)
        # The place of a group's first id among the sorted ids names the group: no number of groups has to be read.
        self.groups: dict[bool, Tensor] = {}
        for term in problem.terms():
            ids = problem.column_ids(term)
            if ids is not None:
                self.groups[term.columns_are_queries] = torch.searchsorted(ids.sort().values, ids)
        self.excess = self.queries.whole.new_zeros(self.n)
        self.scale_gradient = self.queries.whole.new_zeros(())
        self.weights = None if problem.weights is None else problem.weights.detach().to(problem.dtype)
        share = torch.full_like(self.excess, 1 / self.n)
        self.share = share if self.weights is None else self.weights / weight_sum(self.weights)

    def add_prefix(self, dim: int, weight: float) -> None:
        """Adds the part of one prefix."""
        softmaxes = self.problem.softmaxes()
        weight *= self.problem.spec.label_smoothing / len(softmaxes)
        for vectors in self.vectors:
            vectors.begin(dim)
        for terms in softmaxes:
            self._add_softmax([self._sums(term) for term in terms], weight)
        for vectors in self.vectors:
            vectors.finish()

    def result(self) -> ContrastiveResult:
        """Returns what smoothing adds to the loss and to its gradients."""
        loss, weights = (self.share * self.excess).sum(), None
        if self.needs.weights and self.weights is not None:
            weights = (self.excess - loss) / weight_sum(self.weights)
        all_queries = self.all_queries.total if self.problem.all_queries is not None else None
        return ContrastiveResult(
            loss, self.queries.total, self.documents.total, all_queries, self.scale_gradient, weights
        )

    def _add_softmax(self, sums: list[_TermSums], weight: float) -> None:
        positive_count, count = sum(s.positive_count for s in sums), sum(s.count for s in sums)
        for s in sums:
            logits = self.scale * s.candidates + s.term.hardness * s.hard
            self.excess += weight * (self.scale * s.positives / positive_count - logits / count)
            # Gradients of the sums of similarities, without the scale; hardness gets none, as stock detaches it.
            d_positives, d_candidates = weight * self.share / positive_count, -weight * self.share / count
            self.scale_gradient += (d_positives * s.positives + d_candidates * s.candidates).sum()
            if self.needs.vectors:
                self._add_gradients(s, self.scale * d_positives, self.scale * d_candidates)

    def _sides(self, term: Term) -> tuple[_Vectors, slice, _Vectors]:
        """Returns the vectors of the rows, where row 0 to N - 1 lie among them, and the vectors of the columns."""
        columns = self.all_queries if term.columns_are_queries else self.documents
        if term.rows_are_queries:
            return self.queries, slice(0, self.n), columns
        return self.documents, slice(self.problem.row_offset, self.problem.row_offset + self.n), columns

    def _sums(self, term: Term) -> _TermSums:
        row_vectors, index, column_vectors = self._sides(term)
        rows, columns = row_vectors.values[index], column_vectors.values[: term.columns]
        own = slice(term.own_column, term.own_column + self.n)

        def diagonal(start: int) -> Tensor:  # similarities of row i and column start + i, (N,)
            return (rows * columns[start : start + self.n]).sum(dim=1)

        def no_duplicates(start: int) -> Tensor:  # 1 where row i's column start + i is no duplicate, (N,)
            ids = self.problem.column_ids(term)
            if ids is None or start == term.own_column:
                return torch.ones_like(self.excess)
            return (ids[start : start + self.n] != ids[own]).to(rows.dtype)

        nothing = torch.zeros_like(self.excess)
        column_sum = columns.sum(dim=0)
        candidates, count = rows @ column_sum, torch.full_like(nothing, term.columns)
        excluded = [(start, no_duplicates(start)) for start in term.excluded]
        for start, part in excluded:
            candidates, count = candidates - part * diagonal(start), count - part
        positives, positive_count = nothing, nothing
        if term.positive is not None:
            positives, positive_count = diagonal(term.positive), torch.ones_like(nothing)
        if term.duplicates != "keep":
            group = self.groups[term.columns_are_queries]
            others = _sums_by_group(columns, group)[group[own]] - columns[own]
            size = _sums_by_group(torch.ones_like(group), group)[group[own]] - 1
            if term.duplicates == "mask":
                candidates, count = candidates - (rows * others).sum(dim=1), count - size
            else:
                positives, positive_count = positives + (rows * others).sum(dim=1), positive_count + size
        exceptions = nothing
        for start in term.hardness_exceptions:
            exceptions = exceptions + no_duplicates(start) * diagonal(start)
        hard = candidates - positives - exceptions if term.hard_everywhere else exceptions
        return _TermSums(term, positives, positive_count, candidates, count, hard, column_sum, excluded)

    def _add_gradients(self, sums: _TermSums, d_positives: Tensor, d_candidates: Tensor) -> None:
        """Adds the gradients of rows and columns; those given, (N,), are of the sums of their similarities."""
        term = sums.term
        row_vectors, index, column_vectors = self._sides(term)
        rows, columns = row_vectors.values[index], column_vectors.values[: term.columns]
        d_rows = None if row_vectors.gradient is None else row_vectors.gradient[index]
        d_columns = None if column_vectors.gradient is None else column_vectors.gradient[: term.columns]

        diagonals = [(start, -part * d_candidates) for start, part in sums.excluded]
        if term.positive is not None:
            diagonals.append((term.positive, d_positives))
        if d_rows is not None:
            d_rows += d_candidates[:, None] * sums.column_sum
        if d_columns is not None:
            d_columns += d_candidates @ rows
        for start, d_similarity in diagonals:
            if d_rows is not None:
                d_rows += d_similarity[:, None] * columns[start : start + self.n]
            if d_columns is not None:
                d_columns[start : start + self.n] += d_similarity[:, None] * rows
        if term.duplicates == "keep":
            return
        d_similarity = (-d_candidates if term.duplicates == "mask" else d_positives)[:, None]
        own, group = slice(term.own_column, term.own_column + self.n), self.groups[term.columns_are_queries]
        if d_rows is not None:
            d_rows += d_similarity * (_sums_by_group(columns, group)[group[own]] - columns[own])
        if d_columns is not None:
            by_group = _sums_by_group(d_similarity * rows, group[own], len(group))
            d_columns += by_group[group]
            d_columns[own] -= d_similarity * rows


def _sums_by_group(values: Tensor, group: Tensor, groups: int | None = None) -> Tensor:
    """Returns the sum of the values of each group, (groups, ...), the same bits each time."""
    total = values.new_zeros((len(group) if groups is None else groups, *values.shape[1:]))
    if values.device.type == "cpu":
        return total.index_add_(0, group, values)
    return total.index_put_((group,), values, accumulate=True)  # index_add is not deterministic on a GPU
