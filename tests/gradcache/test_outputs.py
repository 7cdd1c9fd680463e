"""What encoders may return to GradCache: tokens of any number, several tensors; and how they are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sbert_kernels import GradCache
from support.gradcache import parameters
from support.gradients import value_and_gradients
from support.numbers import assert_close

ROWS, DIM = 8, 6


class Tokens(nn.Module):
    """Embeddings of tokens that see the mean of their text, never its padding: [n, width, DIM]; called by name."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(50, DIM, dtype=torch.float64)
        self.linear = nn.Linear(DIM, DIM, dtype=torch.float64)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.sizes.append(tuple(input_ids.shape))
        values = self.embedding(input_ids)
        mask = attention_mask.unsqueeze(-1)
        mean = (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        # Padding has an embedding, too, as with any transformer.
        return torch.tanh(self.linear(values + mean))


class Several(NamedTuple):
    tokens: Tensor
    mask: Tensor
    unused: Tensor
    weight: Tensor


def masked(encoder: nn.Module, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return encoder(**features), features["attention_mask"]


def named(encoder: nn.Module, features: dict[str, Tensor]) -> Several:
    """With a tensor that no loss reads, and one number a row."""
    tokens, mask = masked(encoder, features)
    return Several(tokens, mask.bool(), tokens[:, 0].square(), tokens[:, 0].mean(1).exp())


def late(embeddings: Sequence[Any]) -> Tensor:
    """Late interaction (MaxSim): the best token of a document for each token of a query, summed."""
    (queries, query_mask), (documents, mask) = (entry[:2] for entry in embeddings)
    scores = torch.einsum("iad,jbd->ijab", queries, documents)
    best = scores.masked_fill(~mask.bool()[None, :, None], -1e4).amax(3)
    scores = (best * query_mask[:, None]).sum(2)
    weights = embeddings[0][3] if len(embeddings[0]) > 3 else 1
    return -(scores.log_softmax(1).diagonal() * weights).mean()


def columns_of(widths: Sequence[int] = (4, 9), distinct: int = ROWS) -> list[dict[str, Tensor]]:
    """The longest text of a column is shorter than it, as where a data loader pads to a multiple."""
    generator = torch.Generator().manual_seed(0)
    columns = []
    for width in widths:
        lengths = torch.randint(1, width, (ROWS, 1), generator=generator)
        mask = (torch.arange(width) < lengths).to(torch.int64)
        ids = torch.randint(1, 50, (ROWS, width), generator=generator) * mask
        which = torch.arange(ROWS) % distinct
        columns.append({"input_ids": ids[which], "attention_mask": mask[which]})
    return columns


def gradients(loss: Callable[[], Tensor], encoders: Sequence[nn.Module]) -> list[Tensor]:
    """Returns the value of a loss, and its gradients at every parameter of the encoders."""
    return value_and_gradients(loss, parameters(encoders))


def in_one_piece(loss_fn: Any, encoders: Sequence[nn.Module], columns: Any, encode: Any) -> list[Tensor]:
    return gradients(lambda: loss_fn([encode(*pair) for pair in zip(encoders, columns, strict=True)]), encoders)


packings = pytest.mark.parametrize("options", [{}, {"packing": "none"}, {"unique_rows": True}], ids=str)


@packings
@pytest.mark.parametrize("encode", [masked, named])
@pytest.mark.parametrize("towers", [1, 2])
def test_tokens_and_their_mask(encode: Any, towers: int, options: dict[str, Any]) -> None:
    """Every mini-batch has another width; outputs that have no gradient, or that the loss does not read, are let be."""
    encoders = [Tokens(0), Tokens(1)] if towers == 2 else [Tokens(0)] * 2
    columns = columns_of(distinct=5)
    expected = in_one_piece(late, encoders, columns, encode)
    for size in (1, 3, 100):
        for budget in (None, 10**9):
            cache = GradCache(encoders, late, mini_batch_size=size, activation_budget=budget, encode=encode, **options)
            assert_close(gradients(lambda cache=cache: cache(columns), encoders), expected)
    with torch.no_grad():
        assert_close([cache(columns)], expected[:1])


@packings
def test_tokens_are_filled_up_with_zeros_to_the_widest_of_their_own_column(options: dict[str, Any]) -> None:
    encoder, columns = Tokens(), columns_of((3, 3, 12))
    whole = [encoder(**column) for column in columns]

    def check(embeddings: list[Tensor]) -> Tensor:
        for rows, column, exact in zip(embeddings, columns, whole, strict=True):
            mask = column["attention_mask"]
            width, longest = rows.shape[1], int(mask.sum(1).max())
            assert width >= longest
            for row, length in enumerate(mask.sum(1)):
                torch.testing.assert_close(rows[row, :length], exact[row, :length])
                if "packing" in options:  # each row is a mini-batch, as wide as it is long
                    assert not rows[row, length:].any()
        # Texts of a query's length may lie in a mini-batch with it, long documents do not.
        assert embeddings[0].shape[1] < embeddings[2].shape[1]
        return sum(rows.sum() for rows in embeddings)

    GradCache(encoder, check, mini_batch_size=1, **options)(columns).backward()


def heads(encoder: nn.Module, features: dict[str, Tensor]) -> Tensor:
    """As many vectors for each text, however long it is."""
    first = encoder(**features)[:, 0]
    return torch.stack([first, first.square(), first.exp(), first.sin(), first.cos()], dim=1)


def one_number(encoder: nn.Module, features: dict[str, Tensor]) -> Tensor:
    return encoder(**features)[:, 0].sum(1)


@packings
@pytest.mark.parametrize("encode", [heads, one_number])
def test_other_shapes_are_what_they_are(encode: Any, options: dict[str, Any]) -> None:
    def loss_fn(embeddings: list[Tensor]) -> Tensor:
        return sum((rows.flatten(1) if rows.ndim > 1 else rows).square().cumsum(0).sin().mean() for rows in embeddings)

    encoder, columns = Tokens(), columns_of((4, 7))
    expected = in_one_piece(loss_fn, [encoder] * 2, columns, encode)
    cache = GradCache(encoder, loss_fn, mini_batch_size=3, encode=encode, **options)
    assert_close(gradients(lambda: cache(columns), [encoder] * 2), expected)


def test_a_mini_batch_size_for_each_encoder() -> None:
    """Rows of the two do not mix then, even if it is one module."""
    shared = Tokens()
    columns = columns_of((5, 5))
    for column in columns:
        column["attention_mask"][:] = 1
    expected = in_one_piece(late, [shared] * 2, columns, masked)
    for options in ({"mini_batch_size": (8, 2)}, {"mini_batch_num_tokens": [40, 10]}):
        for packing in ("length", "none"):
            shared.sizes.clear()
            cache = GradCache([shared, shared], late, packing=packing, activation_budget=0, encode=masked, **options)
            assert_close(gradients(lambda cache=cache: cache(columns), [shared] * 2), expected)
            assert sorted(shared.sizes) == [(2, 5)] * 8 + [(8, 5)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mini_batch_size": (8, 2)}, r"mini_batch_size=\(8, 2\).*\[model, model\]"),
        ({"mini_batch_num_tokens": [8]}, r"mini_batch_num_tokens=\[8\]"),
    ],
)
def test_one_encoder_has_one_mini_batch_size(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradCache(Tokens(), late, **options)


@pytest.mark.parametrize("sizes", [(8,), (8, 2, 2), (8, 0)])
def test_as_many_mini_batch_sizes_as_encoders(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mini_batch_size must be"):
        GradCache([Tokens(), Tokens()], late, mini_batch_size=sizes)


class ByDictionary(nn.Module):
    """Its one argument has the name of a feature, and what wraps another module hands on one dictionary, too."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Tokens()

    def forward(self, input_ids: dict[str, Tensor]) -> Tensor:
        return self.module(**input_ids)[:, 0]


class Wrapper(nn.Module):
    """As distributed training and adapters wrap."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [lambda module: module, Wrapper], ids=["bare", "wrapped"])
def test_features_are_handed_over_as_forward_takes_them(wrap: Any) -> None:
    """By name where each has an argument, else as one dictionary."""

    def loss_fn(embeddings: list[Tensor]) -> Tensor:
        return sum(rows[:, 0].square().sum() if rows.ndim == 3 else rows.square().sum() for rows in embeddings)

    columns, results = columns_of(), []
    for encoder in (Tokens(), ByDictionary()):
        cache = GradCache(wrap(encoder), loss_fn, mini_batch_size=3)
        results.append(gradients(lambda cache=cache: cache(columns), [encoder]))
    assert_close(*results)


def test_a_model_of_transformers_is_told_what_to_write() -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    bert = BertModel(BertConfig(vocab_size=50, **sizes))
    with pytest.raises(TypeError, match=r"encode=lambda encoder, features: encoder\(\*\*features\).last_hidden_state"):
        GradCache(bert, late)(columns_of())
    pooled = GradCache(bert, lambda e: sum(x[1].sum() for x in e), encode=lambda m, f: m(**f, return_dict=False))
    pooled(columns_of()).backward()
    assert bert.pooler.dense.weight.grad.any()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: None, "Tokens gave NoneType"),
        (lambda x: (x, None), r"Tokens gave a tuple of \['Tensor', 'NoneType'\]"),
        (lambda x: {"dense": x}, r"encoder\(\*\*features\).dense"),
        (lambda x: x[:1], r"must return \[3, dimension\] for 3 rows, got \[1, \d, 6\]"),
        (lambda x: x[:, :, : x.shape[1]], "only the second of three or more dimensions may differ"),
        (lambda x: x[:, :, 0], "only the second of three or more dimensions may differ"),
        (lambda x: (x,) * x.shape[1], "tensors for one mini-batch and"),
    ],
)
def test_bad_outputs(output: Callable[[Tensor], Any], message: str) -> None:
    cache = GradCache(Tokens(), late, mini_batch_size=3, packing="none", encode=lambda m, f: output(m(**f)))
    columns = columns_of((7, 7))
    columns[0]["attention_mask"][3:] = 1
    with pytest.raises((TypeError, ValueError), match=message):
        cache(columns)


