"""GradCache alone: the loss and every gradient of embedding all columns in one piece, whatever the inputs are."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sbert_kernels import GradCache
from sbert_kernels.gradcache.options import Options


class Tokens(nn.Module):
    """Masked mean of token embeddings, through a layer; writes into the features, as modules of ST do."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(50, 8, dtype=torch.float64)
        self.linear = nn.Linear(8, 6, dtype=torch.float64)
        self.rows = 0
        self.calls = 0

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        mask = features["attention_mask"]
        self.calls += 1
        self.rows += len(mask)
        weights = mask.unsqueeze(-1) * (1 + torch.arange(mask.shape[1])).unsqueeze(-1).sqrt()
        mean = (self.embedding(features["input_ids"]) * weights).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        features["sentence_embedding"] = torch.tanh(self.linear(mean))
        mask.zero_()
        return features


def token_column(rows: int, width: int, generator: torch.Generator, distinct: int | None = None) -> dict[str, Tensor]:
    """Rows of 1 to ``width`` tokens, padded at the end; with ``distinct``, rows repeat each other."""
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    mask = (torch.arange(width) < lengths).to(torch.int64)
    ids = torch.randint(1, 50, (rows, width), generator=generator) * mask
    which = torch.arange(rows) % (distinct or rows)
    return {"input_ids": ids[which], "attention_mask": mask[which]}


def contrast(embeddings: Sequence[Tensor], scale: Tensor | float = 3.0) -> Tensor:
    """Each row of the first column against every row of the others; no two rows have the same part in it."""
    anchors, candidates = embeddings[0], torch.cat(list(embeddings[1:]) or list(embeddings))
    own = torch.arange(len(anchors))
    value = F.cross_entropy(scale * anchors @ candidates.T, own)
    return (
        value
        + (torch.cat(list(embeddings)).square().sum(1) * torch.linspace(0, 1, len(anchors) * len(embeddings))).mean()
    )


def embed(encoders: Any, columns: Sequence[Any], encode: Callable[..., Any] | None = None) -> list[Tensor]:
    """Every column in one piece, from a copy of its features."""
    encoders = [encoders] * len(columns) if isinstance(encoders, nn.Module) else encoders
    outputs = []
    for encoder, column in zip(encoders, copy.deepcopy(list(columns)), strict=True):
        output = (encode or (lambda module, features: module(features)))(encoder, column)
        outputs.append(output if isinstance(output, Tensor) else output["sentence_embedding"])
    return outputs


def parameters(encoders: Any) -> list[Tensor]:
    return list((encoders if isinstance(encoders, nn.Module) else nn.ModuleList(encoders)).parameters())


def gradients(loss: Callable[[], Tensor], tensors: Sequence[Tensor], factor: float = 1.0) -> list[Tensor]:
    for tensor in tensors:
        tensor.grad = None
    value = loss()
    (value * factor).backward()
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in tensors)]


def assert_close(ours: list[Tensor], exact: list[Tensor]) -> None:
    """To fp64: a relative error of 1e-9 of the largest entry."""
    for value, wanted in zip(ours, exact, strict=True):
        assert (value - wanted).abs().max() <= 1e-9 * wanted.abs().max() + 1e-15


def assert_unchanged(columns: Sequence[Any], before: Sequence[Any]) -> None:
    for column, old in zip(columns, before, strict=True):
        if isinstance(column, Tensor):
            assert torch.equal(column, old)
            continue
        assert list(column) == list(old)
        for key, value in column.items():
            if isinstance(value, str):
                assert value == old[key]
            else:
                torch.testing.assert_close(value, old[key], rtol=0, atol=0)


@st.composite
def options_of_any_kind(draw: st.DrawFn) -> dict[str, Any]:
    packing = draw(st.sampled_from(["length", "none"]))
    return {
        "mini_batch_size": draw(st.sampled_from([1, 2, 3, 7, 100])),
        "mini_batch_num_tokens": draw(st.sampled_from([None, None, 1, 12, 1000])),
        "packing": packing,
        "unique_rows": packing == "length" and draw(st.booleans()),
        "activation_budget": draw(st.sampled_from([None, 0, 2000, 10**9])),
    }


