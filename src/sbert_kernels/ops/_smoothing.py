"""Label smoothing of the contrastive loss, which is linear in the logits and so needs no matrix of them.

With K candidates in a row's softmax, the target puts 1 - a on the positives and a / K on each candidate, so that

    loss = logsumexp(z) - (1 - a) mean of the positives' z - a mean of the candidates' z
         = plain loss + a (mean of the positives' z - mean of the candidates' z)

The sum of a row's similarities is its product with the sum of the columns, the few excluded or hard entries lie on
diagonals, and duplicates are summed up by their ids: O((N + M) D) time and memory in torch operations, on every
device and beside every backend. Autograd gives the gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problems.contrastive import ContrastiveProblem, Term, weight_sum
from ..values import without_autocast


def smoothing_excess(problem: ContrastiveProblem) -> Tensor:
    """Returns the mean over the rows of (mean of the positives' logits - mean of the candidates'), ().

    Weighted as the loss is: by ``weights`` over the rows, by ``dim_weights`` over the prefixes.
    """
    with without_autocast(problem.device):
        excess = torch.zeros(problem.queries.shape[0], dtype=problem.dtype, device=problem.device)
        softmaxes = problem.softmaxes()
        for dim, weight in zip(problem.dims, problem.dim_weights, strict=True):
            vectors = _Vectors(problem, dim)
            for terms in softmaxes:
                excess = excess + vectors.excess(terms) * (weight / len(softmaxes))
        if problem.weights is None:
            return excess.mean()
        weights = problem.weights.to(problem.dtype)
        return (weights * excess).sum() / weight_sum(weights)


class _Vectors:
    """One prefix of all embeddings, of unit length where similarities are cosines."""

    def __init__(self, problem: ContrastiveProblem, dim: int) -> None:
        self.problem, self.rows = problem, problem.queries.shape[0]

        def prefix(vectors: Tensor) -> Tensor:
            values = vectors[:, :dim].to(problem.dtype)
            return F.normalize(values, dim=1, eps=problem.eps) if problem.cosine else values

        self.queries = prefix(problem.queries)
        self.query_columns = self.queries if problem.all_queries is None else prefix(problem.all_queries)
        self.documents = torch.cat([prefix(column) for column in problem.documents])
        scale = problem.scale.given
        self.scale = scale.to(problem.device, problem.dtype) if isinstance(scale, Tensor) else scale

    def excess(self, terms: tuple[Term, ...]) -> Tensor:
        """Returns the mean of the positives' logits less the mean of the candidates' in one softmax, (N,)."""
        sums = [_TermSums(self, term) for term in terms]
        positives = torch.stack([s.positives for s in sums]).sum(0) / torch.stack([s.positive_count for s in sums]).sum(
            0
        )
        candidates = torch.stack([s.candidates for s in sums]).sum(0) / torch.stack([s.count for s in sums]).sum(0)
        return positives - candidates


class _TermSums:
    """Sums of the logits of one term, for each row: of its positives and of its candidates, and how many there are."""

    def __init__(self, vectors: _Vectors, term: Term) -> None:
        problem, n = vectors.problem, vectors.rows
        first = 0 if term.rows_are_queries else problem.row_offset
        rows = vectors.queries if term.rows_are_queries else vectors.documents[first : first + n]
        columns = vectors.query_columns if term.columns_are_queries else vectors.documents[: term.columns]
        duplicates = _Duplicates(problem, term, rows, columns)

        def diagonal(start: int) -> Tensor:  # similarities of row i and column start + i, (N,); 0 for duplicates
            return (rows * columns[start : start + n]).sum(dim=1) * ~duplicates.on_diagonal(start)

        similarities = rows @ columns.sum(dim=0)  # of all candidates, in the end
        count = torch.full_like(similarities, term.columns)
        for start in term.excluded:
            similarities = similarities - diagonal(start)
            count = count - (~duplicates.on_diagonal(start)).to(count.dtype)
        if term.duplicates == "mask":
            similarities, count = similarities - duplicates.similarities, count - duplicates.count

        positives, positive_count = torch.zeros_like(similarities), torch.zeros_like(count)
        if term.positive is not None:
            positives, positive_count = positives + diagonal(term.positive), positive_count + 1
        if term.duplicates == "positive":
            positives, positive_count = positives + duplicates.similarities, positive_count + duplicates.count

        exceptions = torch.zeros_like(similarities)
        for start in term.hardness_exceptions:
            exceptions = exceptions + diagonal(start)
        hard = similarities - positives - exceptions if term.hard_everywhere else exceptions
        self.positives, self.positive_count = vectors.scale * positives, positive_count
        self.candidates, self.count = vectors.scale * similarities + term.hardness * hard.detach(), count


class _Duplicates:
    """The columns of a term with the id of a row's own column, without that column itself."""

    def __init__(self, problem: ContrastiveProblem, term: Term, rows: Tensor, columns: Tensor) -> None:
        n = rows.shape[0]
        self.rows, self.own_column = n, term.own_column
        self.ids = problem.column_ids(term)
        self.similarities, self.count = torch.zeros_like(rows[:, 0]), torch.zeros_like(rows[:, 0])
        self.nowhere = torch.zeros(n, dtype=torch.bool, device=rows.device)
        if self.ids is None:
            return
        own = slice(term.own_column, term.own_column + n)
        # A group is known by the place of its first column among the sorted ids: no number of groups has to be read.
        group = torch.searchsorted(self.ids.sort().values, self.ids)
        size = torch.zeros_like(self.ids).index_put((group,), torch.ones_like(self.ids), accumulate=True)
        # index_put and not index_add, which is not deterministic on a GPU.
        total = torch.zeros_like(columns).index_put((group,), columns, accumulate=True)
        self.similarities = (rows * (total[group[own]] - columns[own])).sum(dim=1)
        self.count = (size[group[own]] - 1).to(rows.dtype)

    def on_diagonal(self, start: int) -> Tensor:
        """Returns True where row i's column ``start + i`` is one of them, (N,)."""
        if self.ids is None or start == self.own_column:
            return self.nowhere
        own = self.ids[self.own_column : self.own_column + self.rows]
        return self.ids[start : start + self.rows] == own
