"""Blockwise softmax cross-entropy over similarities: the in-batch-negatives losses, without their N x M matrix.

For rows i of a batch of (query, document, hard negatives...), with z = scale * similarity (+ hardness penalty):

    loss = sum_i w_i (Z_i - z_i,positive) / sum_i w_i,     Z_i = logsumexp over the candidates of row i

The candidates of a row are those of its *directions*: the documents for its query (`query_to_doc`), the other queries
(`query_to_query`), the queries for its document (`doc_to_query`), the other rows' documents (`doc_to_doc`). `joint`
takes one logsumexp over the union, `per_direction` averages one per direction. Options follow sentence-transformers'
MultipleNegativesRankingLoss (van den Oord et al. 2018, Li et al. 2023, Lan et al. 2025), GISTEmbedLoss (Solatorio
2024) and MatryoshkaLoss (Kusupati et al. 2022).

The loss is a scalar, so its gradients are computed in the forward pass up to one factor, and the backward pass
multiplies by that factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..integers import as_integer
from ..problems import contrastive as contract
from ..problems.contrastive import ContrastiveProblem, ContrastiveSpec, Needs
from ..problems.scale import Scale
from ..values import autocast_type, readable
from . import _checks as checks
from . import _traced
from ._autograd import anchor, destinations_of, learnable, scaled
from ._dispatch import backend_for
from ._smoothing import compute_with_smoothing


class _Contrastive(torch.autograd.Function):
    """The loss with its gradients: tensors that may get one are arguments, everything else is in the problem."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: ContrastiveProblem,
        backend: str | None,
        real: bool,  # the values of all tensors may be read
        *tensors: Tensor | float | None,  # queries, all_queries, scale, weights, then the document columns
    ) -> tuple[Tensor, Tensor]:
        queries, all_queries, scale, weights, *documents = ctx.needs_input_grad[3:]
        needs = Needs(queries, any(documents), all_queries, scale, weights)
        result = _run(problem, backend, needs, real)
        guard = anchor(result.loss)
        # Saved in the accumulators' dtype, not the inputs': a gradient scaler multiplies before the rounding.
        ctx.save_for_backward(guard, result.queries, result.all_queries, result.scale, result.weights, result.documents)
        ctx.document_rows = [column.shape[0] for column in problem.documents]
        ctx.destinations = destinations_of(tensors)
        ctx.set_materialize_grads(False)
        return result.loss, guard

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[3:]
        if grad_output is None:
            return None, None, None, *(None for _ in wanted)
        guard, *gradients, documents = ctx.saved_tensors
        rows, destinations = ctx.document_rows, ctx.destinations
        # Columns that are alike are multiplied together, by one kernel.
        together = len(rows) == 1 or (all(wanted[4:]) and len(set(destinations[4:])) == 1)
        if together:
            gradients.append(documents)
        else:
            gradients += [None] * len(rows) if documents is None else documents.split(rows)
        end = len(gradients)
        found = scaled("contrastive_loss", gradients, destinations[:end], wanted[:end], grad_output, guard)
        if together and len(rows) > 1:
            whole = found.pop()
            assert whole is not None
            found += whole.split(rows)
        return None, None, None, *found


def _run(problem: ContrastiveProblem, backend: str | None, needs: Needs, real: bool) -> contract.ContrastiveResult:
    """Returns the result of a problem; ``real``: its tensors hold values that may be read."""
    if not real:
        return _traced.contrastive(problem, backend, needs)
    with backend_for("contrastive", backend, problem) as chosen:
        return compute_with_smoothing(chosen, problem, needs)