@settings(max_examples=150, derandomize=True)
@given(st.data(), options_of_any_kind())
def test_equals_one_piece_for_every_splitting(data: st.DataObject, options: dict[str, Any]) -> None:
    """Columns of any widths, towers shared or not, rows that repeat, and any way to cut them into mini-batches."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    rows = data.draw(st.integers(1, 13))
    widths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    towers = [Tokens(0), Tokens(1)]
    which = data.draw(st.lists(st.sampled_from([0, 1]), min_size=len(widths), max_size=len(widths)))
    encoders = [towers[index] for index in which]
    distinct = data.draw(st.integers(1, rows))
    columns = [token_column(rows, width, generator, distinct) for width in widths]
    before = copy.deepcopy(columns)
    tensors = [p for tower in towers for p in tower.parameters()]
    expected = gradients(lambda: contrast(embed(encoders, columns)), tensors)
    cache = GradCache(encoders, contrast, **options)
    assert_close(gradients(lambda: cache(columns), tensors), expected)
    assert_unchanged(columns, before)


class Flattened(nn.Module):
    """Reads rows of tokens laid end to end, as ST does for models without padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 6, dtype=torch.float64)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        starts = features["cu_seq_lens_q"]
        lengths = starts.diff()
        assert features["max_length_q"] == lengths.max()
        assert len(features.get("per_row", lengths)) == len(lengths)
        assert torch.equal(features["seq_idx"][0], torch.arange(len(lengths)).repeat_interleave(lengths))
        values = self.embedding(features["input_ids"][0]) * (1 + features["position_ids"][0]).unsqueeze(1)
        rows = torch.zeros(len(lengths), 6, dtype=torch.float64).index_add(0, features["seq_idx"][0], values)
        return {"sentence_embedding": torch.tanh(rows / lengths.unsqueeze(1))}


def flattened(rows: int, generator: torch.Generator) -> dict[str, Any]:
    lengths = torch.randint(1, 6, (rows,), generator=generator)
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return {
        "input_ids": torch.randint(0, 50, (1, int(starts[-1])), generator=generator),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "seq_idx": torch.arange(rows).repeat_interleave(lengths).unsqueeze(0),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts.clone(),
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }


class Annotated(nn.Module):
    """Reads what stands beside the tensors: a number, a tensor of any length and an array's row for each row."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, features: dict[str, Any]) -> Tensor:
        sums = torch.stack([spans.sum() for spans in features["spans"]])
        for spans in features["spans"]:
            spans.zero_()
        factors = torch.tensor(features["factors"]) * sums * torch.from_numpy(features["weights"]).sum(1)
        assert features["sizes"] == [1, 2, 3]
        return self.text(features)["sentence_embedding"] * factors.unsqueeze(1)


def annotated(column: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    values = torch.rand(ROWS, 4, generator=generator, dtype=torch.float64)
    return {
        **column,
        "factors": values[:, 0].tolist(),
        "spans": tuple(row[: 1 + index % 3].clone() for index, row in enumerate(values)),
        "weights": values.numpy(),
        "sizes": [1, 2, 3],  # of all rows
    }


class Images(nn.Module):
    """One image a row, beside its text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text = Tokens()
        self.pixels = nn.Linear(3 * 4 * 4, 6, dtype=torch.float64)

    def forward(self, features: dict[str, Any]) -> Tensor:
        pixels = self.pixels(features["pixel_values"].flatten(1))
        return pixels.tanh() + self.text(features)["sentence_embedding"]


