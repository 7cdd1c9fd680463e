"""The C++ kernels at the edges of their tiles: shapes drawn around multiples of vectors, lanes and tiles.

Values against the reference; under `.ci/sanitize`, which asks for many more examples, every access to memory as well.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbert_kernels import angle_loss, contrastive_loss, cosent_loss
from support.gradients import input_gradients

EXAMPLES = int(os.environ.get("TILE_EDGE_EXAMPLES", "15"))
# Around a vector of 4, 8 and 16 floats, kLanes, kTileColumns and kMaxTileRows of csrc/cpu/tile.h.
EDGES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130)
DIRECTIONS = ("query_to_query", "doc_to_query", "doc_to_doc")

edges = st.sampled_from(EDGES)
at_edges = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def vectors(rows: int, dim: int) -> Tensor:
    """No prefix of them is short: the gradient through a norm would be as large as it is small."""
    return ((torch.rand(rows, dim) + 0.5) * torch.randn(rows, dim).sign()).requires_grad_()


def check(loss: Any, tensors: list[Tensor], scale: float, unit: float = 1e-6) -> None:
    """Close to the truth: a multiple of the reference's error in the same type, and the products' rounding of logits.

    The last also where the truth is zero by cancellation, as the gradient of one dimension is through its norm.
    """
    exact = input_gradients(lambda *t: loss(*t, backend="reference"), [t.double() for t in tensors])
    eager = input_gradients(lambda *t: loss(*t, backend="reference"), tensors)
    found = input_gradients(lambda *t: loss(*t, backend="cpu"), tensors)
    for ours, theirs, truth in zip(found, eager, exact, strict=True):
        allowed = 8 * (theirs - truth).abs().max() + unit * (scale + truth.abs().max())
        assert (ours - truth).abs().max() <= allowed


@pytest.mark.parametrize("precision", ["highest", "medium"])
@at_edges
@given(
    rows=edges,
    dim=edges,
    negatives=st.integers(0, 2),
    directions=st.sets(st.sampled_from(DIRECTIONS)),
    duplicates=st.sampled_from(["keep", "mask", "positive"]),
    hardness=st.sampled_from([None, "hard_negatives", "all_negatives"]),
    prefixes=st.booleans(),
    guide=st.sampled_from([0, *EDGES]),
    scale=st.sampled_from([5.0, 20.0]),
    further_rows=st.integers(0, 3),
)
def test_contrastive(
    compiled: None,
    precision: str,
    rows: int,
    dim: int,
    negatives: int,
    directions: set[str],
    duplicates: str,
    hardness: str | None,
    prefixes: bool,
    guide: int,
    scale: float,
    further_rows: int,
) -> None:
    torch.manual_seed(rows * 1000 + dim)
    world = rows + further_rows
    everyone = {} if guide else {"all_queries": vectors(world, dim).detach()}
    if guide and further_rows:
        directions = directions - {"query_to_query", "doc_to_query"}
    ids = torch.randint(0, max(2, rows // 2), (world * (1 + negatives),))
    options: dict[str, Any] = {
        "scale": scale,
        "directions": ("query_to_doc", *sorted(directions)),
        "duplicates": duplicates,
        "query_ids": ids[: rows if guide else world].clone(),
        "document_ids": ids,
        "hardness_mode": hardness,
        "hardness_strength": 2.0,
        "matryoshka_dims": sorted({1, (dim + 1) // 2, dim}) if prefixes else None,
        "row_offset": further_rows,
    }
    others = [torch.randn(world, guide) for _ in range(1 + negatives)]
    tensors = [vectors(rows, dim), *(vectors(world, dim) for _ in range(1 + negatives))]

    def loss(queries: Tensor, *documents: Tensor, backend: str) -> Tensor:
        more = {name: value.to(queries.dtype) for name, value in everyone.items()}
        if guide:
            more["guide_queries"] = others[0][:rows].to(queries.dtype)
            more["guide_documents"] = [other.to(queries.dtype) for other in others]
        return contrastive_loss(queries, documents, backend=backend, **options, **more)

    torch.set_float32_matmul_precision(precision)
    try:
        check(loss, tensors, scale, 1e-6 if precision == "highest" else 2.0**-8)  # that of bfloat16
    finally:
        torch.set_float32_matmul_precision("highest")


@at_edges
@given(rows=edges, dim=edges, columns=st.integers(1, 2), angle=st.booleans(), ties=st.booleans())
def test_ranking_and_pairwise(compiled: None, rows: int, dim: int, columns: int, angle: bool, ties: bool) -> None:
    torch.manual_seed(rows * 1000 + dim)
    count = rows * columns
    labels = torch.randint(0, 3, (count,)) if ties else torch.rand(count)
    tensors = [vectors(rows, dim) for _ in range(1 + columns)]
    operation = angle_loss if angle else cosent_loss
    check(lambda x, *y, backend: operation(x, y, labels, backend=backend), tensors, 20.0)
