"""GISTEmbedLoss and CachedGISTEmbedLoss equal stock, and leave what a user replaced to stock."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import sentence_transformers
import torch
from packaging.version import Version
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor, nn

from sbert_kernels import losses, use_backend
from support.embedded import Embedded
from support.gradients import embedding_gradients, step
from support.numbers import assert_close
from support.texts import text_features

OPTIONS = [
    {"contrast_anchors": anchors, "contrast_positives": positives, "margin_strategy": strategy, "margin": margin}
    for anchors, positives, (strategy, margin) in itertools.product(
        (True, False),
        (True, False),
        [("absolute", 0.0), ("absolute", 0.1), ("absolute", -0.7), ("relative", 0.05), ("relative", -0.5)],
    )
]


def inputs(columns: int, ties: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Embeddings of the model and of the guide; with ties, rows that are the same text."""
    generator = torch.Generator().manual_seed(columns)
    model = [torch.randn(11, 6, generator=generator, dtype=torch.float64) for _ in range(columns)]
    guide = [torch.randn(11, 4, generator=generator, dtype=torch.float64) for _ in range(columns)]
    if ties:
        for side in (model, guide):
            side[1][3], side[1][10], side[0][5] = side[1][9], side[1][2], side[1][5]
    return model, guide


def bare(cls: type[nn.Module], **attributes: Any) -> Any:
    """A loss made without its constructor, whose attributes are set from outside."""
    loss = cls.__new__(cls)
    nn.Module.__init__(loss)
    defaults = {
        "model": Embedded("embedding"),
        "guide": Embedded("guide"),
        "temperature": 0.05,
        "similarity_fct": nn.CosineSimilarity(dim=-1),
        "cross_entropy_loss": nn.CrossEntropyLoss(),
        "must_retokenize": False,
        "gather_across_devices": False,
        "mini_batch_size": 4,
        "show_progress_bar": False,
        **OPTIONS[0],
    }
    for name, value in {**defaults, **attributes}.items():
        setattr(loss, name, value)
    return loss


def plain(module: Any, model: list[Tensor], guide: list[Tensor], **options: Any) -> list[Tensor]:
    loss = bare(module.GISTEmbedLoss, **options)
    return embedding_gradients(loss, [{"embedding": x, "guide": g} for x, g in zip(model, guide, strict=True)])


def cached(module: Any, model: list[Tensor], guide: list[Tensor], **options: Any) -> list[Tensor]:
    loss = bare(module.CachedGISTEmbedLoss, **options)
    reps = [[part.clone().requires_grad_() for part in x.split(4)] for x in model]
    value, cache = loss.calculate_loss_and_cache_gradients(reps, [list(g.split(4)) for g in guide])
    return [value.detach(), *(torch.cat(column) for column in cache)]


@pytest.mark.parametrize("run", [plain, cached])
def test_under_autocast_all_is_float32_as_in_stock(run: Callable[..., list[Tensor]]) -> None:
    """Neither rounds a similarity to bfloat16, the model's or the guide's."""
    model, guide = ([x.float() for x in side] for side in inputs(3))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (run(module, model, guide) for module in (losses, stock))
    for value, wanted in zip(ours, theirs, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("run", [plain, cached])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("columns", [2, 3, 5])
def test_equals_stock_for_every_option(run: Callable[..., list[Tensor]], ties: bool, columns: int) -> None:
    if run is plain and columns == 5:
        with pytest.raises(ValueError, match="Expected 2 or 3 embeddings, got 5"):
            run(losses, *inputs(columns))
        return
    for options in OPTIONS:
        model, guide = inputs(columns, ties)
        assert_close(run(losses, model, guide, **options), run(stock, model, guide, **options))


@pytest.mark.parametrize("run", [plain, cached])
def test_rows_without_negatives_have_no_loss_and_no_gradient(run: Callable[..., list[Tensor]]) -> None:
    """A margin of 3 puts every cosine above the threshold."""
    value, *gradients = run(losses, *inputs(2), margin=3.0)
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)


