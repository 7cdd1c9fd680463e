"""Graded pairs: who is paired with whom, and that the score is the teacher's cosine."""

from __future__ import annotations

import pytest
import torch

from sbert_kernels.demo import grading

N = 12
PAIRS = [(f"query {i}", f"text {i}") for i in range(N)]
TEXTS = [query for query, _ in PAIRS] + [text for _, text in PAIRS]


def embeddings() -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(2 * N, 8, generator=torch.Generator().manual_seed(0)), dim=1)


def test_each_query_has_a_row_of_each_kind_with_its_cosine():
    x = embeddings()
    kinds = grading.grade(PAIRS, x, seed=0)
    assert tuple(kinds) == grading.KINDS
    for rows in kinds.values():
        assert [query for query, _, _ in rows] == TEXTS[:N]
        for query, text, score in rows:
            # A dot product of 8 terms of at most 1 in float32.
            assert score == pytest.approx((x[TEXTS.index(query)] @ x[TEXTS.index(text)]).item(), abs=8 * 2**-23)
    assert [text for _, text, _ in kinds["own"]] == TEXTS[N:]


def test_the_nearest_is_the_nearest_of_all_the_others():
    x = embeddings()
    for i, (_, text, _) in enumerate(grading.grade(PAIRS, x, seed=0)["nearest"]):
        others = [j for j in range(2 * N) if j not in (i, i + N)]
        assert text == TEXTS[max(others, key=lambda j: (x[i] @ x[j]).item())]


def test_the_random_one_is_any_other_and_decided_by_the_seed():
    x = embeddings()
    found = {seed: [text for _, text, _ in grading.grade(PAIRS, x, seed)["random"]] for seed in range(300)}
    for i in range(N):
        assert {texts[i] for texts in found.values()} == {TEXTS[j] for j in range(2 * N) if j not in (i, i + N)}
    assert found[7] == [text for _, text, _ in grading.grade(PAIRS, x, 7)["random"]]


class Teacher:
    def encode(self, texts: list[str], **options: object) -> torch.Tensor:
        assert options["normalize_embeddings"]
        assert options["convert_to_tensor"]
        x = torch.zeros(len(texts), 32)
        x[torch.arange(len(texts)), torch.tensor([int(text.split()[1]) for text in texts])] = 1
        return x


def test_the_parts_stay_disjoint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grading, "minilm_model", Teacher)
    train, held_out, means = grading.graded_rows(PAIRS[:8], PAIRS[8:], seed=0)
    for rows, part in ((train, PAIRS[:8]), (held_out, PAIRS[8:])):
        assert len(rows) == 3 * len(part)
        assert {text for *pair, _ in rows for text in pair} <= {text for pair in part for text in pair}
    # The teacher knows texts by their number alone.
    assert all(score == (query.split()[1] == text.split()[1]) for query, text, score in train + held_out)
    assert means == {"own": 1.0, "nearest": 0.0, "random": 0.0}
