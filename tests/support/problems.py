"""Problems of ``contrastive_loss``: its arguments in one dict, of which every tensor gets its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sbert_kernels import contrastive_loss

DIRECTIONS = ("query_to_query", "doc_to_query", "doc_to_doc")


def loss_and_gradients(backend: str, problem: dict[str, Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Returns the loss and the gradients of all tensors that have one, in float64, computed in ``dtype``.

    ``problem`` holds the arguments of ``contrastive_loss``. The gradients are those of the queries, of each column of
    documents, and of ``all_queries``, ``scale`` and ``weights`` where they are tensors. Without ``dtype``, each tensor
    keeps its own.
    """
    # Parameters and weights are wider than embeddings of half precision.
    wide = dtype if dtype is None or dtype.itemsize > 2 else torch.float32
    arguments: dict[str, Any] = {}
    for name, value in problem.items():
        if "ids" in name:
            arguments[name] = value
        elif "guide" in name:
            # Exclusions are decisions: every type has to take them from the same numbers.
            arguments[name] = value if value is None or dtype is None else _cast(value, torch.float32)
        else:
            arguments[name] = _leaves(value, wide if name in ("scale", "weights") else dtype)
    loss = contrastive_loss(backend=backend, **arguments)
    others = (arguments.get(name) for name in ("all_queries", "scale", "weights"))
    leaves = [arguments["queries"], *arguments["documents"], *(x for x in others if isinstance(x, Tensor))]
    return [x.detach().double() for x in (loss, *torch.autograd.grad(loss, leaves))]


def _cast(value: Tensor | list[Tensor], dtype: torch.dtype) -> Tensor | list[Tensor]:
    """Returns a tensor, or a list of them, in ``dtype``."""
    return value.to(dtype) if isinstance(value, Tensor) else [x.to(dtype) for x in value]


def _leaves(value: Any, dtype: torch.dtype | None) -> Any:
    """Returns a tensor, or a list of them, as new leaves of ``dtype`` that have gradients; anything else as it is."""
    if isinstance(value, list):
        return [_leaves(x, dtype) for x in value]
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(dtype or value.dtype).requires_grad_()


def problem_of(
    n: int,
    dim: int,
    columns: int,
    seed: int,
    *,
    offset: int,
    beyond: int,
    guided: bool,
    gathered: bool,
    weighted: bool,
    **options: Any,
) -> dict[str, Any]:
    """Returns arguments of contrastive_loss, in float64, of values that every narrower type holds.

    The rows are those from ``offset`` on of a batch that has so many, and ``beyond``, from other ranks.
    """
    world = offset + n + beyond
    generator = torch.Generator().manual_seed(seed)

    def vectors(rows: int, width: int = dim) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator).bfloat16().double()

    def ids(rows: int) -> torch.Tensor:
        return torch.randint(0, 1 + n // 2, (rows,), generator=generator)

    everyone = vectors(world) if gathered and not guided else None
    problem = {
        "queries": vectors(n),
        "documents": [vectors(world) for _ in range(columns)],
        "all_queries": everyone,
        "row_offset": offset,
        "weights": 0.1 + torch.rand(n, dtype=torch.float64, generator=generator) if weighted else None,
        "query_ids": ids(n if everyone is None else world),
        "document_ids": ids(world * columns),
        **options,
    }
    if guided:
        problem["guide_queries"] = vectors(n, 4)
        problem["guide_documents"] = [vectors(world, 4) for _ in range(columns)]
    return problem


def scale_of(largest_logit: float, similarity: str, dim: int, learnable: bool) -> float | torch.Tensor:
    """Returns a scale that makes the largest logit about so large, as a number or as a tensor."""
    # Dot products grow with the square root of the dimension.
    scale = largest_logit / (1 if similarity == "cos" else math.sqrt(dim))
    return torch.tensor(scale, dtype=torch.float64) if learnable else scale


@st.composite
def problems(draw: st.DrawFn, rows: int, width: int, narrowest_cosine: int = 1) -> dict[str, Any]:
    """Draws arguments of contrastive_loss over its whole option space."""
    similarity = draw(st.sampled_from(["cos", "dot"]))
    narrowest = narrowest_cosine if similarity == "cos" else 1
    n, dim, columns = draw(st.integers(1, rows)), draw(st.integers(narrowest, width)), draw(st.integers(1, 4))
    guided, gathered = draw(st.booleans()), draw(st.booleans())
    partition = draw(st.sampled_from(["joint", "per_direction"]))
    extra = draw(st.sets(st.sampled_from(DIRECTIONS if partition == "joint" else DIRECTIONS[1:2])))
    options: dict[str, Any] = {
        "scale": scale_of(draw(st.sampled_from([0.5, 19.9, 40.1, 95.0, 150.0])), similarity, dim, draw(st.booleans())),
        "similarity": similarity,
        "directions": ("query_to_doc", *sorted(extra)),
        "partition_mode": partition,
        "hardness_mode": draw(st.sampled_from([None, "in_batch_negatives", "hard_negatives", "all_negatives"])),
        "hardness_strength": draw(st.sampled_from([0.0, 3.0])),
        "duplicates": draw(st.sampled_from(["keep", "mask", "positive"])),
    }
    if not guided:
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))
    if draw(st.booleans()):
        widths = st.integers(narrowest, dim)
        prefixes = draw(st.dictionaries(widths, st.sampled_from([1.0, 0.3, -2.0, 0.0]), min_size=1, max_size=8))
        options |= {"matryoshka_dims": list(prefixes), "matryoshka_weights": list(prefixes.values())}
    if guided:
        options["margin_strategy"] = draw(st.sampled_from(["absolute", "relative"]))
        options["margin"] = draw(st.sampled_from([0.0, 0.2, -0.5]))
    return problem_of(
        n,
        dim,
        columns,
        draw(st.integers(0, 2**32)),
        offset=draw(st.integers(0, rows // 4)) if gathered else 0,
        beyond=draw(st.integers(0, rows // 4)) if gathered else 0,
        guided=guided,
        gathered=gathered,
        weighted=draw(st.booleans()),
        **options,
    )