def contrastive_loss(
    queries: Tensor,
    documents: Tensor | Sequence[Tensor],
    *,
    scale: float | Tensor = 20.0,
    similarity: str = "cos",
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    duplicates: str = "keep",
    guide_queries: Tensor | None = None,
    guide_documents: Tensor | Sequence[Tensor] | None = None,
    margin_strategy: str = "absolute",
    margin: float = 0.0,
    all_queries: Tensor | None = None,
    row_offset: int = 0,
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Returns the in-batch-negatives softmax cross-entropy of (query, document, hard negatives...) rows.

    The N x M matrix of similarities is computed in blocks and never held.

    Differentiable once in ``queries``, ``documents``, ``all_queries``, and in ``scale`` and ``weights`` where they are
    tensors; a second derivative raises. Deterministic.

    Under ``torch.autocast`` the matrix products take autocast's type, as those of ``torch.matmul`` do, whatever type
    the embeddings have (float64 stays, and nothing changes with a guide, as stock's loss has no products there).
    Logits, softmax, sums and the loss are float32 all the same, and gradients have the embeddings' type.
    SBERT_KERNELS_MATMUL, where it is set, wins over autocast. A backend may multiply more exactly than it is asked to.

    Args:
        queries: The local anchors, [N, D]; row i's own positive is document ``row_offset + i``.
        documents: The positives, [W, D], W >= row_offset + N; or a sequence of the positives and then one tensor for
            each column of hard negatives, [W, D] (any number of rows where no option needs to know whose they are).
        scale: Multiplies the similarities: the inverse temperature. A positive number, or a 0-d tensor (a learnable
            one gets its gradient).
        similarity: "cos" (normalises inside, the gradient flows through the norm) or "dot".
        directions: Which candidates a row has; must contain "query_to_doc". See the module's docstring.
        partition_mode: "joint", or "per_direction" (only for "query_to_doc" and "doc_to_query", the directions that
            contain the positive).
        hardness_mode: None, "in_batch_negatives", "hard_negatives" or "all_negatives": which documents get
            ``hardness_strength * stop_gradient(similarity)`` added to their logit.
        hardness_strength: Not negative.
        label_smoothing: Part a of the target, in 0 .. 1, that is spread evenly over all candidates of the row, the
            positive included; 1 - a stays on the positive (Szegedy et al. 2015, arXiv 1512.00567; as in
            ``torch.nn.CrossEntropyLoss``). What is excluded is no candidate. Not with a guide, for which each pair
            would have to be looked at once more.
        weights: Weight of each row, [N]; the loss is the weighted mean. 0 where no row has one.
        query_ids: int64, one for each query column, [N] or [W] with ``all_queries``. Equal ids mean equal texts.
        document_ids: int64, [M] for all documents in the order given.
        duplicates: What becomes of a column with the id of the row's own column: "keep" it as a negative (as stock
            does), "mask" it, or count it as a duplicate "positive" (the positive part is then the mean over the row's
            positives; a duplicate of the row itself, in the directions without a positive, is masked).
        guide_queries: A guide model's vectors of the queries, [N, G]: candidates that its cosine finds closer to the
            row than the row's own positive (less a margin) are false negatives, and excluded. As in GISTEmbedLoss,
            "doc_to_doc" then contrasts positives only, and the row itself is excluded by the guide or not at all.
        guide_documents: The guide's vectors of the documents, in the structure of ``documents``.
        margin_strategy: Threshold s - margin ("absolute") or s - |s| * margin ("relative"), for the own positive's
            guide similarity s.
        margin: See ``margin_strategy``.
        all_queries: Every rank's queries, [W, D], when the columns are gathered; local queries otherwise.
        row_offset: Position of the local rows among the gathered ones: rank * N.
        matryoshka_dims: Widths of prefixes, each in 1 .. D, in any order. The loss is then the weighted sum, not the
            mean, of the losses of these prefixes of all embeddings; "cos" normalises each prefix by its own norm. The
            guide's vectors stay whole. A repeated width counts as often as it is given. Entries beyond the widest
            prefix get a gradient of zero.
        matryoshka_weights: A finite number for each of ``matryoshka_dims``; 1 by default.
        backend: Name of the backend to use; None lets :func:`sbert_kernels.use_backend` or the library choose.

    Returns:
        The loss, a 0-d tensor; float32, or float64 for float64 inputs.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device, a value or a combination of options cannot be served; the message names it.
    """
    options = _Options(
        similarity=similarity,
        directions=directions,
        partition_mode=partition_mode,
        hardness_mode=hardness_mode,
        hardness_strength=hardness_strength,
        label_smoothing=label_smoothing,
        duplicates=duplicates,
        margin_strategy=margin_strategy,
        margin=margin,
        matryoshka_dims=matryoshka_dims,
        matryoshka_weights=matryoshka_weights,
    )
    problem = _validated(
        options,
        queries=queries,
        documents=documents,
        scale=scale,
        weights=weights,
        query_ids=query_ids,
        document_ids=document_ids,
        guide_queries=guide_queries,
        guide_documents=guide_documents,
        all_queries=all_queries,
        row_offset=row_offset,
    )
    inputs: Sequence[Tensor | float | None] = (
        problem.queries,
        problem.all_queries,
        problem.scale.given,
        problem.weights,
        *problem.documents,
    )
    real = readable(*problem.tensors())
    if not learnable("contrastive_loss", inputs):
        return _run(problem, backend, Needs(), real).loss
    loss, _ = _Contrastive.apply(problem, backend, real, *(inputs if real else _traced.distinct(inputs)))
    return loss


class _Options(NamedTuple):
    """The options of one call that concern no tensor of it, as they were given."""

    similarity: str
    directions: Sequence[str]
    partition_mode: str
    hardness_mode: str | None
    hardness_strength: float
    label_smoothing: float
    duplicates: str
    margin_strategy: str
    margin: float
    matryoshka_dims: Sequence[int] | None
    matryoshka_weights: Sequence[float] | None


def _validated(
    options: _Options,
    *,
    queries: Tensor,
    documents: Tensor | Sequence[Tensor],
    scale: float | Tensor,
    weights: Tensor | None,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    guide_queries: Tensor | None,
    guide_documents: Tensor | Sequence[Tensor] | None,
    all_queries: Tensor | None,
    row_offset: int,
) -> ContrastiveProblem:
    """Returns the problem, or raises the error that says which argument cannot be served."""
    checks.vectors("queries", queries)
    columns = checks.columns("documents", documents, "expected the positives, then a tensor for each negatives column")
    for index, column in enumerate(columns):
        checks.alike(f"documents[{index}]", column, "queries", queries)
    rows, dimension = queries.shape
    lengths, device, guided = [column.shape[0] for column in columns], queries.device, guide_queries is not None

    spec = _spec(options, dimension, _autocast(queries, guided=guided))
    if guided and spec.label_smoothing > 0:
        raise ValueError(f"label_smoothing={spec.label_smoothing} cannot be combined with guide_queries.")
    checked_scale = _scale(scale)

    _check_offset(row_offset, rows, lengths[0])
    knows_whose = spec.hardness_mode is not None and spec.hardness_strength > 0
    # Guided, doc_to_doc looks at the positives only.
    knows_whose = knows_whose or ("doc_to_doc" in spec.directions and not guided)
    if knows_whose and any(length != lengths[0] for length in lengths):
        raise ValueError(
            f"documents have {lengths} rows: 'doc_to_doc' and hardness weighting need as many rows in each negatives "
            "column as there are positives, to know whose negatives they are."
        )
    _check_all_queries(all_queries, queries, lengths[0], spec.directions, guided=guided)
    checks.row_weights(weights, rows, device)
    query_columns = rows if all_queries is None else all_queries.shape[0]
    needs_query_ids = "query_to_query" in spec.directions or "doc_to_query" in spec.directions
    _check_ids("query_ids", query_ids, query_columns, device, spec.duplicates if needs_query_ids else "keep")
    _check_ids("document_ids", document_ids, sum(lengths), device, spec.duplicates)
    return ContrastiveProblem(
        queries=queries,
        documents=columns,
        all_queries=all_queries,
        weights=weights,
        query_ids=query_ids,
        document_ids=document_ids,
        guide_queries=guide_queries,
        guide_documents=_guide(guide_queries, guide_documents, all_queries, queries, columns),
        scale=checked_scale,
        row_offset=row_offset,
        spec=spec,
    )


_PLAIN = {str, int, float, bool, type(None)}
# Of the options that came so far, because a training gives the same ones at each step.
_specs: dict[tuple[_Options, int, str | None], ContrastiveSpec] = {}


def _spec(options: _Options, dimension: int, autocast: str | None) -> ContrastiveSpec:
    """Returns the specification of options, after a check of each, for embeddings of a dimension.

    ``autocast``: the type that autocast gives products now.
    """
    if torch.compiler.is_compiling() or type(dimension) is not int:  # what traces would watch what is kept here
        return _checked_spec(options, dimension, autocast)
    try:
        return _specs[options, dimension, autocast]
    except (KeyError, TypeError):  # new ones, or lists, which have no hash
        options = _Options._make(tuple(option) if isinstance(option, list) else option for option in options)
    parts = [part for option in options for part in (option if isinstance(option, tuple) else (option,))]
    if not all(type(part) in _PLAIN for part in parts):  # the number of a tensor may change
        return _checked_spec(options, dimension, autocast)
    found = _specs.get((options, dimension, autocast))
    if found is None:
        found = _checked_spec(options, dimension, autocast)
        if len(_specs) >= 256:
            _specs.clear()
        _specs[options, dimension, autocast] = found
    return found


def _checked_spec(options: _Options, dimension: int, autocast: str | None) -> ContrastiveSpec:
    checks.one_of("similarity", options.similarity, contract.SIMILARITIES)
    directions = _directions(options.directions, options.partition_mode)
    checks.one_of("hardness_mode", options.hardness_mode, contract.HARDNESS_MODES)
    hardness_strength = checks.constant("hardness_strength", options.hardness_strength)
    # The margin only enters a comparison, so its gradient is always 0.
    margin = checks.number("margin", options.margin)
    if not 0 <= hardness_strength < math.inf:
        raise ValueError(f"hardness_strength must be a number >= 0, got {hardness_strength}.")
    label_smoothing = checks.constant("label_smoothing", options.label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in 0 .. 1, got {label_smoothing}.")
    checks.one_of("margin_strategy", options.margin_strategy, contract.MARGIN_STRATEGIES)
    if not abs(margin) < math.inf:
        raise ValueError(f"margin must be a finite number, got {margin}.")
    checks.one_of("duplicates", options.duplicates, contract.DUPLICATES)
    dims, dim_weights = _prefixes(options.matryoshka_dims, options.matryoshka_weights, dimension)
    return ContrastiveSpec(
        similarity=options.similarity,
        directions=directions,
        partition_mode=options.partition_mode,
        hardness_mode=options.hardness_mode,
        hardness_strength=float(hardness_strength),
        label_smoothing=float(label_smoothing),
        duplicates=options.duplicates,
        margin_strategy=options.margin_strategy,
        margin=float(margin),
        dims=dims,
        dim_weights=dim_weights,
        autocast=autocast,
    )


def _autocast(queries: Tensor, *, guided: bool) -> str | None:
    """Returns the type that autocast gives the products of a call now, or None.

    It leaves float64 as it is. Stock's loss with a guide has no products: it computes each cosine on its own, in
    float32 under autocast too, and so do we.
    """
    return None if guided or queries.dtype == torch.float64 else autocast_type(queries.device)


def _directions(given: Sequence[str], partition_mode: str) -> tuple[str, ...]:
    directions = (given,) if isinstance(given, str) else tuple(given)
    for direction in directions:
        checks.one_of("directions", direction, contract.DIRECTIONS)
    if "query_to_doc" not in directions:
        raise ValueError(f"directions must contain 'query_to_doc', which holds the positive pair; got {directions}.")
    checks.one_of("partition_mode", partition_mode, contract.PARTITION_MODES)
    without_positive = [d for d in directions if d in ("query_to_query", "doc_to_doc")]
    if partition_mode == "per_direction" and without_positive:
        raise ValueError(
            f"partition_mode='per_direction' needs directions with the positive pair; {without_positive} have none."
        )
    return directions


def _scale(given: Any) -> Scale:
    scale = Scale(checks.scale_type(given))
    # On a device the value is left unread: reading it would wait for everything before it. A compiler can't read it
    # either; the operator in its graph does.
    if scale.tensor is None or (scale.on_device is None and readable(scale.tensor)):
        contract.check_scale(checks.number("scale", given))
    return scale


def _check_offset(offset: Any, rows: int, positives: int) -> None:
    whole = type(offset) is int or isinstance(offset, Integral)
    if whole and offset >= 0 and offset + rows <= positives:
        return
    if whole and offset == 0:
        raise ValueError(
            f"documents[0], the positives, has {positives} rows, fewer than the {rows} of queries: each needs its own."
        )
    raise ValueError(
        f"row_offset={offset} does not fit: the {rows} rows need positives row_offset .. row_offset + {rows} - 1, and "
        f"documents[0] has {positives} rows."
    )


def _check_all_queries(
    all_queries: Tensor | None, queries: Tensor, positives: int, directions: tuple[str, ...], guided: bool
) -> None:
    if all_queries is not None:
        checks.vectors("all_queries", all_queries)
        checks.alike("all_queries", all_queries, "queries", queries)
        if len(all_queries) != positives:
            raise ValueError(f"all_queries has {len(all_queries)} rows, expected {positives}, as many as documents[0].")
    elif positives != queries.shape[0] and not guided and {"query_to_query", "doc_to_query"} & set(directions):
        raise ValueError(
            f"all_queries is required for directions {directions} when documents[0] has more rows ({positives}) than "
            f"queries ({queries.shape[0]})."
        )


def _check_ids(name: str, ids: Tensor | None, rows: int, device: torch.device, duplicates: str) -> None:
    if ids is None:
        if duplicates != "keep":
            raise ValueError(f"duplicates={duplicates!r} needs {name}, an int64 tensor [{rows}].")
    elif not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {getattr(ids, 'dtype', type(ids))}.")
    elif list(ids.shape) != [rows] or ids.device != device:
        raise ValueError(f"{name} must have shape [{rows}] on {device}, got {list(ids.shape)} on {ids.device}.")


def _prefixes(dims: Any, weights: Any, dimension: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Returns the widths of the prefixes, strictly ascending, and the weight of each; none for whole embeddings."""
    if dims is None:
        if weights is not None:
            raise ValueError("matryoshka_weights was given without matryoshka_dims.")
        return (), ()
    for name, values in (("matryoshka_dims", dims), ("matryoshka_weights", weights)):
        if values is not None and (not isinstance(values, Sequence) or isinstance(values, str)):
            raise TypeError(f"{name} must be a sequence of numbers, got {type(values).__name__}.")
    if not dims:
        raise ValueError("matryoshka_dims is empty: expected at least one width.")
    weights = [1.0] * len(dims) if weights is None else weights
    if len(weights) != len(dims):
        raise ValueError(f"matryoshka_weights has {len(weights)} numbers, expected {len(dims)}, one a width.")
    total: dict[int, float] = {}
    for dim, weight in zip(dims, weights, strict=True):
        width = as_integer(dim)
        if width is None:
            raise TypeError(f"matryoshka_dims must be integers, got {dim!r}.")
        if not 1 <= width <= dimension:
            raise ValueError(f"matryoshka_dims must be in 1 .. {dimension}, the embeddings' dimension; got {dim}.")
        weight = checks.constant("matryoshka_weights", weight)
        if not math.isfinite(weight):
            raise ValueError(f"matryoshka_weights must be finite, got {weight}.")
        total[width] = total.get(width, 0.0) + float(weight)
    widths = tuple(sorted(total))
    return widths, tuple(total[width] for width in widths)


def _guide(
    guide_queries: Tensor | None,
    guide_documents: Any,
    all_queries: Tensor | None,
    queries: Tensor,
    columns: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    if guide_queries is None and guide_documents is None:
        return ()
    if guide_queries is None or guide_documents is None:
        given, missing = ("guide_queries", "guide_documents")[:: 1 if guide_documents is None else -1]
        raise ValueError(f"{given} was given without {missing}: a guide needs both.")
    if all_queries is not None:
        raise ValueError("all_queries cannot be combined with guide_queries: a guide sees the local queries only.")
    checks.vectors("guide_queries", guide_queries)
    guides = checks.columns("guide_documents", guide_documents, "expected the guide's vectors of the documents")
    for name, found, wanted in (
        ("guide_queries", [len(guide_queries)], [len(queries)]),
        ("guide_documents", [len(x) for x in guides], [len(x) for x in columns]),
    ):
        if found != wanted:
            raise ValueError(f"{name} has {found} rows, expected {wanted}.")
    for index, guide in enumerate(guides):
        checks.alike(f"guide_documents[{index}]", guide, "guide_queries", guide_queries)
    if guide_queries.device != queries.device:
        raise ValueError(f"guide_queries is on {guide_queries.device}, expected {queries.device}, that of queries.")
    return guides