class Patches(nn.Module):
    """Any number of images a row, of any number of patches each, laid end to end (as Qwen2-VL's are)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text = Tokens()
        self.patch = nn.Linear(5, 6, dtype=torch.float64)

    def forward(self, features: dict[str, Any]) -> Tensor:
        counts = features["num_images_per_sample"]
        text = self.text(features)["sentence_embedding"]
        if counts.sum() == 0:
            assert "pixel_values" not in features
            return text
        per_image = features["image_grid_thw"].prod(dim=1)
        assert int(per_image.sum()) == len(features["pixel_values"])
        owner = torch.arange(len(counts)).repeat_interleave(counts).repeat_interleave(per_image)
        return text.index_add(0, owner, self.patch(features["pixel_values"]).tanh())


def images(rows: int, generator: torch.Generator) -> dict[str, Any]:
    pixels = torch.randn(rows, 3, 4, 4, generator=generator, dtype=torch.float64)
    return {**token_column(rows, 4, generator), "pixel_values": pixels}


def patches(rows: int, generator: torch.Generator) -> dict[str, Any]:
    counts = torch.randint(0, 3, (rows,), generator=generator)
    grid = torch.randint(1, 4, (int(counts.sum()), 3), generator=generator)
    return {
        **token_column(rows, 7, generator),
        "pixel_values": torch.randn(int(grid.prod(1).sum()), 5, generator=generator, dtype=torch.float64),
        "image_grid_thw": grid,
        "num_images_per_sample": counts,
    }


def strided(column: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.T.contiguous().T for key, value in column.items()}


def linear(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(width, 6, dtype=torch.float64), nn.Tanh())


class Doubled(nn.Module):
    """Writes into the tensor that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(2))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False).double()


def first_token(module: nn.Module, features: dict[str, Tensor]) -> Tensor:
    return module(**features).last_hidden_state[:, 0]


