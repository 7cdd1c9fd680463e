"""MultipleNegativesRankingLoss equals stock for every option, and falls back to stock where it must."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.util import cos_sim, dot_score, pytorch_cos_sim
from torch import Tensor, nn

from sbert_kernels import contrastive_loss, losses, use_backend
from support.embedded import Embedded
from support.gradients import embedding_gradients
from support.numbers import assert_close

DIRECTIONS = [
    ("query_to_doc", *extra)
    for count in range(4)
    for extra in itertools.combinations(("query_to_query", "doc_to_query", "doc_to_doc"), count)
]
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


def embeddings(negatives: int = 0, rows: int = 9, dim: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(negatives)
    return [torch.randn(rows, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2 + negatives)]


@pytest.mark.parametrize("directions", DIRECTIONS, ids=lambda names: "+".join(name[:1] + name[-3:] for name in names))
@pytest.mark.parametrize("similarity", [cos_sim, dot_score])
def test_equals_stock_for_every_option(directions: tuple[str, ...], similarity: Any) -> None:
    same_type = {"query_to_query", "doc_to_doc"} & set(directions)
    modes = ("joint",) if same_type else ("joint", "per_direction")
    for mode, hardness, negatives in itertools.product(modes, HARDNESS, (0, 1, 3)):
        options = {
            "scale": 20.0 if similarity is cos_sim else 0.7,
            "similarity_fct": similarity,
            "directions": directions,
            "partition_mode": mode,
            "hardness_mode": hardness,
            "hardness_strength": 3.0 if hardness else 0.0,
        }
        columns = embeddings(negatives)
        assert_close(
            embedding_gradients(losses.MultipleNegativesRankingLoss(Embedded(), **options), columns),
            embedding_gradients(stock.MultipleNegativesRankingLoss(Embedded(), **options), columns),
        )


@pytest.mark.parametrize("scale", [20.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_error_is_at_most_twice_that_of_stock(scale: float, dtype: torch.dtype) -> None:
    columns = embeddings(negatives=1, rows=48, dim=64, dtype=dtype)
    options = {"scale": scale, "directions": DIRECTIONS[-1]}
    theirs = embedding_gradients(stock.MultipleNegativesRankingLoss(Embedded(), **options), columns)
    exact = embedding_gradients(
        stock.MultipleNegativesRankingLoss(Embedded(), **options), [column.double() for column in columns]
    )
    ours = embedding_gradients(losses.MultipleNegativesRankingLoss(Embedded(), **options), columns)
    for value, other, reference in zip(ours, theirs, exact, strict=True):
        size, eps = reference.abs().max(), torch.finfo(value.dtype).eps
        assert (value - reference).abs().max() / size <= max(2 * (other - reference).abs().max() / size, 2 * eps)


def test_symmetric_equals_stock() -> None:
    ours = losses.MultipleNegativesSymmetricRankingLoss(Embedded(), scale=7.0)
    theirs = stock.MultipleNegativesSymmetricRankingLoss(Embedded(), scale=7.0)
    assert_close(embedding_gradients(ours, embeddings(1)), embedding_gradients(theirs, embeddings(1)))
    assert isinstance(ours, (stock.MultipleNegativesSymmetricRankingLoss, losses.MultipleNegativesRankingLoss))
    with pytest.deprecated_call():
        losses.MultipleNegativesSymmetricRankingLoss(Embedded())


def test_looks_like_stock() -> None:
    ours, theirs = losses.MultipleNegativesRankingLoss(Embedded()), stock.MultipleNegativesRankingLoss(Embedded())
    assert isinstance(ours, stock.MultipleNegativesRankingLoss)
    assert type(ours).__name__ == type(theirs).__name__
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert ours.temperature == theirs.temperature
    assert ours.citation == theirs.citation
    assert list(ours.state_dict()) == list(theirs.state_dict())
    masked = losses.MultipleNegativesRankingLoss(Embedded(), duplicates="mask", scale=nn.Parameter(torch.tensor(9.0)))
    assert masked.get_config_dict() == {**theirs.get_config_dict(), "duplicates": "mask", "scale": 9.0}


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.0},
        {"directions": ()},
        {"directions": ("query_to_cat",)},
        {"directions": ("doc_to_query",)},
        {"partition_mode": "none"},
        {"partition_mode": "per_direction", "directions": DIRECTIONS[-1]},
        {"hardness_mode": "hard"},
        {"hardness_strength": -1.0},
    ],
    ids=str,
)
def test_constructor_errors_are_stock_s(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as theirs:  # noqa: PT011
        stock.MultipleNegativesRankingLoss(Embedded(), **options)
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        losses.MultipleNegativesRankingLoss(Embedded(), **options)
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError, match=r"duplicates must be one of \['keep', 'mask', 'positive'\], got 'drop'"):
        losses.MultipleNegativesRankingLoss(Embedded(), duplicates="drop")


def test_copies_and_assignments_count() -> None:
    loss = losses.MultipleNegativesRankingLoss(nn.Identity())
    loss.scale, loss.similarity_fct, loss.directions = 5.0, dot_score, DIRECTIONS[-1]
    for copied in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        copied.model = Embedded()
        theirs = stock.MultipleNegativesRankingLoss(Embedded(), 5.0, dot_score, directions=DIRECTIONS[-1])
        assert_close(embedding_gradients(copied, embeddings()), embedding_gradients(theirs, embeddings()))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "pytorch_cos_sim"])
def test_other_names_of_cosine_and_dot_are_fused(
    bert: Callable[..., Any], caplog: pytest.LogCaptureFixture, similarity: str
) -> None:
    function = pytorch_cos_sim
    if similarity != "pytorch_cos_sim":
        model = bert()
        model.similarity_fn_name = similarity
        function = model.similarity
    with use_backend("blockwise"):  # raises if stock has to compute
        embedding_gradients(losses.MultipleNegativesRankingLoss(Embedded(), similarity_fct=function), embeddings())
    assert not caplog.records


def test_a_model_s_own_similarity_is_computed_by_stock(
    bert: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Not every method of that name is sentence-transformers' own."""

    class Distance(type(bert())):
        def similarity(self, a: Tensor, b: Tensor) -> Tensor:
            return -torch.cdist(a, b)

    model = bert()
    model.__class__ = Distance
    options = {"similarity_fct": model.similarity, "scale": 1.0}
    ours, theirs = (
        embedding_gradients(module.MultipleNegativesRankingLoss(Embedded(), **options), embeddings())
        for module in (losses, stock)
    )
    assert all(map(torch.equal, ours, theirs))
    assert "is computed by sentence-transformers" in caplog.text