class Doubled(nn.CrossEntropyLoss):
    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        return 2 * super().forward(scores, labels)


@pytest.mark.parametrize("run", [plain, cached])
@pytest.mark.parametrize(
    "replaced",
    [
        {"cross_entropy_loss": Doubled()},
        {"cross_entropy_loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
        {"similarity_fct": nn.CosineSimilarity(dim=-1, eps=1e-2)},
        {"sim_matrix": lambda a, b: -torch.cdist(a, b)},
    ],
    ids=["subclass", "smoothing", "eps", "sim_matrix"],
)
def test_replaced_parts_are_computed_by_stock(
    caplog: pytest.LogCaptureFixture, run: Callable[..., list[Tensor]], replaced: dict[str, Any]
) -> None:
    arguments = inputs(2)
    assert all(map(torch.equal, run(losses, *arguments, **replaced), run(stock, *arguments, **replaced)))
    assert "is computed by sentence-transformers, not by a fused kernel" in caplog.text
    with use_backend("blockwise"), pytest.raises(ValueError, match="cannot be served by the backend asked for"):
        run(losses, *arguments, **replaced)


def test_disable_is_stock_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBERT_KERNELS_DISABLE", "1")
    for run in (plain, cached):
        assert all(map(torch.equal, run(losses, *inputs(3)), run(stock, *inputs(3))))


@pytest.mark.parametrize("other_vocabulary", [False, True])
@pytest.mark.parametrize("name", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_equals_stock_on_text_and_under_matryoshka(
    bert: Callable[..., Any],
    name: str,
    other_vocabulary: bool,
) -> None:
    """With a guide of the same tokenizer, and with one for which the texts must be tokenised again."""
    if "Cached" in name and other_vocabulary and Version(sentence_transformers.__version__) < Version("6.2"):
        pytest.skip("stock itself fails to tokenise again for the guide before 6.2")
    model, guide = bert(), bert()
    if other_vocabulary:
        guide = copy.deepcopy(guide)  # with a vocabulary of its own
        guide.tokenizer.add_tokens(["soupspoon"])
        guide[0].auto_model.resize_token_embeddings(len(guide.tokenizer))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    results = []
    for module in (stock, losses):
        loss = getattr(module, name)(model, guide, **({"mini_batch_size": 3} if "Cached" in name else {}))
        assert loss.must_retokenize == other_vocabulary
        results.append(step(loss, text_features(model, columns=3)))
        if "Cached" not in name:
            results[-1] += step(stock.MatryoshkaLoss(model, loss, [32, 8]), text_features(model))
    assert_close(*results, replayed="Cached" in name)
    ours = getattr(losses, name)(model, guide)
    theirs = getattr(stock, name)(model, guide)
    assert isinstance(ours, type(theirs))
    assert ours.get_config_dict() == theirs.get_config_dict()


@pytest.mark.parametrize("name", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_learnable_temperature(bert: Callable[..., Any], name: str) -> None:
    model = bert()
    temperature = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    options = {"mini_batch_size": 3} if "Cached" in name else {}

    def value(shift: float) -> Tensor:
        loss = getattr(losses, name)(model, model, temperature=0.1 + shift, **options)
        with torch.no_grad():
            return loss(text_features(model), None)

    step(getattr(losses, name)(model, model, temperature=temperature, **options), text_features(model), factor=256.0)
    assert getattr(losses, name)(model, model, temperature).get_config_dict()["temperature"] == 0.1
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, .* got -0\.1"):
        getattr(losses, name)(model, model, -0.1, **options)(text_features(model), None)
    expected = 256 * (value(1e-6) - value(-1e-6)) / 2e-6
    assert temperature.grad.item() == pytest.approx(expected.item(), rel=1e-5)
