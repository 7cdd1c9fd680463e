"""SparseCoSENTLoss and SparseAnglELoss in the losses that hold them, on sparse encoders: equal stock, also patched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.sparse_encoder import losses as stock
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SparseAutoEncoder, SpladePooling
from torch import Tensor, nn

from sbert_kernels import losses, patch
from support.numbers import assert_close
from support.texts import text_features

LABELS = torch.tensor([0.2, 0.9, 0.5, 0.5, 0.0, 1.0, 0.9], dtype=torch.float64)
NAMES = ["SparseCoSENTLoss", "SparseAnglELoss"]


def splade(path: Path) -> SparseEncoder:
    """Its embeddings are as wide as the vocabulary, and mostly zeros once trained."""
    torch.manual_seed(0)
    modules = [MLMTransformer(str(path), max_seq_length=32), SpladePooling()]
    return SparseEncoder(modules=modules, device="cpu").double()


def auto_encoder(path: Path) -> SparseEncoder:
    torch.manual_seed(0)
    modules = [Transformer(str(path), max_seq_length=32), Pooling(32), SparseAutoEncoder(32, 48, k=6, k_aux=8)]
    return SparseEncoder(modules=modules, device="cpu").double()


def in_splade_loss(model: SparseEncoder, loss: nn.Module) -> nn.Module:
    return stock.SpladeLoss(model, loss, document_regularizer_weight=0.003, query_regularizer_weight=0.005)


def in_csr_loss(model: SparseEncoder, loss: nn.Module) -> nn.Module:
    return stock.CSRLoss(model, loss, beta=0.1, gamma=2.0)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The head that a masked language model has is missing in the saved encoder, and drawn from the seed."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def terms_and_gradients(loss: nn.Module, features: list[dict[str, Tensor]]) -> list[Tensor]:
    loss.zero_grad()
    terms = loss([dict(column) for column in features], LABELS)
    sum(terms.values()).backward()
    return [
        *(term.detach() for term in terms.values()),
        *(parameter.grad.clone() for parameter in loss.parameters() if parameter.grad is not None),
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("make", "around"), [(splade, in_splade_loss), (auto_encoder, in_csr_loss)])
def test_equals_stock_on_a_sparse_encoder(
    bert_path: Path, caplog: pytest.LogCaptureFixture, make: Any, around: Any, name: str
) -> None:
    """Without a word about stock: the embeddings are dense in training, however many of their entries are zero."""
    caplog.set_level(logging.INFO, logger="sbert_kernels")
    model = make(bert_path)
    features = text_features(model)
    expected = terms_and_gradients(around(model, getattr(stock, name)(model)), features)
    assert_close(terms_and_gradients(around(model, getattr(losses, name)(model)), features), expected)
    assert not [record for record in caplog.records if record.name.startswith("sbert_kernels.losses")]


@pytest.mark.parametrize("name", NAMES)
def test_patched_training_equals_stock(bert_path: Path, tmp_path: Path, name: str) -> None:
    def curve(context: Callable[[], Any]) -> list[float]:
        with context():
            model = splade(bert_path).float()
            loss = getattr(stock, name)(model)
            assert isinstance(loss, getattr(losses, name)) == (context is patch)
            data = {
                "sentence1": [f"question number {i} about {'cats' if i % 3 else 'dogs'}" for i in range(24)],
                "sentence2": [f"answer number {i}, rather long" for i in range(24)],
                "score": [(i * 7 % 11) / 10 for i in range(24)],
            }
            arguments = SparseEncoderTrainingArguments(
                output_dir=str(tmp_path / context.__name__),
                per_device_train_batch_size=8,
                max_steps=3,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            )
            trainer = SparseEncoderTrainer(
                model=model, args=arguments, train_dataset=Dataset.from_dict(data), loss=in_splade_loss(model, loss)
            )
            trainer.train()
            return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    known = curve(nullcontext)
    assert len(known) == 3
    assert curve(patch) == pytest.approx(known, rel=1e-4)
