"""MatryoshkaLoss equals stock for every inner loss and option, in one call where it can, and as stock where it must."""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn

from sbert_kernels import losses, patch, use_backend
from support.contrastive import ALL_DIRECTIONS
from support.gradients import embedding_gradients, step
from support.numbers import assert_close
from support.texts import text_features

DIMS = ([32, 12, 5], [1, 0.3, -2.0])
INNER = {
    "MultipleNegativesRankingLoss": {},
    "MultipleNegativesSymmetricRankingLoss": {},
    "GISTEmbedLoss": {},
    "CachedMultipleNegativesRankingLoss": {"mini_batch_size": 3},
    "CachedMultipleNegativesSymmetricRankingLoss": {"mini_batch_size": 3},
    "CachedGISTEmbedLoss": {"mini_batch_size": 3},
}


def inner(module: Any, name: str, model: Any, guide: Any, **options: Any) -> nn.Module:
    arguments = (model, guide) if "GIST" in name else (model,)
    return getattr(module, name)(*arguments, **INNER[name], **options)


def shifted(guide: nn.Module) -> nn.Module:
    """A guide that thinks otherwise than the model."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return guide


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...] | None]:
    """The prefixes of every call of the operation that a loss makes."""
    made: list[tuple[int, ...] | None] = []
    for name in ("multiple_negatives_ranking", "gist_embed"):
        module = importlib.import_module(f"sbert_kernels.losses.{name}")

        def counted(*args: Any, operation: Any = module.contrastive_loss, **options: Any) -> Tensor:
            made.append(options["matryoshka_dims"])
            return operation(*args, **options)

        monkeypatch.setattr(module, "contrastive_loss", counted)
    return made


class Sized(nn.Sequential):
    """Returns embeddings that exist already, and counts how often."""

    def __init__(self, dim: int | None = 8) -> None:
        super().__init__(nn.Identity())
        self.dim, self.embedded = dim, 0

    def get_embedding_dimension(self) -> int | None:
        return self.dim

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        self.embedded += 1
        features["sentence_embedding"] = features["embedding"]
        return features


def embeddings(columns: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(columns)
    return [torch.randn(9, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(columns)]


def loss_stage(loss: nn.Module, columns: list[Tensor]) -> list[Tensor]:
    reps = [[part.clone().requires_grad_() for part in column.split(4)] for column in columns]
    value = loss.loss.calculate_loss(reps, with_backward=True)
    assert not value.requires_grad
    return [value, *(torch.cat([part.grad for part in column]) for column in reps)]


MNR_OPTIONS = [
    {"similarity_fct": similarity, "scale": scale, "directions": directions, "partition_mode": mode}
    | ({"hardness_mode": hardness, "hardness_strength": 3.0} if hardness else {})
    for (similarity, scale), (directions, mode), hardness in itertools.product(
        [(cos_sim, 20.0), (dot_score, 7.0)],
        [
            (ALL_DIRECTIONS[:1], "joint"),
            (ALL_DIRECTIONS, "joint"),
            (("query_to_doc", "doc_to_query"), "joint"),
            (("query_to_doc", "doc_to_query"), "per_direction"),
        ],
        [None, "in_batch_negatives", "hard_negatives", "all_negatives"],
    )
]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_equals_stock_for_every_option_of_mnr(calls: list[Any], cached: bool, gather: bool) -> None:
    """dot_score as well, which stock gives normalised prefixes; in one call."""
    name, run = "MultipleNegativesRankingLoss", embedding_gradients
    if cached:
        name, run = f"Cached{name}", loss_stage
    for options, dims in itertools.product(MNR_OPTIONS, [([3, 8, 1], [1, -0.5, 2]), ([4, 4, 2], None)]):
        ours, theirs = (
            run(shared(module, name, dims, gather_across_devices=gather, **options), embeddings())
            for module in (losses, stock)
        )
        assert_close(ours, theirs)
        assert calls.pop() == tuple(sorted(dims[0], reverse=True))
        assert not calls


def shared(module: Any, name: str, dims: tuple[Any, Any], **options: Any) -> nn.Module:
    """A MatryoshkaLoss and an inner loss on the same model."""
    model = Sized()
    return module.MatryoshkaLoss(model, getattr(module, name)(model, **options), *dims)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("per_step", [-1, 1, 2])
def test_equals_stock_on_text(
    bert: Callable[..., Any],
    calls: list[Any],
    name: str,
    columns: int,
    per_step: int,
) -> None:
    """Three steps from one seed: the same prefixes are drawn in each, and so is whatever is drawn after."""
    model, guide = bert(), shifted(bert())
    results, drawn = [], []
    for module in (stock, losses):
        loss = module.MatryoshkaLoss(model, inner(module, name, model, guide), *DIMS, per_step)
        random.seed(7)
        results.append([x for _ in range(3) for x in step(loss, text_features(model, columns=columns), factor=0.5)])
        drawn.append(random.random())
    assert_close(*results, replayed="Cached" in name)
    assert drawn[0] == drawn[1]
    assert [len(dims) for dims in calls] == [per_step if per_step > 0 else 3] * 3


GIST_OPTIONS = [
    {"contrast_anchors": anchors, "contrast_positives": positives, "margin_strategy": strategy, "margin": margin}
    for anchors, positives, (strategy, margin) in itertools.product(
        (True, False), (True, False), [("absolute", 0.0), ("absolute", 0.2), ("relative", 0.1), ("absolute", 3.0)]
    )
]


@pytest.mark.parametrize("name", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_equals_stock_for_every_option_of_gist(
    bert: Callable[..., Any],
    name: str,
) -> None:
    model, guide = bert(), shifted(bert())
    for options in GIST_OPTIONS[:: 3 if "Cached" in name else 1]:
        results = [
            step(
                module.MatryoshkaLoss(model, inner(module, name, model, guide, **options), *DIMS),
                text_features(model, 7, 3),
            )
            for module in (stock, losses)
        ]
        assert_close(*results, replayed="Cached" in name)


@pytest.mark.parametrize("name", INNER)
def test_evaluation_has_no_graph(bert: Callable[..., Any], name: str) -> None:
    model = bert().eval()
    values = []
    for module in (stock, losses):
        loss = module.MatryoshkaLoss(model, inner(module, name, model, bert()), *DIMS).eval()
        with torch.no_grad():
            values.append([loss(text_features(model), None)])
        assert not values[-1][0].requires_grad
    assert_close(*values)


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
@pytest.mark.parametrize("duplicates", ["mask", "positive"])
def test_duplicates_count_in_every_prefix(bert: Callable[..., Any], name: str, duplicates: str) -> None:
    """As stock's wrapper around the same drop-in has it."""
    model = bert()
    features = [model.preprocess(["a", "b", "c", "a"]), model.preprocess(["same", "other", "same", "last one"])]
    results = [
        step(
            module.MatryoshkaLoss(
                model, inner(losses, name, model, None, directions=ALL_DIRECTIONS, duplicates=option), *DIMS
            ),
            features,
        )
        for module, option in ((losses, duplicates), (stock, duplicates), (stock, "keep"))
    ]
    assert_close(*results[:2], replayed="Cached" in name)
    assert not torch.allclose(results[0][0], results[2][0])


