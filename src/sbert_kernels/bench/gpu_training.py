"""Whole training steps of transformers through the gradient cache, as `bench gpu` times them.

Random weights, real texts: (summary, body) pairs of docstrings, tokenized already. A step is forward under autocast to
bfloat16, and backward, from gradients that are None, with the model's dropout; no optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.util import batch_to_device
from torch import Tensor

from sbert_kernels.bench.gpu_jobs import Training
from sbert_kernels.bench.gpu_pace import Step
from sbert_kernels.bench.peers import features_of
from sbert_kernels.bench.training import mixed_rows
from sbert_kernels.workloads import texts
from sbert_kernels.workloads.losses import in_batch_loss
from sbert_kernels.workloads.training import quiet_libraries

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGE = "torch"  # whose docstrings are read: it is there, and has some thousands


@dataclass(frozen=True)
class Workload:
    """Holds a model on its device, and the features of its texts; `facts` are columns about them."""

    model: SentenceTransformer
    features: Sequence[dict[str, Tensor]]
    facts: dict[str, Any]


@cache
def _workload(name: str, hidden: int, layers: int, heads: int, pairs: int, max_tokens: int, device: str) -> Workload:
    from sbert_kernels.workloads.untrained import untrained_transformer

    quiet_libraries()
    rows = mixed_rows(texts.docstring_pairs((PACKAGE,)).pairs, pairs)
    model = untrained_transformer(
        [text for row in rows for text in row], hidden=hidden, layers=layers, heads=heads, max_tokens=max_tokens
    ).to(device)
    features = [batch_to_device(column, torch.device(device)) for column in features_of(model, rows)]
    tokens = sum(int(column["attention_mask"].sum()) for column in features)
    return Workload(model, features, {"pairs": len(rows), "tokens": tokens})


def workload(case: Training, device: str) -> Workload:
    """Returns the model and the texts of a case; they are made once for all sizes of mini-batches."""
    return _workload(case.name, case.hidden, case.layers, case.heads, case.pairs, case.max_tokens, device)


def step(work: Workload, library: str, case: Training, device: str) -> Step:
    """Returns a step with the cached in-batch loss of a library (the name of a module)."""
    loss = in_batch_loss(work.model, library, mini_batch_size=case.mini_batch)
    parameters = list(work.model.parameters())

    def call() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        columns = [dict(column) for column in work.features]  # models write their outputs into them
        with torch.autocast(device.partition(":")[0], torch.bfloat16):
            value: Tensor = loss(columns, None)
        value.backward()
        return value.detach()

    return Step(call, parameters)
