"""How often GradCache embeds a row, how large its mini-batches are, and what it keeps in memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbert_kernels import GradCache
from support.gradcache import Tokens, contrast, token_column, two_columns


def test_rows_are_embedded_as_often_as_the_options_say() -> None:
    """Twice; once where the graph is kept; in the first pass, equal rows once if they are to be unique."""
    columns = [token_column(12, 5, torch.Generator().manual_seed(0), distinct=4)] * 2

    def rows(mini_batch_size: int = 2, **options: Any) -> tuple[int, int]:
        encoder = Tokens()
        loss = GradCache(encoder, contrast, mini_batch_size=mini_batch_size, **options)(columns)
        first = encoder.rows
        loss.backward()
        return first, encoder.rows

    assert rows(activation_budget=0) == (24, 48)
    assert rows(activation_budget=0, unique_rows=True) == (4, 8)
    assert rows(activation_budget=10**9) == (24, 24)
    assert rows(activation_budget=10**9, unique_rows=True) == (4, 4)
    first, both = rows(activation_budget=2000)
    assert first == 24
    assert 24 < both < 48
    # What one mini-batch may take is there for the end of the batch; a column, here, is one mini-batch of stock's.
    assert rows(packing="none") == (24, 46)
    assert rows(mini_batch_size=24) == (24, 36)


def test_the_end_that_is_kept_is_no_larger_than_a_mini_batch() -> None:
    """The memory of one is free between the passes; the second pass needs it when what was kept is through."""
    columns = two_columns(20)
    longest = max(int(column["attention_mask"].sum(1).max()) for column in columns)
    for mini_batch_size in (1, 3, 7):
        sizes: list[tuple[int, bool]] = []

        def encode(encoder: nn.Module, x: Any, sizes: list[tuple[int, bool]] = sizes) -> Tensor:
            sizes.append((x["input_ids"].numel(), torch.is_grad_enabled()))
            return encoder(x)["sentence_embedding"]

        GradCache(Tokens(), contrast, mini_batch_size=mini_batch_size, encode=encode)(columns)
        kept = [tokens for tokens, graph in sizes if graph]
        assert 0 < sum(kept) <= mini_batch_size * longest
        assert all(graph for _, graph in sizes[-len(kept) :])


def test_no_mini_batch_is_larger_than_stock_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded tokens: at most those of mini_batch_size rows of the longest, or mini_batch_num_tokens."""
    encoder, columns, sizes = Tokens(), two_columns(20), []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda x: sizes.append(x["input_ids"].numel()) or forward(x))
    longest = max(int(column["attention_mask"].sum(1).max()) for column in columns)
    GradCache(encoder, contrast, mini_batch_size=3)(columns).backward()
    assert max(sizes) <= 3 * longest
    sizes.clear()
    GradCache(encoder, contrast, mini_batch_num_tokens=11)(columns).backward()
    assert max(sizes) <= 11


@pytest.mark.parametrize(
    "options", [{}, {"packing": "none"}, {"unique_rows": True}, {"activation_budget": 10**9}], ids=str
)
def test_a_loss_that_is_dropped_lets_go_of_its_batch(options: dict[str, Any]) -> None:
    """At once, not when the garbage collector comes by: features lie on the GPU, one batch of them a step."""
    cache, columns = GradCache(Tokens(), contrast, mini_batch_size=2, **options), two_columns()
    features = [weakref.ref(value) for column in columns for value in column.values()]
    gc.disable()
    try:
        cache(columns).backward()
        loss = cache(columns)
        del columns, loss
        assert not any(reference() is not None for reference in features)
    finally:
        gc.enable()


class Tracked(Tokens):
    """Counts the graphs that are alive whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        self.alive.append(sum(output() is not None for output in self.outputs))
        features = super().forward(features)
        if features["sentence_embedding"].requires_grad:
            self.outputs.append(weakref.ref(features["sentence_embedding"]))
        return features


def test_a_graph_that_the_budget_has_no_room_for_is_let_go_before_the_next() -> None:
    encoder = Tracked()
    GradCache(encoder, contrast, mini_batch_size=2, activation_budget=1)(two_columns())
    assert encoder.outputs, "it takes one to know how large they are"
    assert set(encoder.alive) == {0}


@pytest.mark.parametrize("budget", [3000, 10**9])
def test_graphs_that_were_kept_go_with_a_loss_that_is_dropped(budget: int) -> None:
    """Without a backward pass to free them, as when a step is skipped; the encoder's tanh saves its own output."""
    encoder = Tracked()
    loss = GradCache(encoder, contrast, mini_batch_size=2, activation_budget=budget)(two_columns())
    assert any(output() is not None for output in encoder.outputs)
    del loss
    gc.collect()
    assert not any(output() is not None for output in encoder.outputs)
