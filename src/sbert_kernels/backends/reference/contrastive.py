"""The contrastive operation by its definition: every matrix held, autograd's gradients.

It shares no trick with the other backends, and derives every rule from the options on its own, so that it can judge
them. It multiplies in float32, or float64 for float64 embeddings, under autocast too: it rounds nothing on purpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...problems.contrastive import DIRECTIONS, ContrastiveProblem, ContrastiveResult, Needs, weight_sum


def contrastive(problem: ContrastiveProblem, needs: Needs) -> ContrastiveResult:
    """Returns loss and gradients of the operation; holds every similarity matrix several times over."""
    given = problem.scale.given
    scale = given if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.float64)
    inputs = {
        "queries": (problem.queries, needs.queries),
        "documents": (torch.cat(problem.documents), needs.documents),
        "all_queries": (problem.all_queries, needs.all_queries),
        "scale": (scale, needs.scale),
        "weights": (problem.weights, needs.weights),
    }
    leaves = {
        name: tensor.detach().to(problem.device, problem.dtype).requires_grad_(need)
        for name, (tensor, need) in inputs.items()
        if tensor is not None
    }
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    with torch.set_grad_enabled(bool(wanted)):
        loss = torch.zeros((), dtype=problem.dtype, device=problem.device)
        for dim, weight in zip(problem.dims, problem.dim_weights, strict=True):
            loss = loss + weight * _loss(problem, **{name: _prefix(leaf, dim) for name, leaf in leaves.items()})
    gradients: tuple[Tensor, ...] = ()
    if wanted:
        found = [leaves[name] for name in wanted]
        # all_queries, where no direction looks at them, have a gradient of zero.
        gradients = tuple(torch.zeros_like(x) for x in found)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, found, allow_unused=True, materialize_grads=True)
    return ContrastiveResult(loss.detach(), **dict(zip(wanted, gradients, strict=True)))


def _prefix(leaf: Tensor, dim: int) -> Tensor:
    """Returns the first ``dim`` entries of each embedding; whatever is not a matrix of embeddings stays whole."""
    return leaf[:, :dim] if leaf.dim() == 2 else leaf


def _loss(
    problem: ContrastiveProblem,
    queries: Tensor,  # (N, D)
    documents: Tensor,  # (M, D)
    scale: Tensor,  # ()
    all_queries: Tensor | None = None,  # (W, D)
    weights: Tensor | None = None,  # (N,)
) -> Tensor:
    matrices = []  # of each direction: logits and which entries are positives, both (N, columns)
    for direction in DIRECTIONS:
        if direction in problem.spec.directions:
            matrices.append(direction_logits(problem, direction, queries, documents, all_queries, scale))
    smoothing = problem.spec.label_smoothing
    groups = [matrices] if problem.spec.partition_mode == "joint" else [[matrix] for matrix in matrices]

    loss = torch.zeros(len(queries), dtype=queries.dtype, device=queries.device)
    for group in groups:
        z = torch.cat([logits for logits, _ in group], dim=1)
        positive = torch.cat([positives for _, positives in group], dim=1)
        target_logit = mean_positive = z.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)
        if smoothing > 0:
            candidate = z > -torch.inf
            mean_candidate = z.masked_fill(~candidate, 0).sum(dim=1) / candidate.sum(dim=1)
            target_logit = (1 - smoothing) * mean_positive + smoothing * mean_candidate
        loss = loss + (torch.logsumexp(z, dim=1) - target_logit) / len(groups)
    return loss.mean() if weights is None else (weights * loss).sum() / weight_sum(weights)


def direction_logits(
    problem: ContrastiveProblem,
    direction: str,
    queries: Tensor,
    documents: Tensor,
    all_queries: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns a direction's logits with its exclusions at -inf, and which entries are positives: both (N, columns)."""
    spec, world, offset = problem.spec, len(problem.documents[0]), problem.row_offset
    from_query, to_query = direction.startswith("query"), direction.endswith("query")
    has_positive = direction in ("query_to_doc", "doc_to_query")
    own_documents = slice(offset, offset + len(queries))

    def sides(query_vectors: Tensor, query_columns: Tensor, document_vectors: Tensor) -> tuple[Tensor, Tensor]:
        # With a guide, stock contrasts the positives with each other and leaves negatives out.
        candidates = document_vectors[:world] if problem.guided and direction == "doc_to_doc" else document_vectors
        rows = query_vectors if from_query else document_vectors[own_documents]
        return rows, query_columns if to_query else candidates

    rows, columns = sides(queries, queries if all_queries is None else all_queries, documents)
    similarity = _similarity(rows, columns, problem)

    # The row's own query or positive, and its own documents: the positive, then its hard negatives.
    own = _diagonals(similarity, (0 if to_query and all_queries is None else offset,))
    its_documents = tuple(range(offset, len(documents), world))
    positive = own.clone() if has_positive else torch.zeros_like(own)
    excluded = torch.zeros_like(own)
    if not has_positive and not problem.guided:
        excluded |= own if to_query else _diagonals(similarity, its_documents)

    ids = problem.query_ids if to_query else problem.document_ids
    if spec.duplicates != "keep" and ids is not None:
        ids = ids[: len(columns)]
        row_ids = ids[own.int().argmax(dim=1)]
        duplicate = (row_ids[:, None] == ids[None, :]) & ~own
        if has_positive and spec.duplicates == "positive":
            positive |= duplicate
        else:
            excluded |= duplicate

    if problem.guide_queries is not None:
        guide_queries, guide_documents = _guide_vectors(problem)
        guide_rows, guide_columns = sides(guide_queries, guide_queries, guide_documents)
        own_similarity = (guide_queries * guide_documents[own_documents]).sum(dim=1)
        margin = spec.margin * (own_similarity.abs() if spec.margin_strategy == "relative" else 1.0)
        # Copies of the positive tie with it, though a matrix product may round the two differently.
        threshold = own_similarity - margin + 8 * torch.finfo(own_similarity.dtype).eps
        excluded |= (guide_rows @ guide_columns.T > threshold[:, None]) & ~positive

    z = scale * similarity
    if direction == "query_to_doc" and spec.hardness_mode is not None and spec.hardness_strength > 0:
        hard_negative = _diagonals(similarity, its_documents[1:])
        hard = {
            "in_batch_negatives": ~own & ~hard_negative,
            "hard_negatives": hard_negative,
            "all_negatives": ~own,
        }[spec.hardness_mode]
        z = z + spec.hardness_strength * similarity.detach() * (hard & ~positive)
    # Filling after the scale keeps its gradient finite: the derivative of scale * -inf is not a number.
    return z.masked_fill(excluded, -torch.inf), positive


def _similarity(rows: Tensor, columns: Tensor, problem: ContrastiveProblem) -> Tensor:
    if problem.spec.similarity == "cos":
        rows, columns = (F.normalize(x, dim=1, eps=problem.eps) for x in (rows, columns))
    return rows @ columns.T


def _guide_vectors(problem: ContrastiveProblem) -> tuple[Tensor, Tensor]:
    """Returns the guide's vectors of queries (N, G) and documents (M, G), of unit length."""
    assert problem.guide_queries is not None
    precision = torch.promote_types(problem.guide_queries.dtype, torch.float32)
    queries, documents = (
        F.normalize(x.to(precision), dim=1, eps=problem.eps)
        for x in (problem.guide_queries, torch.cat(problem.guide_documents))
    )
    return queries, documents


def _diagonals(matrix: Tensor, starts: tuple[int, ...]) -> Tensor:
    """Returns a mask of the shape of ``matrix`` that is True on the diagonals that start at these columns."""
    mask = torch.zeros_like(matrix, dtype=torch.bool)
    for start in starts:
        mask.diagonal(start).fill_(True)
    return mask
