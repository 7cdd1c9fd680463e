"""Bad input gives an error that names the argument, what came and what was wanted, whichever backend would serve."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sbert_kernels import angle_loss, contrastive_loss, cosent_loss, pairwise_similarity, ranking_loss
from support.contrastive import ALL_DIRECTIONS

ROWS, OTHER = torch.randn(4, 3), torch.randn(4, 5)
CONTRASTIVE = [
    ({"queries": [[1.0]]}, TypeError, "queries must be a tensor, got list"),
    ({"queries": ROWS[0]}, ValueError, r"queries must have shape \[rows, dimension\] and not be empty, got \[3\]"),
    ({"queries": ROWS[:0]}, ValueError, r"queries must have shape \[rows, dimension\] and not be empty, got \[0, 3\]"),
    ({"queries": ROWS.long()}, TypeError, "queries must be float64, float32, float16 or bfloat16, got torch.int64"),
    ({"queries": ROWS.to_sparse()}, TypeError, "queries must be a dense tensor, got layout torch.sparse_coo"),
    ({"documents": []}, ValueError, "documents is empty"),
    ({"documents": None}, TypeError, "documents must be a tensor or a sequence of tensors, got NoneType"),
    ({"documents": OTHER}, ValueError, r"documents\[0\] has dimension 5, expected 3, that of queries"),
    (
        {"documents": [ROWS, ROWS.double()]},
        ValueError,
        r"documents\[1\] has dtype torch.float64, expected torch.float32",
    ),
    ({"documents": ROWS.to("meta")}, ValueError, r"documents\[0\] has device meta, expected cpu, that of queries"),
    (
        {"documents": ROWS[:3]},
        ValueError,
        r"documents\[0\], the positives, has 3 rows, fewer than the 4 of queries: each needs its own",
    ),
    ({"documents": ROWS[:3], "row_offset": 1}, ValueError, "row_offset=1 does not fit: the 4 rows need positives"),
    ({"row_offset": -1}, ValueError, "row_offset=-1 does not fit"),
    ({"scale": math.nan}, ValueError, "scale must be a positive finite number, got nan"),
    ({"scale": "20"}, TypeError, "scale must be a number, got '20'"),
    ({"margin": None}, TypeError, "margin must be a number, got None"),
    ({"scale": torch.tensor(0.0)}, ValueError, "scale must be a positive finite number, got 0.0"),
    ({"scale": torch.ones(1)}, ValueError, r"scale must be a number or a 0-d floating-point tensor, got \[1\]"),
    ({"similarity": "euclid"}, ValueError, r"similarity must be one of \['cos', 'dot'\], got 'euclid'"),
    ({"directions": ("query_to_dog",)}, ValueError, "directions must be one of .* got 'query_to_dog'"),
    ({"directions": ("doc_to_query",)}, ValueError, "directions must contain 'query_to_doc'"),
    (
        {"directions": ALL_DIRECTIONS, "partition_mode": "per_direction"},
        ValueError,
        r"partition_mode='per_direction' needs directions with the positive pair; \['query_to_query', 'doc_to_doc'\]",
    ),
    ({"partition_mode": "both"}, ValueError, "partition_mode must be one of"),
    ({"hardness_mode": "hard"}, ValueError, "hardness_mode must be one of"),
    ({"hardness_strength": -1.0}, ValueError, "hardness_strength must be a number >= 0, got -1.0"),
    (
        {"hardness_strength": torch.tensor(1.0, requires_grad=True)},
        ValueError,
        "hardness_strength requires a gradient, which it does not get",
    ),
    ({"margin": torch.ones(2)}, TypeError, r"margin must be a number, got Tensor of shape \[2\]"),
    ({"weights": torch.ones(3)}, ValueError, r"weights must have shape \[4\] on cpu, got \[3\]"),
    (
        {"weights": torch.ones(4).long()},
        TypeError,
        "weights must be float64, float32, float16 or bfloat16, got torch.int64",
    ),
    ({"duplicates": "drop"}, ValueError, "duplicates must be one of"),
    ({"duplicates": "mask"}, ValueError, r"duplicates='mask' needs document_ids, an int64 tensor \[4\]"),
    ({"document_ids": torch.arange(5)}, ValueError, r"document_ids must have shape \[4\] on cpu, got \[5\]"),
    ({"document_ids": torch.arange(4).int()}, TypeError, "document_ids must be an int64 tensor, got torch.int32"),
    ({"guide_queries": ROWS}, ValueError, "guide_queries was given without guide_documents"),
    (
        {"guide_queries": ROWS, "guide_documents": ROWS[:2]},
        ValueError,
        r"guide_documents has \[2\] rows, expected \[4\]",
    ),
    (
        {"guide_queries": ROWS, "guide_documents": OTHER},
        ValueError,
        r"guide_documents\[0\] has dimension 5, expected 3, that of guide_queries",
    ),
    (
        {"guide_queries": ROWS, "guide_documents": ROWS, "all_queries": ROWS},
        ValueError,
        "all_queries cannot be combined with guide_queries",
    ),
    ({"margin_strategy": "none"}, ValueError, "margin_strategy must be one of"),
    ({"margin": math.nan}, ValueError, "margin must be a finite number, got nan"),
    ({"all_queries": torch.randn(5, 3)}, ValueError, "all_queries has 5 rows, expected 4"),
    (
        {"documents": torch.randn(8, 3), "directions": ("query_to_doc", "doc_to_query")},
        ValueError,
        "all_queries is required for directions",
    ),
    ({"matryoshka_weights": [1.0]}, ValueError, "matryoshka_weights was given without matryoshka_dims"),
    ({"matryoshka_dims": []}, ValueError, "matryoshka_dims is empty"),
    ({"matryoshka_dims": 2}, TypeError, "matryoshka_dims must be a sequence of numbers, got int"),
    ({"matryoshka_dims": [2.5]}, TypeError, "matryoshka_dims must be integers, got 2.5"),
    ({"matryoshka_dims": ["2"]}, TypeError, "matryoshka_dims must be integers, got '2'"),
    ({"matryoshka_dims": [2, 4]}, ValueError, r"matryoshka_dims must be in 1 \.\. 3, .* got 4"),
    ({"matryoshka_dims": [0]}, ValueError, r"matryoshka_dims must be in 1 \.\. 3, .* got 0"),
    (
        {"matryoshka_dims": [2, 3], "matryoshka_weights": [1.0]},
        ValueError,
        "matryoshka_weights has 1 numbers, expected 2, one a width",
    ),
    (
        {"matryoshka_dims": [2], "matryoshka_weights": [torch.tensor(1.0, requires_grad=True)]},
        ValueError,
        "matryoshka_weights requires a gradient, which it does not get",
    ),
    (
        {"matryoshka_dims": [2], "matryoshka_weights": [math.inf]},
        ValueError,
        "matryoshka_weights must be finite, got inf",
    ),
    ({"backend": "cuda11"}, ValueError, "backend='cuda11' is not a backend: expected one of"),
]
SCORES, LABELS = torch.randn(4), torch.arange(4)
RANKING = [
    ({"scores": [1.0]}, TypeError, "scores must be a tensor, got list"),
    ({"scores": SCORES.long()}, TypeError, "scores must be float64, float32, float16 or bfloat16, got torch.int64"),
    ({"scores": ROWS}, ValueError, r"scores must have shape \[pairs\], got \[4, 3\]"),
    ({"labels": [1, 2, 3, 4]}, TypeError, "labels must be a dense tensor of real numbers, got list"),
    ({"labels": LABELS.to(torch.complex64)}, TypeError, "labels must be a dense .*, got torch.complex64"),
    ({"labels": LABELS.to_sparse()}, TypeError, "labels must be a dense .*, got torch.int64, torch.sparse_coo"),
    ({"labels": LABELS[:3]}, ValueError, r"labels must have shape \[4\] or \[4, 1\] on cpu, .* got \[3\] on cpu"),
    ({"labels": LABELS[None]}, ValueError, r"labels must have shape \[4\] or \[4, 1\] .* got \[1, 4\] on cpu"),
    ({"labels": LABELS.to("meta")}, ValueError, r"labels must have shape .* on cpu, .* got \[4\] on meta"),
    (
        {"labels": torch.tensor([1.0, math.nan, 2.0, math.nan])},
        ValueError,
        "labels must be numbers that can be ordered, got 2 NaN among 4",
    ),
    ({"scale": "hot"}, TypeError, "scale must be a number, got 'hot'"),
    ({"scale": torch.ones(2)}, ValueError, r"scale must be a number or a 0-d .* got \[2\] of torch.float32"),
    ({"scale": torch.tensor(20)}, ValueError, r"scale must be a number or a 0-d .* got \[\] of torch.int64"),
    ({"scale": math.inf}, ValueError, "scale must be a finite number, got inf"),
    ({"scale": torch.tensor(math.nan)}, ValueError, "scale must be a finite number, got nan"),
    ({"weights": torch.ones(3)}, ValueError, r"weights must have shape \[4\] on cpu, got \[3\] on cpu"),
    ({"weights": torch.ones(4).int()}, TypeError, "weights must be float64, float32, .* got torch.int32"),
    (
        {"weights": torch.tensor([1.0, -2.0, 0.0, 3.0])},
        ValueError,
        r"weights must be finite and >= 0, got values in -2.0 .. 3.0",
    ),
    ({"weights": torch.tensor([1.0, math.inf, 0.0, 3.0])}, ValueError, "weights must be finite and >= 0, .* inf"),
    ({"weights": torch.tensor([1.0, math.nan, 0.0, 3.0])}, ValueError, "weights must be finite and >= 0, .* nan"),
    ({"weights": torch.ones(4).to_sparse()}, TypeError, "weights must be a dense tensor, got layout torch.sparse_coo"),
    ({"backend": "cuda11"}, ValueError, "backend='cuda11' is not a backend: expected one of"),
]
PAIRWISE = [
    ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    ({"x": ROWS[0]}, ValueError, r"x must have shape \[rows, dimension\], got \[3\]"),
    ({"x": ROWS[:, :0]}, ValueError, r"x must have shape \[rows, dimension\], got \[4, 0\]"),
    ({"x": ROWS.to_sparse()}, TypeError, "x must be a dense tensor, got layout torch.sparse_coo"),
    ({"y": []}, ValueError, "y is empty: expected the partners of x"),
    ({"y": OTHER}, ValueError, r"y\[0\] has dimension 5, expected 3, that of x"),
    ({"y": [ROWS, ROWS.double()]}, ValueError, r"y\[1\] has dtype torch.float64, expected torch.float32, that of x"),
    ({"y": [ROWS, ROWS[:3]]}, ValueError, r"y\[1\] has 3 rows, expected 4, one for each of x"),
    ({"similarities": 3}, TypeError, "similarities must be a name or a sequence of names, got int"),
    ({"similarities": "cosine"}, ValueError, r"similarities must be one of \['cos', 'dot', 'angle'\], got 'cosine'"),
    ({"similarities": ()}, ValueError, r"similarities must be different names, at least one, got \[\]"),
    ({"similarities": ("cos", "cos")}, ValueError, "similarities must be different names, at least one, got"),
]


def ids(table: list[Any]) -> list[str]:
    return [message[:40] for _, _, message in table]


@pytest.fixture(params=["blockwise", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("arguments", "error", "message"), CONTRASTIVE, ids=ids(CONTRASTIVE))
def test_of_the_contrastive_loss(backend: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"queries": ROWS, "documents": ROWS, "backend": backend, **arguments}
    with pytest.raises(error, match=message):
        contrastive_loss(**arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), RANKING, ids=ids(RANKING))
def test_of_the_ranking_loss(backend: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"scores": SCORES, "labels": LABELS, "backend": backend, **arguments}
    with pytest.raises(error, match=message):
        ranking_loss(**arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), PAIRWISE, ids=ids(PAIRWISE))
def test_of_the_pairwise_similarities(
    backend: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"x": ROWS, "y": ROWS, "backend": backend, **arguments}
    with pytest.raises(error, match=message):
        pairwise_similarity(**arguments)


@pytest.mark.parametrize("loss", [cosent_loss, angle_loss])
def test_of_losses_from_embeddings(backend: str, loss: Any) -> None:
    with pytest.raises(ValueError, match=r"labels must have shape \[8\] or \[8, 1\] on cpu, as the scores, got \[4\]"):
        loss(ROWS, [ROWS, ROWS], LABELS, backend=backend)
