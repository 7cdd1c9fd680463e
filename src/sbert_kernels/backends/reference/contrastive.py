"""The contrastive operation by its definition: every matrix held, autograd's gradients.

It shares no trick with the other backends, so that it can judge them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...problems.contrastive import ContrastiveProblem, ContrastiveResult, Needs, Term, weight_sum


def contrastive(problem: ContrastiveProblem, needs: Needs) -> ContrastiveResult:
    """Loss and gradients of the contrastive operation; memory for every similarity matrix, several times over."""

    def leaf(tensor: Tensor | float | None, wanted: bool) -> Tensor | None:
        if tensor is None:
            return None
        if not isinstance(tensor, Tensor):
            return torch.tensor(tensor, dtype=problem.dtype, device=problem.queries.device)
        return tensor.detach().to(problem.dtype).requires_grad_(wanted)

    leaves = {
        "queries": leaf(problem.queries, needs.queries),
        "documents": leaf(torch.cat(problem.documents), needs.documents),
        "all_queries": leaf(problem.all_queries, needs.all_queries),
        "scale": leaf(problem.scale, needs.scale),
        "weights": leaf(problem.weights, needs.weights),
    }
    wanted = [name for name, value in leaves.items() if value is not None and value.requires_grad]
    with torch.set_grad_enabled(bool(wanted)):
        loss = sum(
            weight * _loss(problem, **{name: _prefix(leaf, dim) for name, leaf in leaves.items()})
            for dim, weight in zip(problem.dims, problem.dim_weights, strict=True)
        )
    gradients = ()
    if wanted:
        inputs = [leaves[name] for name in wanted]
        # all_queries, where no direction looks at them, have a gradient of zero.
        gradients = tuple(torch.zeros_like(x) for x in inputs)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return ContrastiveResult(loss.detach(), **dict(zip(wanted, gradients, strict=True)))


def _prefix(leaf: Tensor | None, dim: int) -> Tensor | None:
    """The first ``dim`` entries of each embedding; whatever is not a matrix of embeddings stays whole."""
    return leaf[:, :dim] if leaf is not None and leaf.dim() == 2 else leaf


def _loss(
    problem: ContrastiveProblem,
    queries: Tensor,  # (N, D)
    documents: Tensor,  # (M, D)
    all_queries: Tensor | None,  # (W, D)
    scale: Tensor,  # ()
    weights: Tensor | None,  # (N,)
) -> Tensor:
    logits: dict[Term, Tensor] = {}
    positives: dict[Term, Tensor] = {}
    own_documents = slice(problem.row_offset, problem.row_offset + len(queries))
    for term in problem.terms():
        rows = queries if term.rows_are_queries else documents[own_documents]
        columns = documents[: term.columns]
        if term.columns_are_queries:
            columns = queries if all_queries is None else all_queries
        logits[term], positives[term] = _term(problem, term, rows, columns, scale)

    loss = torch.zeros(len(queries), dtype=queries.dtype, device=queries.device)
    groups = problem.groups()
    for group in groups:
        z = torch.cat([logits[term] for term in group], dim=1)
        positive = torch.cat([positives[term] for term in group], dim=1)
        positive_logit = z.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)
        loss = loss + (torch.logsumexp(z, dim=1) - positive_logit) / len(groups)
    return loss.mean() if weights is None else (weights * loss).sum() / weight_sum(weights)


def _term(
    problem: ContrastiveProblem, term: Term, rows: Tensor, columns: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of a term with its exclusions at -inf, and which entries are the row's positives: both (N, columns)."""
    similarity = _similarity(rows, columns, problem)
    own = _diagonals(similarity, () if term.positive is None else (term.positive,))
    positive, excluded = own.clone(), _diagonals(similarity, term.excluded)

    ids = problem.column_ids(term)
    if ids is not None:
        begin = problem.own_column(term)
        duplicate = ids[begin : begin + len(rows), None] == ids[None, :]
        if term.positive is not None and problem.duplicates == "positive":
            positive |= duplicate
        else:
            excluded |= duplicate & ~_diagonals(similarity, (begin,))

    if problem.guided:
        guide = _guide_similarity(problem, term)
        threshold = problem.guide_threshold(_guide_similarity(problem, None))
        excluded |= (guide > threshold[:, None]) & ~positive

    z = scale * similarity
    if term.direction == "query_to_doc" and problem.hardness > 0:
        own_negative = _diagonals(similarity, term.own_negatives)
        weighted = {
            "in_batch_negatives": ~own & ~own_negative,
            "hard_negatives": own_negative,
            "all_negatives": ~own,
        }[problem.hardness_mode]
        z = z + problem.hardness * similarity.detach() * (weighted & ~positive)
    # Filling after the scale keeps its gradient finite: the derivative of scale * -inf is not a number.
    return z.masked_fill(excluded, -torch.inf), positive


def _similarity(rows: Tensor, columns: Tensor, problem: ContrastiveProblem) -> Tensor:
    if problem.similarity == "cos":
        rows, columns = (F.normalize(x, dim=1, eps=problem.eps) for x in (rows, columns))
    return rows @ columns.T


def _guide_similarity(problem: ContrastiveProblem, term: Term | None) -> Tensor:
    """Cosine of the guide's vectors for a term, (N, columns); for ``None``, of each row's own pair, (N,)."""
    precision = torch.promote_types(problem.guide_queries.dtype, torch.float32)
    queries, documents = (
        F.normalize(x.to(precision), dim=1, eps=problem.eps)
        for x in (problem.guide_queries, torch.cat(problem.guide_documents))
    )
    own_documents = documents[problem.row_offset : problem.row_offset + len(queries)]
    if term is None:
        return (queries * own_documents).sum(dim=1)
    rows = queries if term.rows_are_queries else own_documents
    return rows @ (queries if term.columns_are_queries else documents[: term.columns]).T


def _diagonals(matrix: Tensor, starts: tuple[int, ...]) -> Tensor:
    """True on the diagonals that start at these columns; the shape of ``matrix``."""
    mask = torch.zeros_like(matrix, dtype=torch.bool)
    for start in starts:
        mask.diagonal(start).fill_(True)
    return mask
