"""The stock Trainer logs the same losses and gradient norms with our gradient cache as with stock's, in every set-up.

The models have no dropout and compute in double precision, unless the set-up asks for another type. Plain SGD trains
them: Adam would multiply the rounding errors of gradients that are nearly zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from datasets import Dataset
from packaging.version import Version
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor, nn

from sbert_kernels import losses
from support.trainer import logged_values, train

# transformers renames its options for checkpointing; the old names are those that all versions know.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

STEPS = 3
ROWS = 13

# Relative. Stock before 6.2 replays the cached gradients in float32: its rounding over the steps, and some room.
REPLAY = 1e-5


class Sum(nn.Module):
    """Losses of stock, each of which encodes the batch anew: what WeightedLoss computes from one encoding."""

    def __init__(self, model: Any, *parts: nn.Module) -> None:
        super().__init__()
        self.model, self.parts = model, nn.ModuleList(parts)

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        return sum(part([dict(column) for column in features], labels) for part in self.parts)


def _gist(module: Any) -> Callable[[Any], nn.Module]:
    # A guide of its own: what a guide that is trained itself lets pass hangs on the last digit of its weights.
    return lambda model: module.CachedGISTEmbedLoss(model, copy.deepcopy(model), mini_batch_size=2)


def _mixed(model: Any) -> nn.Module:
    parts = {
        "ranking": (losses.CoSENTLoss(model), 1.0),
        "in_batch": (losses.MultipleNegativesRankingLoss(model), 1.0),
    }
    return losses.WeightedLoss(model, parts, mini_batch_size=2)


# The loss of this package and what stock computes with: the same class, or else the loss without a gradient cache.
PAIRS: dict[str, tuple[Callable[[Any], nn.Module], Callable[[Any], nn.Module]]] = {
    "mnr": (
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
        lambda model: stock.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    ),
    "mnr-tokens": (
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=24),
        lambda model: stock.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=24),
    ),
    "symmetric": (
        lambda model: losses.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=2),
        lambda model: stock.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=2),
    ),
    "gist": (_gist(losses), _gist(stock)),
    "cosent": (lambda model: losses.CachedCoSENTLoss(model, mini_batch_size=2), stock.CoSENTLoss),
    "angle": (lambda model: losses.CachedAnglELoss(model, mini_batch_size=2), stock.AnglELoss),
    "weighted": (
        _mixed,
        lambda model: Sum(model, stock.CoSENTLoss(model), stock.MultipleNegativesRankingLoss(model)),
    ),
    "objective": (
        lambda model: losses.AnglEObjective(model, positive_threshold=None, duplicates="keep", mini_batch_size=2),
        lambda model: Sum(
            model, stock.CoSENTLoss(model), stock.MultipleNegativesRankingLoss(model), stock.AnglELoss(model)
        ),
    ),
}


def texts(labels: bool) -> Dataset:
    """Anchors that are short, and positives of up to 30 tokens, so that the order of rows and of lengths differ."""
    columns: dict[str, list[Any]] = {
        "anchor": [f"question {i} on {'cats' if i % 3 else 'dogs, and their owners'}" for i in range(ROWS)],
        "positive": [f"answer {i}" + ", and so on" * (5 * i % 8) for i in range(ROWS)],
    }
    if labels:
        columns["label"] = [(7 * i % ROWS) / ROWS for i in range(ROWS)]
    return Dataset.from_dict(columns)


def curve(model: SentenceTransformer, loss: nn.Module, folder: Path, labels: bool, **options: Any) -> list[float]:
    """Trains, and returns the losses and gradient norms that the Trainer logs in training and evaluation, in order."""
    data = texts(labels)
    setup = {"max_steps": STEPS, "per_device_train_batch_size": 5, "learning_rate": 0.1, **options}
    eval_data = data if "eval_strategy" in options else None
    trainer = train(model, loss, folder, data, eval_data, optim="sgd", save_strategy="no", **setup)
    return logged_values(trainer, "loss", "grad_norm", "eval_loss")


def compare(make_model: Callable[[], Any], name: str, folder: Path, tolerance: float, **options: Any) -> list[float]:
    """Train with ours and with stock's, and hold each logged number to a relative ``tolerance``."""
    labels = name not in ("mnr", "mnr-tokens", "symmetric", "gist")
    curves = []
    for make_loss in PAIRS[name]:
        model = make_model()
        curves.append(curve(model, make_loss(model), folder, labels, **options))
    ours, theirs = curves
    assert len(ours) >= 2 * STEPS
    assert all(math.isfinite(value) and value > 0 for value in theirs)
    assert ours == pytest.approx(theirs, rel=tolerance)
    return ours