@pytest.mark.parametrize("given", ["dictionaries", "tensors"])
def test_columns_are_one_sequence(given: str) -> None:
    """Rows of a tensor would pass for columns."""
    queries, documents = columns_of() if given == "dictionaries" else torch.ones(2, ROWS, DIM)
    with pytest.raises(TypeError, match=r"write cache\(\[queries, documents\]\)"):
        GradCache(Tokens(), late)(queries, documents)


def test_the_padding_of_a_transformers_model_is_its_configuration_s() -> None:
    """Positions of RoBERTa are counted by the ids that are not padding, and there are only so many."""
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=50, pad_token_id=1, max_position_embeddings=8, type_vocab_size=1, **sizes)
    encoder = RobertaModel(config, add_pooling_layer=False).double().eval()
    columns = [
        {"input_ids": torch.full((2, width), 7), "attention_mask": torch.ones(2, width, dtype=torch.int64)}
        for width in (3, 6)
    ]
    seen: list[Tensor] = []

    def encode(module: nn.Module, features: dict[str, Tensor]) -> Tensor:
        seen.append(features["input_ids"].clone())
        return module(**features).last_hidden_state[:, 0]

    GradCache(encoder, lambda e: sum(x.sum() for x in e), mini_batch_num_tokens=24, encode=encode)(columns)
    assert seen[0].shape == (4, 6)
    assert seen[0][0].tolist() == [7, 7, 7, 1, 1, 1]
