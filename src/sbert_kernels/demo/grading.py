"""Graded pairs out of plain ones: a teacher's similarities as scores, of pairs that belong together and others."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from sbert_kernels.workloads.models import minilm_model
from sbert_kernels.workloads.texts import Pair, ScoredPair

TEACHER = "all-MiniLM-L6-v2"
KINDS = ("own", "nearest", "random")


def graded_rows(
    train: Sequence[Pair], held_out: Sequence[Pair], seed: int
) -> tuple[list[ScoredPair], list[ScoredPair], dict[str, float]]:
    """Returns three rows (query, text, teacher's cosine) of each pair, in a mixed order, and the mean score a kind.

    The texts of a part are paired within it, so that the parts stay disjoint.
    """
    texts = [text for part in (train, held_out) for column in zip(*part, strict=True) for text in column]
    embeddings = minilm_model().encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=True)
    parts = [
        grade(part, own, seed)
        for part, own in zip((train, held_out), embeddings.split([2 * len(train), 2 * len(held_out)]), strict=True)
    ]
    scores = {kind: [score for part in parts for _, _, score in part[kind]] for kind in KINDS}
    rows, held_out_rows = ([row for kind in KINDS for row in part[kind]] for part in parts)
    random.Random(seed).shuffle(rows)  # the comparison takes the first of them
    return rows, held_out_rows, {kind: sum(own) / len(own) for kind, own in scores.items()}


def grade(pairs: Sequence[Pair], embeddings: Tensor, seed: int) -> dict[str, list[ScoredPair]]:
    """Returns rows by kind: each query with its own text, with the nearest other text, and with a random other one.

    Args:
        pairs: at least two, n in all.
        embeddings: (2n, D), each of length 1: those of the queries, then those of their texts.
        seed: decides which the random ones are.
    """
    n = len(pairs)
    texts = [query for query, _ in pairs] + [text for _, text in pairs]
    own = torch.arange(n)
    others = embeddings[:n] @ embeddings.T
    others[own, own] = others[own, own + n] = -torch.inf
    # Skip the query itself and its text: 2n - 2 others are left.
    shift = torch.randint(1, n, (n,), generator=torch.Generator().manual_seed(seed))
    half = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed + 1))
    partners = {"own": own + n, "nearest": others.argmax(dim=1), "random": (own + shift) % n + n * half}
    return {
        kind: [
            (texts[i], texts[partner], score)
            for i, (partner, score) in enumerate(
                zip(chosen.tolist(), (embeddings[:n] * embeddings[chosen]).sum(dim=1).tolist(), strict=True)
            )
        ]
        for kind, chosen in partners.items()
    }