@pytest.mark.parametrize("name", PAIRS)
def test_every_loss(bert: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """Batches of 5, 5 and 3 rows in mini-batches of 2: none of them divides the other."""
    compare(bert, name, tmp_path, REPLAY)


SETUPS: dict[str, dict[str, Any]] = {
    "gradient accumulation, the last group of one batch": {"gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "a prompt for each column": {"prompts": {"anchor": "query: ", "positive": "represent this passage: "}},
    "evaluation while training": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4},
    "a worker that tokenizes": {"dataloader_num_workers": 1},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_every_setup(bert: Callable[..., Any], tmp_path: Path, setup: str) -> None:
    if "checkpointing" in setup and Version(sentence_transformers.__version__) < Version("6.2"):
        pytest.skip("transformers 5 passes checkpointing options that sentence-transformers knows since 6.2")
    logged = compare(bert, "mnr", tmp_path, REPLAY, **SETUPS[setup])
    assert len(logged) == (3 if "eval_strategy" in SETUPS[setup] else 2) * STEPS


@pytest.mark.parametrize("name", ["mnr", "gist"])
def test_prompts_that_are_not_pooled(bert: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """Pooling then takes the prompt out of the attention mask that it is given, in place."""

    def make_model() -> Any:
        model = bert()
        model[1].include_prompt = False
        return model

    prompts = {"anchor": "query: ", "positive": "represent this passage: "}
    compare(make_model, name, tmp_path, REPLAY, prompts=prompts)


@pytest.mark.parametrize("name", ["mnr", "gist", "weighted"])
def test_a_router(bert: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """Each column has its own encoder, chosen by what the data collator says of the column."""

    def make_model() -> Any:
        router = Router.for_query_document(query_modules=list(bert()), document_modules=list(bert()))
        return SentenceTransformer(modules=[router], device="cpu")

    mapping = {"anchor": "query", "positive": "document"}
    compare(make_model, name, tmp_path, REPLAY, router_mapping=mapping)


def test_dropout_without_packing(bert: Callable[..., Any], tmp_path: Path) -> None:
    """In stock's mini-batches the masks are those that stock draws, in all steps: its generators go on alike."""
    curves = []
    for module, options in ((losses, {"packing": "none"}), (stock, {})):
        model = bert()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.3
        loss = module.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2, **options)
        curves.append(curve(model, loss, tmp_path, labels=False))
    assert curves[0] == pytest.approx(curves[1], rel=REPLAY)
    model = bert()
    without = curve(model, PAIRS["mnr"][1](model), tmp_path, labels=False)
    assert curves[0] != pytest.approx(without, rel=0.01), "dropout has to be on"


@pytest.mark.parametrize("name", ["mnr", "angle"])
def test_autocast(bert: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """The tokens of a text are rounded to bfloat16 on the way, whichever mini-batch it is in.

    Each step's gradient is a mean over some hundred tokens: its error is well below that of one rounding.
    """
    logged = compare(lambda: bert(torch.float32), name, tmp_path, torch.finfo(torch.bfloat16).eps, bf16=True)
    assert logged != train_in(bert, name, tmp_path), "autocast has to be on"


def train_in(bert: Callable[..., Any], name: str, folder: Path) -> list[float]:
    model = bert(torch.float32)
    return curve(model, PAIRS[name][0](model), folder, labels=name == "angle")


def test_compiled(bert: Callable[..., Any], tmp_path: Path) -> None:
    """The Trainer puts the compiled model into the loss; what it learns is what stock's, not compiled, does."""
    curves = []
    for make_loss, options in zip(
        PAIRS["mnr"], ({"torch_compile": True, "torch_compile_backend": "eager"}, {}), strict=True
    ):
        model = bert()
        curves.append(curve(model, make_loss(model), tmp_path, labels=False, max_steps=1, **options))
    assert curves[0] == pytest.approx(curves[1], rel=REPLAY)