def random_tensor(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


ROWS = 8
INPUTS: dict[str, Callable[[torch.Generator], tuple[Any, ...]]] = {
    "tensors": lambda g: (linear(5), [random_tensor(ROWS, 5, g) for _ in range(3)]),
    "one column": lambda g: (linear(5), [random_tensor(ROWS, 5, g)]),
    "tensors that are written into": lambda g: (Doubled(), [random_tensor(ROWS, 5, g) for _ in range(2)]),
    "tensors, a view": lambda g: (linear(5), [random_tensor(5, 2 * ROWS, g).T[::2] for _ in range(2)]),
    "towers of different widths": lambda g: (
        [linear(5), linear(7)],
        [random_tensor(ROWS, 5, g), random_tensor(ROWS, 7, g)],
    ),
    "not contiguous": lambda g: (Tokens(), [strided(token_column(ROWS, width, g)) for width in (3, 5)]),
    "a mask of booleans": lambda g: (
        Tokens(),
        [{**column, "attention_mask": column["attention_mask"].bool()} for column in [token_column(ROWS, 4, g)] * 2],
    ),
    "beside tensors, other values": lambda g: (
        Tokens(),
        [{**token_column(ROWS, 4, g), "task": task, "prompt_length": 1} for task in ("query", "document")],
    ),
    "flattened": lambda g: (Flattened(), [flattened(ROWS, g) for _ in range(2)]),
    "an image a row": lambda g: (Images(), [images(ROWS, g) for _ in range(2)]),
    "images in patches": lambda g: (Patches(), [patches(ROWS, g) for _ in range(2)]),
    "lists beside tensors": lambda g: (
        Annotated(Tokens()),
        [annotated(token_column(ROWS, width, g), g) for width in (4, 9)],
    ),
    "lists beside flattened": lambda g: (
        Annotated(Flattened()),
        [annotated(flattened(ROWS, g), g) | {"per_row": torch.arange(ROWS)} for _ in range(2)],
    ),
    "text and images": lambda g: ([Tokens(), Images()], [token_column(ROWS, 5, g), images(ROWS, g)]),
    "a model of transformers": lambda g: (bert(), [token_column(ROWS, width, g) for width in (4, 9)], first_token),
}


@pytest.mark.parametrize("packing", ["length", "none"])
@pytest.mark.parametrize("case", INPUTS)
def test_every_kind_of_input(case: str, packing: str) -> None:
    encoders, columns, *encode = INPUTS[case](torch.Generator().manual_seed(1))
    before = copy.deepcopy(columns)
    tensors = parameters(encoders)
    expected = gradients(lambda: contrast(embed(encoders, columns, *encode)), tensors)
    for mini_batch_size in (1, 3, 100):
        cache = GradCache(
            encoders, contrast, mini_batch_size=mini_batch_size, packing=packing, encode=encode[0] if encode else None
        )
        assert_close(gradients(lambda cache=cache: cache(columns), tensors), expected)
    assert_unchanged(columns, before)


def two_columns(rows: int = ROWS, seed: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [token_column(rows, 5, generator), token_column(rows, 7, generator)]


@pytest.mark.parametrize("options", [{}, {"unique_rows": True}, {"packing": "none"}])
def test_columns_may_have_different_numbers_of_rows(options: dict[str, Any]) -> None:
    """As a loss does that ranks more documents than there are queries."""
    encoder, columns = Tokens(), [two_columns(4)[0], two_columns(11)[1]]
    before = copy.deepcopy(columns)

    def ranked(embeddings: Sequence[Tensor]) -> Tensor:
        queries, documents = embeddings
        return F.cross_entropy(3 * queries @ documents.T, torch.arange(4))

    tensors = list(encoder.parameters())
    expected = gradients(lambda: ranked(embed(encoder, columns)), tensors)
    assert_close(
        gradients(lambda: GradCache(encoder, ranked, mini_batch_size=3, **options)(columns), tensors), expected
    )
    assert_unchanged(columns, before)


@pytest.mark.parametrize("factor", [1.0, -0.25, 2.0**16])
@pytest.mark.parametrize("budget", [None, 10**9])
def test_whatever_multiplies_the_loss_reaches_every_gradient(factor: float, budget: int | None) -> None:
    """The encoder's, those of a learnable leaf that the loss is given, and of one that it closes over."""
    encoder, columns = Tokens(), two_columns()
    scale, power = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (3.0, 1.5))

    def scaled(embeddings: Sequence[Tensor], temperature: Tensor, *, offset: float) -> Tensor:
        return contrast(embeddings, temperature) ** power + offset

    tensors = [*encoder.parameters(), scale, power]
    expected = gradients(lambda: scaled(embed(encoder, columns), scale, offset=0.5), tensors, factor)
    cache = GradCache(encoder, scaled, mini_batch_size=3, activation_budget=budget)
    assert_close(gradients(lambda: cache(columns, scale, offset=0.5), tensors, factor), expected)


def test_two_forwards_then_one_backward_of_their_sum() -> None:
    """A forward owns its state: batches of other sizes don't get each other's gradients, nor each other's factor."""
    encoder, first, second = Tokens(), two_columns(8, 2), two_columns(5, 3)
    cache = GradCache(encoder, contrast, mini_batch_size=3)
    tensors = list(encoder.parameters())
    expected = gradients(lambda: contrast(embed(encoder, first)) + 2 * contrast(embed(encoder, second)), tensors)
    assert_close(gradients(lambda: cache(first) + 2 * cache(second), tensors), expected)


@pytest.mark.parametrize("budget", [None, 1500])
def test_backward_twice_accumulates_twice(budget: int | None) -> None:
    encoder, columns = Tokens(), two_columns()
    tensors = list(encoder.parameters())
    value, *once = gradients(lambda: contrast(embed(encoder, columns)), tensors)
    encoder.zero_grad()
    loss = GradCache(encoder, contrast, mini_batch_size=3, activation_budget=budget)(columns)
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert_close([loss.detach(), *(p.grad for p in tensors)], [value, *(2 * grad for grad in once)])


def test_a_kept_graph_is_not_used_after_its_parameters_have_changed() -> None:
    """As when an optimizer steps between two backward passes: the second pass is then that of the new parameters."""
    results = []
    for budget in (None, 10**9):
        encoder = Tokens()
        loss = GradCache(encoder, contrast, mini_batch_size=3, activation_budget=budget)(two_columns())
        with torch.no_grad():
            for p in encoder.parameters():
                p.add_(1)
        loss.backward()
        results.append([p.grad for p in encoder.parameters()])
    assert_close(*results)


def test_gradients_accumulate_over_steps_under_a_gradient_scaler() -> None:
    encoder, batches = Tokens().float(), [two_columns(8, 2), two_columns(8, 3)]
    cache = GradCache(encoder, contrast, mini_batch_size=3)
    results = []
    for compute in (lambda columns: contrast(embed(encoder, columns)), cache):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
        optimizer.zero_grad()
        for columns in batches:
            scaler.scale(compute(columns) / len(batches)).backward()
        scaler.unscale_(optimizer)
        results.append([p.grad.clone() for p in encoder.parameters()])
    # The order of the fp32 sums differs: n of them err by at most n roundings of the largest entry.
    for ours, exact in zip(*reversed(results), strict=True):
        assert (ours - exact).abs().max() <= 64 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("packing", ["length", "none"])
def test_a_frozen_tower_gets_no_gradient_and_the_other_its_own(packing: str) -> None:
    encoders, columns = [Tokens(0), Tokens(1)], two_columns()
    encoders[1].requires_grad_(False)
    tensors = list(encoders[0].parameters())
    expected = gradients(lambda: contrast(embed(encoders, columns)), tensors)
    assert_close(
        gradients(lambda: GradCache(encoders, contrast, mini_batch_size=3, packing=packing)(columns), tensors), expected
    )
    assert all(p.grad is None for p in encoders[1].parameters())


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


def test_an_empty_column_is_refused() -> None:
    first, second = two_columns()
    empty = {key: value[:0] for key, value in second.items()}
    for packing in ("length", "none"):
        with pytest.raises(ValueError, match="column 1 of the batch has no rows"):
            GradCache(Tokens(), lambda embeddings: sum(e.sum() for e in embeddings), packing=packing)([first, empty])


@pytest.mark.parametrize("three", [3.0, np.int64(3), np.array([3]), torch.tensor(3), Decimal(3)], ids=repr)
def test_whatever_equals_an_integer_is_one(three: Any) -> None:
    options = Options(three, three, activation_budget=three)
    assert options == Options(3, 3, activation_budget=3)
    numbers = (options.mini_batch_size, options.mini_batch_num_tokens, options.activation_budget)
    assert [type(number) for number in numbers] == [int] * 3


def test_a_column_that_the_loss_does_not_read_is_refused() -> None:
    cache = GradCache(Tokens(), lambda embeddings: embeddings[0].sum() + embeddings[2].sum(), mini_batch_size=3)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"column\(s\) 1\b"):
        cache([token_column(5, 4, generator) for _ in range(3)])


