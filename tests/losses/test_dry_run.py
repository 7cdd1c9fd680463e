"""Losses on features without data (meta tensors, FakeTensorMode): no value is read, shapes and dtypes are the real."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedTokenizerBase

from sbert_kernels import GradCache, losses

ROWS, DIM = 6, 8


class Encoder(nn.Sequential):
    """Stands for a model of which the losses need embeddings and no more."""

    max_seq_length = 512

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__(nn.Linear(4, DIM))
        self.tokenizer = tokenizer

    def get_embedding_dimension(self) -> int:
        return DIM

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = features["attention_mask"][..., None]
        return {"sentence_embedding": self[0]((features["hidden"] * mask).sum(dim=1))}


def learnable(value: float = 20.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


class Vocabulary(PreTrainedTokenizerBase):
    def __init__(self, word: str) -> None:
        self.word = word

    def get_vocab(self) -> dict[str, int]:
        return {self.word: 0}

    vocab = property(get_vocab)  # what stock's CachedGISTEmbedLoss compares before 6.2


def gist(cls: Any, word: str, **options: Any) -> nn.Module:
    return cls(Encoder(Vocabulary("a")), Encoder(Vocabulary(word)), **options)


def grad_cache(options: dict[str, Any]) -> nn.Module:
    """A gradient cache as a module, for what it trains to be found."""
    loss = nn.Module()
    loss.model = Encoder()
    cache = GradCache(loss.model, lambda columns: (columns[0] * columns[1]).sum(), mini_batch_size=4, **options)
    loss.forward = lambda features, labels: cache(features)
    return loss


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "in-batch": lambda: losses.MultipleNegativesRankingLoss(Encoder(), learnable(), duplicates="mask"),
    "cached in-batch": lambda: losses.CachedMultipleNegativesRankingLoss(Encoder(), learnable(), mini_batch_size=4),
    "guided": lambda: gist(losses.GISTEmbedLoss, "a", temperature=learnable(0.05)),
    "cached guided": lambda: gist(losses.CachedGISTEmbedLoss, "a", mini_batch_size=4),
    "ranking": lambda: losses.CoSENTLoss(Encoder(), learnable()),
    "angle": lambda: losses.AnglELoss(Encoder()),
    "cached ranking": lambda: losses.CachedCoSENTLoss(Encoder(), mini_batch_size=4),
    "objective": lambda: losses.AnglEObjective(Encoder(), cosine_weight=learnable(1.0)),
    "cached objective": lambda: losses.AnglEObjective(Encoder(), ibn_weight=learnable(1.0), mini_batch_size=4),
    "weighted": lambda: losses.WeightedLoss(model := Encoder(), {"one": (losses.CoSENTLoss(model), learnable())}),
    "prefixes": lambda: losses.MatryoshkaLoss(
        model := Encoder(), losses.MultipleNegativesRankingLoss(model), [DIM, 4], [1.0, 0.5]
    ),
    "cached prefixes": lambda: losses.MatryoshkaLoss(
        model := Encoder(), losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), [DIM, 4]
    ),
    "gradient cache": lambda: grad_cache({}),
    "gradient cache with options": lambda: grad_cache({"unique_rows": True, "activation_budget": 1 << 20}),
}


def features() -> list[dict[str, Tensor]]:
    def column() -> dict[str, Tensor]:
        return {
            "input_ids": torch.ones(ROWS, 5, dtype=torch.int64),
            "attention_mask": torch.ones(ROWS, 5, dtype=torch.int64),
            "hidden": torch.ones(ROWS, 5, 4),
        }

    return [column(), column()]


def step(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    """A loss after one step, made where it is called; its values and gradients by name, as shapes and dtypes."""
    loss = make()
    value = loss(features(), torch.ones(ROWS))
    terms = value if isinstance(value, dict) else {"loss": value}
    sum(terms.values()).backward()
    found = {**terms, **{name: parameter.grad for name, parameter in loss.named_parameters()}}
    return loss, {name: None if tensor is None else (tensor.shape, tensor.dtype) for name, tensor in found.items()}


WHERE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "meta": lambda: torch.device("meta"),
    "fake": FakeTensorMode,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("where", WHERE)
def test_a_dry_run_gives_what_a_real_step_would(where: str, name: str) -> None:
    _, real = step(LOSSES[name])
    with WHERE[where]():
        loss, dry = step(LOSSES[name])
    assert dry == real
    if hasattr(loss, "get_config_dict"):
        assert set(loss.get_config_dict()) == set(LOSSES[name]().get_config_dict())


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gist(losses.GISTEmbedLoss, "b"), "use a guide with the model's tokenizer"),
        (lambda: gist(losses.CachedGISTEmbedLoss, "b"), "use a guide with the model's tokenizer"),
        (
            lambda: losses.CachedMultipleNegativesRankingLoss(Encoder(), mini_batch_num_tokens=9),
            "use mini_batch_size, and features that are padded, there",
        ),
    ],
)
def test_what_has_to_read_the_texts_says_so(make: Callable[[], nn.Module], message: str, where: str) -> None:
    with WHERE[where](), pytest.raises(ValueError, match=message):
        step(make)


def test_a_memory_estimate_of_a_loss_made_of_real_tensors() -> None:
    """Tools may leave a model as it is, and make fake tensors of its parameters where they meet those of a batch."""
    loss = losses.CoSENTLoss(Encoder())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        assert loss(features(), torch.ones(ROWS)).fake_mode is mode