def test_embeds_once_and_leaves_the_whole_embedding(calls: list[Any]) -> None:
    model = Sized()
    loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [8, 4, 2])
    features = [{"embedding": column} for column in embeddings()]
    seen: list[Any] = []
    loss.loss.register_forward_hook(lambda module, args, output: seen.append(output))
    value = loss(features, None)
    assert model.embedded == 3
    assert calls == [(8, 4, 2)]
    assert seen == [value]
    for column in features:
        assert column["sentence_embedding"] is column["embedding"]


def test_a_prefix_of_zeros_is_a_zero_vector() -> None:
    """The value is stock's. The gradient of such a slice is that of one normalisation; stock multiplies it by 1e12."""
    columns = embeddings(2)
    columns[0][3, :4] = 0
    columns[1][5] = 0
    ours, theirs = (
        embedding_gradients(shared(module, "MultipleNegativesRankingLoss", ([8, 4], None)), columns)
        for module in (losses, stock)
    )
    assert_close(ours[:1], theirs[:1])
    others = [row for row in range(9) if row not in (3, 5)]
    assert_close([x[others] for x in ours[1:]], [x[others] for x in theirs[1:]])
    assert all(x.isfinite().all() for x in ours)


def test_half_precision_is_no_worse_than_stock() -> None:
    columns = embeddings(3, torch.bfloat16)
    exact = embedding_gradients(
        shared(stock, "MultipleNegativesRankingLoss", ([8, 4], None)), [column.double() for column in columns]
    )
    ours, theirs = (
        embedding_gradients(shared(module, "MultipleNegativesRankingLoss", ([8, 4], None)), columns)
        for module in (losses, stock)
    )
    for value, other, reference in zip(ours, theirs, exact, strict=True):
        size, eps = reference.abs().max(), torch.finfo(value.dtype).eps
        assert (value - reference).abs().max() / size <= max(2 * (other - reference).abs().max() / size, 2 * eps)