def static_features() -> dict[str, Tensor]:
    """As StaticEmbedding takes them: an EmbeddingBag's tokens, and where each row starts."""
    return {"input_ids": torch.arange(9), "offsets": torch.tensor([0, 4, 5])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "foo"}, r"packing.*'foo'"),
        ({"mini_batch_size": 0}, "mini_batch_size.*0"),
        ({"mini_batch_size": 2.5}, "mini_batch_size.*2.5"),
        ({"mini_batch_size": "3"}, "mini_batch_size.*'3'"),
        ({"mini_batch_size": torch.tensor([3, 3])}, "mini_batch_size.*3, 3"),
        ({"mini_batch_num_tokens": float("inf")}, "mini_batch_num_tokens.*inf"),
        ({"mini_batch_num_tokens": 0}, "mini_batch_num_tokens"),
        ({"activation_budget": -1}, "activation_budget.*-1"),
        ({"activation_budget": "all"}, "activation_budget.*'all'"),
        ({"unique_rows": "yes"}, "unique_rows.*'yes'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GradCache(Tokens(), contrast, **options)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (lambda: [], "columns must be at least one, got 0"),
        (lambda: [static_features()] * 2, "column 0 of the batch is an embedding bag"),
    ],
    ids=["none", "static"],
)
def test_bad_columns(columns: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradCache(Tokens(), contrast)(columns())


def test_as_many_encoders_as_columns() -> None:
    with pytest.raises(ValueError, match="columns must be 3, one an encoder, got 2"):
        GradCache([Tokens()] * 3, contrast)(two_columns())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask")
def test_an_automatic_budget_needs_a_gpu() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"activation_budget.*auto"):
        GradCache(Tokens(), contrast, activation_budget="auto")(two_columns())