def manhattan(a: Tensor, b: Tensor) -> Tensor:
    return -torch.cdist(a, b, p=1)


def test_a_similarity_of_one_s_own_is_computed_by_stock(caplog: pytest.LogCaptureFixture) -> None:
    options = {"similarity_fct": manhattan, "scale": 1.0}
    ours = losses.MultipleNegativesRankingLoss(Embedded(), **options)
    expected = embedding_gradients(stock.MultipleNegativesRankingLoss(Embedded(), **options), embeddings())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert all(map(torch.equal, embedding_gradients(ours, embeddings()), expected))
    assert [record.message for record in caplog.records] == [
        "MultipleNegativesRankingLoss is computed by sentence-transformers, not by a fused kernel: "
        "similarity_fct=manhattan is neither cos_sim nor dot_score."
    ]
    with use_backend("blockwise"), pytest.raises(ValueError, match="cannot be served by the backend asked for"):
        embedding_gradients(ours, embeddings())


def test_disable_is_stock_bit_for_bit_and_read_per_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    columns = embeddings(1, rows=33, dim=48, dtype=torch.float32)
    ours = losses.MultipleNegativesRankingLoss(Embedded())
    expected = embedding_gradients(stock.MultipleNegativesRankingLoss(Embedded()), columns)
    fused = embedding_gradients(ours, columns)
    monkeypatch.setenv("SBERT_KERNELS_DISABLE", "1")
    assert all(map(torch.equal, embedding_gradients(ours, columns), expected))
    assert not caplog.records
    monkeypatch.delenv("SBERT_KERNELS_DISABLE")
    assert all(map(torch.equal, embedding_gradients(ours, columns), fused))
    assert not all(map(torch.equal, fused, expected))  # or this test could not see the difference