class Doubled(losses.MultipleNegativesRankingLoss):
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        return 2 * super().compute_loss_from_embeddings(embeddings, labels)


def manhattan(a: Tensor, b: Tensor) -> Tensor:
    return -torch.cdist(a, b, p=1)


def test_overridden_methods_see_every_prefix(calls: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    model = Sized()
    ours = losses.MatryoshkaLoss(model, Doubled(model), [8, 4])
    theirs = shared(stock, "MultipleNegativesRankingLoss", ([8, 4], [2, 2]))
    for _ in range(2):
        assert_close(embedding_gradients(ours, embeddings()), embedding_gradients(theirs, embeddings()))
    assert calls == [None] * 4
    assert [record.message for record in caplog.records if "losses" in record.name] == [
        "Doubled in a MatryoshkaLoss is computed one prefix at a time: its compute_loss_from_embeddings was overridden."
    ]


def test_an_overridden_loss_stage_sees_every_prefix(calls: list[Any]) -> None:
    """In a subclass, or on the instance."""

    class Mine(losses.CachedMultipleNegativesRankingLoss):
        def calculate_loss(self, reps: Any, labels: Any = None, *, with_backward: bool = False) -> Tensor:
            return super().calculate_loss(reps, labels, with_backward=with_backward)

    replaced = losses.CachedMultipleNegativesRankingLoss(Sized())
    stage = replaced.calculate_loss
    replaced.calculate_loss = lambda *args, **kwargs: stage(*args, **kwargs)
    expected = loss_stage(
        stock.MatryoshkaLoss(Sized(), stock.CachedMultipleNegativesRankingLoss(Sized()), [8, 4]), embeddings()
    )
    for loss in (Mine(Sized()), replaced):
        assert_close(loss_stage(losses.MatryoshkaLoss(Sized(), loss, [8, 4]), embeddings()), expected)
    assert calls == [None] * 4


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_a_similarity_of_one_s_own_is_computed_by_stock(caplog: pytest.LogCaptureFixture, name: str) -> None:
    run = loss_stage if "Cached" in name else embedding_gradients
    options = {"similarity_fct": manhattan, "scale": 1.0}
    ours, theirs = (run(shared(m, name, ([8, 4], None), **options), embeddings()) for m in (losses, stock))
    assert all(map(torch.equal, ours, theirs))
    assert "similarity_fct=manhattan is neither cos_sim nor dot_score" in caplog.text
    with use_backend("blockwise"), pytest.raises(ValueError, match="cannot be served by the backend asked for"):
        run(shared(losses, name, ([8, 4], None), **options), embeddings())


def test_another_model_is_not_truncated(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = (
        embedding_gradients(
            module.MatryoshkaLoss(Sized(), module.MultipleNegativesRankingLoss(Sized()), [8, 4]), embeddings()
        )
        for module in (losses, stock)
    )
    assert_close(ours, theirs)
    assert "its model is not the one given to MatryoshkaLoss" in caplog.text


@pytest.mark.parametrize("cached", [False, True])
def test_a_guide_that_is_the_model_is_truncated_where_stock_truncates_it(
    bert: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    cached: bool,
) -> None:
    name = "CachedGISTEmbedLoss" if cached else "GISTEmbedLoss"
    model = bert()
    # A margin that no rounding decides: the guide's similarities are those that are trained.
    results = [
        step(module.MatryoshkaLoss(model, inner(module, name, model, model, margin=0.01), *DIMS), text_features(model))
        for module in (stock, losses)
    ]
    assert_close(*results, replayed=cached)
    assert ("its guide is the model itself" in caplog.text) == (not cached)


@pytest.mark.parametrize("weight", [torch.tensor(2.0, dtype=torch.float64, requires_grad=True), float("nan")])
def test_weights_that_are_no_finite_constants_are_stock_s(caplog: pytest.LogCaptureFixture, weight: Any) -> None:
    results = []
    for module in (losses, stock):
        results.append(
            embedding_gradients(shared(module, "MultipleNegativesRankingLoss", ([8, 4], [1.0, weight])), embeddings())
        )
        if isinstance(weight, Tensor):
            results[-1].append(weight.grad)
            weight.grad = None
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    reason = " are learnable" if isinstance(weight, Tensor) else "=[1.0, nan] are not all finite numbers"
    assert f"matryoshka_weights{reason}" in caplog.text


def test_other_inner_losses_are_stock_s_business(calls: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    results = []
    for module in (losses, stock):
        model = Sized()
        leaves = [column.clone().requires_grad_() for column in embeddings(2)]
        loss = module.MatryoshkaLoss(model, stock.CoSENTLoss(model), [8, 4])
        value = loss([{"embedding": leaf} for leaf in leaves], torch.arange(9.0))
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *results))
    assert not calls
    assert not caplog.records


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_disable_is_stock_bit_for_bit_and_read_per_call(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    run = loss_stage if "Cached" in name else embedding_gradients
    columns = embeddings(3, torch.float32)
    ours, theirs = (shared(module, name, ([8, 4, 3], None)) for module in (losses, stock))
    expected, fused = run(theirs, columns), run(ours, columns)
    monkeypatch.setenv("SBERT_KERNELS_DISABLE", "1")
    assert all(map(torch.equal, run(ours, columns), expected))
    monkeypatch.delenv("SBERT_KERNELS_DISABLE")
    assert all(map(torch.equal, run(ours, columns), fused))
    assert not all(map(torch.equal, fused, expected))  # or this test could not see the difference


@pytest.mark.parametrize("dims", [-1, 2])
@pytest.mark.parametrize("layers", [-1, 1])
def test_matryoshka_2d_equals_stock(
    bert: Callable[..., Any],
    calls: list[Any],
    dims: int,
    layers: int,
) -> None:
    """patch() puts the MatryoshkaLoss inside it."""
    model = bert()

    def run() -> list[Tensor]:
        random.seed(3)
        loss = stock.Matryoshka2dLoss(
            model, stock.MultipleNegativesRankingLoss(model), *DIMS, n_layers_per_step=layers, n_dims_per_step=dims
        )
        return step(loss, text_features(model, columns=3))

    expected = run()
    with patch():
        assert type(stock.Matryoshka2dLoss(model, nn.Identity(), [32]).loss) is losses.MatryoshkaLoss
        assert_close(run(), expected)
    assert [len(prefixes) for prefixes in calls] == [3 if dims == -1 else dims] * (3 if layers == -1 else 2)


@pytest.mark.parametrize("name", INNER)
def test_copies_stay_fused(
    bert: Callable[..., Any],
    calls: list[Any],
    name: str,
) -> None:
    model = bert()
    loss = losses.MatryoshkaLoss(model, inner(losses, name, model, bert()), *DIMS)
    expected = step(loss, text_features(model))
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert_close(step(copied, text_features(model)), expected)
    assert [len(dims) for dims in calls] == [3] * 3


def test_a_cached_loss_that_is_pickled_while_patched_loads_as_stock() -> None:
    with patch():
        data = pickle.dumps(shared(stock, "CachedMultipleNegativesRankingLoss", ([8, 4], None)))
    assert b"sbert_kernels" not in data


def test_wrapped_twice_equals_stock() -> None:
    """The decorator of one wrapper is what the other decorates."""
    results = []
    for module in (losses, stock):
        cached = module.CachedMultipleNegativesRankingLoss(Sized())
        module.MatryoshkaLoss(Sized(), cached, [4, 2])
        results.append(loss_stage(module.MatryoshkaLoss(Sized(), cached, [8, 5]), embeddings()))
    assert_close(*results)


def test_looks_like_stock(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = (
        shared(module, "MultipleNegativesRankingLoss", ([4, 8, 2], [1, 2, 3])) for module in (losses, stock)
    )
    assert isinstance(ours, stock.MatryoshkaLoss)
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert ours.citation == theirs.citation
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for dims in ([], [0], [16], [8, -1]):
        messages = []
        for module in (losses, stock):
            with pytest.raises(ValueError) as raised:  # noqa: PT011
                shared(module, "MultipleNegativesRankingLoss", (dims, None))
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


def test_dims_beyond_the_embedding_are_an_error() -> None:
    """Where the model does not know its dimension, they show when it embeds."""
    model = Sized(dim=None)
    loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [16, 4])
    with pytest.raises(ValueError, match=r"matryoshka_dims must be in 1 \.\. 8, .* got 16"):
        embedding_gradients(loss, embeddings())


@pytest.mark.parametrize("dims", [[torch.tensor(8), torch.tensor(3)], [8, True]], ids=repr)
def test_dims_are_whatever_stock_takes_as_integers(dims: list[Any]) -> None:
    ours, theirs = (
        embedding_gradients(shared(module, "MultipleNegativesRankingLoss", (dims, None)), embeddings(2))
        for module in (losses, stock)
    )
    assert_close(ours, theirs)