def test_loss_is_float32_under_autocast() -> None:
    columns = embeddings(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = losses.MultipleNegativesRankingLoss(Embedded())([{"embedding": c} for c in columns], None)
    assert ours.dtype == torch.float32


def test_too_few_columns_is_stock_s_error() -> None:
    with pytest.raises(ValueError, match="Expected at least 2 embeddings, got 1"):
        losses.MultipleNegativesRankingLoss(Embedded())([{"embedding": embeddings()[0]}], None)


def test_learnable_scale() -> None:
    """Finite differences, for all directions, where stock's gradient is not a number."""
    columns = embeddings(1)

    def value(scale: Tensor) -> Tensor:
        loss = losses.MultipleNegativesRankingLoss(Embedded(), scale=scale, directions=DIRECTIONS[-1])
        return loss([{"embedding": column} for column in columns], None)

    assert torch.autograd.gradcheck(value, (torch.tensor(9.0, dtype=torch.float64, requires_grad=True),))
    scale = nn.Parameter(torch.tensor(9.0, dtype=torch.float64))
    loss = losses.MultipleNegativesRankingLoss(Embedded(), scale=scale, directions=DIRECTIONS[-1])
    assert dict(loss.named_parameters()) == {"scale": scale}
    (loss([{"embedding": column} for column in columns], None) * 65536 / 4).backward()
    (gradient,) = torch.autograd.grad(value(scale), scale)
    torch.testing.assert_close(scale.grad, gradient * 65536 / 4)


@pytest.mark.parametrize("scale", [torch.full((1,), 9.0), torch.tensor(9), nn.Parameter(torch.full((1,), 9.0))])
def test_scale_tensors_that_stock_takes(scale: Tensor) -> None:
    expected = embedding_gradients(stock.MultipleNegativesRankingLoss(Embedded(), scale=9.0), embeddings())
    assert_close(
        embedding_gradients(losses.MultipleNegativesRankingLoss(Embedded(), scale=scale), embeddings()), expected
    )
    if scale.requires_grad:
        assert scale.grad.shape == (1,)


def test_threads_share_a_loss(bert: Callable[..., Any]) -> None:
    """Each forward pass knows its own texts."""
    model = bert()
    loss = losses.MultipleNegativesRankingLoss(model, duplicates="mask")
    batches = [
        [model.preprocess(["a", "b", "c"]), model.preprocess(texts)]
        for texts in (["x", "x", "y"], ["x", "y", "z"], ["z", "z", "z"])
    ]

    def value(features: Any) -> float:
        with torch.no_grad():
            return loss([dict(column) for column in features], None).item()

    expected = [value(features) for features in batches]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(value, batches * 10)) == pytest.approx(expected * 10)


def test_duplicates_of_the_positive_s_text(bert: Callable[..., Any]) -> None:
    """Equal texts in a batch, against the dense formula; whatever the tokenizer pads them to."""
    model = bert()
    queries = ["one", "two", "three", "four"]
    documents = ["same text", "another", "same text", "a third, longer, text"]
    features = [model.preprocess(queries), model.preprocess(documents)]
    with torch.no_grad():
        q, d = (F.normalize(model(dict(column))["sentence_embedding"]) for column in features)
    logits, rows = 20 * q @ d.T, torch.arange(4)
    masked = logits.clone()
    masked[0, 2] = masked[2, 0] = -torch.inf
    expected = {
        "keep": F.cross_entropy(logits, rows),
        "mask": F.cross_entropy(masked, rows),
        "positive": (logits.logsumexp(1) - (logits.diagonal() + logits[rows, torch.tensor([2, 1, 0, 3])]) / 2).mean(),
    }
    for duplicates, value in expected.items():
        loss = losses.MultipleNegativesRankingLoss(model, duplicates=duplicates)
        torch.testing.assert_close(loss([dict(column) for column in features], None), value)


@pytest.mark.parametrize("cls", [losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss])
def test_queries_may_be_images_where_only_documents_are_compared(cls: Any) -> None:
    """(image, caption) pairs: the captions' ids do, unless the queries are candidates as well."""
    images, captions = embeddings()
    ids = torch.arange(len(captions)) // 2
    features = [
        {"embedding": images, "pixel_values": torch.zeros(len(images), 3, 2, 2)},
        {"embedding": captions, "input_ids": ids[:, None]},
    ]
    for duplicates in ("mask", "positive"):
        value = cls(Embedded(), duplicates=duplicates)(features, None)
        expected = contrastive_loss(images, [captions], document_ids=ids, duplicates=duplicates)
        torch.testing.assert_close(value.detach(), expected)
    for direction in ("query_to_query", "doc_to_query"):
        loss = cls(Embedded(), duplicates="mask", directions=("query_to_doc", direction))
        with pytest.raises(ValueError, match=r"column 0 of the batch has no 'input_ids', only \['embedding', 'pixel_v"):
            loss(features, None)


def test_disable_needs_no_texts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SBERT_KERNELS_DISABLE", "1")
    masked = embedding_gradients(losses.MultipleNegativesRankingLoss(Embedded(), duplicates="mask"), embeddings())
    plain = embedding_gradients(stock.MultipleNegativesRankingLoss(Embedded()), embeddings())
    assert all(map(torch.equal, masked, plain))
    assert "stock does not honour duplicates='mask'" in caplog.text


def test_duplicates_need_the_texts() -> None:
    loss = losses.MultipleNegativesRankingLoss(Embedded(), duplicates="mask")
    with pytest.raises(ValueError, match=r"column 1 of the batch has no 'input_ids', only \['embedding'\]"):
        loss([{"embedding": column} for column in embeddings()], None)
    with pytest.raises(ValueError, match="which only forward"):
        loss.compute_loss_from_embeddings(embeddings())
    loss.similarity_fct = manhattan
    with pytest.raises(ValueError, match="cannot combine duplicates='mask' with a stock computation"):
        loss.compute_loss_from_embeddings(embeddings())
