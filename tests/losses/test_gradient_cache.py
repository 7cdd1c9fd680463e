"""The cached losses over the engine: the plain loss's value and gradients, for every option, model and input."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from packaging.version import Version
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from torch import Tensor, nn

from sbert_kernels import losses

ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
WORDS = (
    "how",
    "tall",
    "is",
    "the",
    "tower",
    "and",
    "who",
    "wrote",
    "a",
    "book",
    "about",
    "rice",
    "rain",
    "light",
    "at",
)
GUIDED = {"margin": 0.1}  # without one, rounding would say which of several equal texts are false negatives


def mixed(model: Any, **options: Any) -> nn.Module:
    entries = {
        "ranking": (losses.MultipleNegativesRankingLoss(model, directions=ALL_DIRECTIONS), 1.0),
        "spread": (stock.GlobalOrthogonalRegularizationLoss(model), 0.5),
        "order": (losses.AnglELoss(model), 0.25),
    }
    return losses.WeightedLoss(model, entries, **options)


# By name: the loss over the engine and the loss in one piece, of a model and a guide.
OBJECTIVES: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "ranking": (
        lambda m, g, **o: losses.CachedMultipleNegativesRankingLoss(m, directions=ALL_DIRECTIONS, **o),
        lambda m, g: losses.MultipleNegativesRankingLoss(m, directions=ALL_DIRECTIONS),
    ),
    "symmetric": (
        lambda m, g, **o: losses.CachedMultipleNegativesSymmetricRankingLoss(m, **o),
        lambda m, g: losses.MultipleNegativesSymmetricRankingLoss(m),
    ),
    "guided": (
        lambda m, g, **o: losses.CachedGISTEmbedLoss(m, g, **GUIDED, **o),
        lambda m, g: losses.GISTEmbedLoss(m, g, **GUIDED),
    ),
    "cosent": (lambda m, g, **o: losses.CachedCoSENTLoss(m, **o), lambda m, g: losses.CoSENTLoss(m)),
    "angle": (lambda m, g, **o: losses.CachedAnglELoss(m, **o), lambda m, g: losses.AnglELoss(m)),
    "weighted": (lambda m, g, **o: mixed(m, **o), lambda m, g: mixed(m)),
    "objective": (lambda m, g, **o: losses.AnglEObjective(m, **o), lambda m, g: losses.AnglEObjective(m)),
}
NEGATIVES = {"cosent": (0,), "guided": (0, 1), "symmetric": (0, 1, 3)}  # (0, 1, 2, 3) where nothing is said

PACKINGS = [{"packing": "length"}, {"packing": "length", "unique_rows": True}, {"packing": "none"}]
OPTIONS = [
    {"mini_batch_size": size, "mini_batch_num_tokens": tokens, "activation_budget": budget, **packing}
    for size, tokens, budget, packing in itertools.product(
        (1, 3, 32, 1000), (None, 24), (None, 200_000, 2**40), PACKINGS
    )
]


def around(name: str, wrapper: str, model: Any, guide: Any, **options: Any) -> nn.Module:
    """The loss of that name, over the engine if options are given, in that wrapper."""
    cached, plain = OBJECTIVES[name]
    loss = cached(model, guide, **options) if options else plain(model, guide)
    if wrapper == "none":
        return loss
    module = stock if wrapper == "stock matryoshka" else losses
    return module.MatryoshkaLoss(model, loss, [32, 8], [1.0, 0.5])


def batch(model: Any, rows: int, columns: int = 2, longest: int = 12) -> list[dict[str, Any]]:
    """Texts of 1 to ``longest`` words, a third of them those of other rows, in any column."""
    draw = random.Random(rows * 10 + columns)
    texts: list[str] = []
    for index in range(rows * columns):
        again = index and draw.random() < 1 / 3
        words = draw.choices(WORDS, k=draw.randint(1, longest))
        texts.append(draw.choice(texts) if again else " ".join(words))
    return [model.preprocess(texts[column::columns]) for column in range(columns)]


def labels_of(features: list[dict[str, Any]]) -> Tensor:
    return torch.rand(len(features[0]["input_ids"]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def value_of(loss: nn.Module, features: list[dict[str, Any]]) -> Tensor:
    result = loss(features, labels_of(features))
    return torch.stack(list(result.values())).sum() if isinstance(result, dict) else result


def gradients(loss: nn.Module, value: Callable[[], Tensor]) -> list[Tensor]:
    """A value and the gradient of every parameter of the loss's model."""
    loss.zero_grad()
    result = value()
    result.backward()
    return [
        result.detach(),
        *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in loss.model.parameters()),
    ]


def in_one_piece(loss: nn.Module, features: list[dict[str, Any]]) -> list[Tensor]:
    return gradients(loss, lambda: value_of(loss, copy.deepcopy(features)))


def through_the_cache(loss: nn.Module, features: list[dict[str, Any]]) -> list[Tensor]:
    """The same; the features that it was given are afterwards what they were, to the bit."""
    before = copy.deepcopy(features)
    result = gradients(loss, lambda: value_of(loss, features))
    for column, old in zip(features, before, strict=True):
        assert list(column) == list(old)
        for key, value in old.items():
            assert torch.equal(column[key], value) if isinstance(value, Tensor) else column[key] == value
    return result


def tiny_model(path: Path, **pooling: Any) -> SentenceTransformer:
    transformer = Transformer(str(path), max_seq_length=32)
    return SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), **pooling)], device="cpu"
    ).double()


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(scope="module")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a vocabulary of its own, for which texts are tokenized again."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("other")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    torch.manual_seed(1)
    BertModel(BertConfig(vocab_size=len(vocabulary), **SIZES)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def roberta_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny RoBERTa: a token's position is how many tokens up to it are not padding."""
    from transformers import RobertaConfig, RobertaModel

    path = tmp_path_factory.mktemp("roberta")
    torch.manual_seed(2)
    config = RobertaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=40, **SIZES
    )
    RobertaModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def cases() -> list[Any]:
    """For each objective and number of rows, negatives and options drawn from all that there are."""
    draw = random.Random(0)
    chosen = []
    for name in OBJECTIVES:
        for rows, count in ((1, 2), (7, 6), (33, 4)):
            for _ in range(count):
                negatives, options = draw.choice(NEGATIVES.get(name, (0, 1, 2, 3))), draw.choice(OPTIONS)
                if rows == 33 and options["mini_batch_size"] == 1:
                    negatives = min(negatives, 1)
                shown = "-".join(str(value) for value in options.values())
                chosen.append(pytest.param(name, rows, negatives, options, id=f"{name}-{rows}-{negatives}-{shown}"))
    return chosen


@pytest.mark.parametrize(("name", "rows", "negatives", "options"), cases())
def test_equals_the_loss_in_one_piece(
    bert: Any, close: Callable[..., None], name: str, rows: int, negatives: int, options: dict[str, Any]
) -> None:
    if name == "weighted" and rows == 1 and Version(sentence_transformers.__version__) < Version("6.2"):
        pytest.skip("stock's GlobalOrthogonalRegularizationLoss of one row is NaN before 6.2")
    model, guide = bert(), bert() if name == "guided" else None
    if guide is not None:
        torch.manual_seed(5)
        for parameter in guide.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    features = batch(model, rows, 2 + negatives)
    close(
        through_the_cache(around(name, "none", model, guide, **options), features),
        in_one_piece(around(name, "none", model, guide), features),
    )


@pytest.mark.parametrize(
    "options", [OPTIONS[13], {"mini_batch_size": 3, "packing": "none", "activation_budget": 10**5}]
)
@pytest.mark.parametrize("wrapper", ["matryoshka", "stock matryoshka"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_the_loss_in_one_piece_in_a_matryoshka_loss(
    bert: Any, close: Callable[..., None], name: str, wrapper: str, options: dict[str, Any]
) -> None:
    model, guide = bert(), bert() if name == "guided" else None
    features = batch(model, 7)
    close(
        through_the_cache(around(name, wrapper, model, guide, **options), features),
        in_one_piece(around(name, wrapper, model, guide), features),
    )


@pytest.mark.parametrize("options", [{"mini_batch_size": 32}, {"mini_batch_size": 1000, "unique_rows": True}])
@pytest.mark.parametrize("name", ["ranking", "objective"])
def test_equals_the_loss_in_one_piece_of_a_large_batch(
    bert: Any, close: Callable[..., None], name: str, options: dict[str, Any]
) -> None:
    model = bert()
    features = batch(model, 512, longest=3)
    close(
        through_the_cache(around(name, "none", model, None, **options), features),
        in_one_piece(around(name, "none", model, None), features),
    )


packings = pytest.mark.parametrize("packing", ["length", "none"])


@pytest.mark.parametrize("options", PACKINGS)
def test_a_guide_that_tokenizes_texts_itself(
    bert: Any, other_path: Path, close: Callable[..., None], options: dict[str, Any]
) -> None:
    model, guide = bert(), tiny_model(other_path)
    loss = around("guided", "none", model, guide, mini_batch_size=3, **options)
    assert loss.must_retokenize
    features = batch(model, 9, 3)
    close(through_the_cache(loss, features), in_one_piece(around("guided", "none", model, guide), features))


@pytest.fixture(scope="module")
def static() -> SentenceTransformer:
    """A model whose features are flat token ids and where each row starts."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, **{word: 1 + i for i, word in enumerate(WORDS)}}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=4)], device="cpu")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_static_embedding_is_refused_when_the_loss_is_built(static: Any, bert: Any, name: str) -> None:
    with pytest.raises(ValueError, match="a StaticEmbedding"):
        around(name, "none", static, bert(), mini_batch_size=3)


@pytest.mark.parametrize("packing", ["length", "none"])
def test_features_of_a_static_embedding_are_refused_too(static: Any, bert: Any, packing: str) -> None:
    """Of a model that did not show what it is when the loss was built."""
    loss = losses.CachedCoSENTLoss(bert(), mini_batch_size=3, packing=packing)
    loss.model = static
    with pytest.raises(ValueError, match="column 0 of the batch is an embedding bag"):
        value_of(loss, [static.preprocess(["how tall", "is the tower"] * 4)] * 2)


class Moved(nn.Module):
    """Moves each embedding by as much as its features say."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        embeddings = features["sentence_embedding"]
        shifts = torch.tensor(features["shifts"], dtype=embeddings.dtype).unsqueeze(1)
        features["sentence_embedding"] = embeddings + shifts * torch.linspace(0, 1, embeddings.shape[1])
        return features


class Inputs:
    """Models and the features of a batch for them, each a kind of input that preprocessing can give."""

    def __init__(self, bert_path: Path, roberta_path: Path) -> None:
        self.bert_path, self.roberta_path = bert_path, roberta_path

    def different_widths(self) -> tuple[Any, Any]:
        model = tiny_model(self.bert_path)
        return model, [*batch(model, 8, 1, longest=2), *batch(model, 8, 2, longest=25)]

    def left_padding(self) -> tuple[Any, Any]:
        model = tiny_model(self.bert_path)
        model.tokenizer.padding_side = "left"
        features = batch(model, 8, 3)
        assert not features[0]["attention_mask"][:, 0].all()
        return model, features

    def positions_that_count_tokens(self) -> tuple[Any, Any]:
        model = tiny_model(self.roberta_path)
        return model, [*batch(model, 8, 1, longest=2), *batch(model, 8, 2)]

    def positions_that_count_tokens_after_padding(self) -> tuple[Any, Any]:
        model = tiny_model(self.roberta_path)
        model.tokenizer.padding_side = "left"
        return model, batch(model, 8, 3)

    def prompts(self) -> tuple[Any, Any]:
        """A different one a column, none of them pooled."""
        model = tiny_model(self.bert_path, include_prompt=False)
        texts = [" ".join(WORDS[index : index + 1 + index % 5]) for index in range(24)]
        prompts = ("the query: ", "a passage of the book: ", None)
        columns = [model.preprocess(texts[i::3], prompt=prompt) for i, prompt in enumerate(prompts)]
        assert columns[0]["prompt_length"] != columns[1]["prompt_length"]
        return model, columns

    def prompts_after_padding(self) -> tuple[Any, Any]:
        model = tiny_model(self.bert_path, include_prompt=False)
        model.tokenizer.padding_side = "left"
        texts = [" ".join(WORDS[index : index + 1 + index % 5]) for index in range(16)]
        return model, [model.preprocess(texts[i::2], prompt="query: ") for i in range(2)]

    def prompt_lengths_as_tensors(self) -> tuple[Any, Any]:
        """One number for each row, as an IterableDataset gives it."""
        model, columns = self.prompts()
        for column in columns[:2]:
            column["prompt_length"] = torch.full((8,), column["prompt_length"])
        return model, columns

    def tasks_of_a_router(self) -> tuple[Any, Any]:
        def tower() -> list[Any]:
            return [Transformer(str(self.bert_path), max_seq_length=32), Pooling(32)]

        model = SentenceTransformer(modules=[Router.for_query_document(tower(), tower())], device="cpu").double()
        texts = [" ".join(WORDS[index : index + 1 + index % 5]) for index in range(16)]
        columns = [model.preprocess(texts[i::2], task=task) for i, task in enumerate(("query", "document"))]
        assert columns[0]["task"] != columns[1]["task"]
        return model, columns

    def token_types(self) -> tuple[Any, Any]:
        model = tiny_model(self.bert_path)
        features = batch(model, 8)
        for column in features:
            column["token_type_ids"][::2, 1:] = 1
        return model, features

    def rows_of_padding_alone(self) -> tuple[Any, Any]:
        model = tiny_model(self.bert_path)
        features = batch(model, 8)
        features[0]["attention_mask"][2] = 0
        features[1]["attention_mask"][5:] = 0
        return model, features

    def a_list_of_one_entry_a_row(self) -> tuple[Any, Any]:
        """As an input module of one's own puts it beside the tensors."""
        model = tiny_model(self.bert_path)
        model.append(Moved())
        return model, [
            {**column, "shifts": [1 + row % 3 + position for row in range(8)]}
            for position, column in enumerate(batch(model, 8, 3))
        ]

    def strided_tensors(self) -> tuple[Any, Any]:
        model = tiny_model(self.bert_path)
        features = batch(model, 8)
        strided = [
            {key: value.T.contiguous().T if isinstance(value, Tensor) else value for key, value in column.items()}
            for column in features
        ]
        assert not strided[0]["input_ids"].is_contiguous()
        return model, strided


@pytest.fixture(scope="module")
def inputs(bert_path: Path, roberta_path: Path) -> Inputs:
    return Inputs(bert_path, roberta_path)


@packings
@pytest.mark.parametrize("case", [name for name in vars(Inputs) if not name.startswith("_")])
def test_every_kind_of_features(inputs: Inputs, close: Callable[..., None], case: str, packing: str) -> None:
    model, features = getattr(inputs, case)()
    expected = in_one_piece(around("ranking", "none", model, None), features)
    for options in ({"mini_batch_size": 3}, {"mini_batch_size": 1}, {"mini_batch_num_tokens": 25}):
        loss = around("ranking", "none", model, None, packing=packing, **options)
        close(through_the_cache(loss, features), expected)


def with_dropout(model: nn.Module, p: float = 0.1) -> nn.Module:
    """Of hidden states and of attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return model.train()


@pytest.mark.parametrize("budget", [None, 200_000, 2**40])
@pytest.mark.parametrize("name", ["ranking", "symmetric", "guided"])
def test_without_packing_dropout_draws_what_stock_s_does(
    bert: Any, close: Callable[..., None], name: str, budget: int | None
) -> None:
    """From one seed the same loss and gradients, and the generator ends in the same state; a guide draws too."""
    results, states = [], []
    for module in (stock, losses):
        model, guide = with_dropout(bert()), with_dropout(bert())
        options = {"mini_batch_size": 3}
        if module is losses:
            options |= {"packing": "none", "activation_budget": budget}
        if name == "guided":
            loss = module.CachedGISTEmbedLoss(model, guide, **GUIDED, **options)
        elif name == "symmetric":
            loss = module.CachedMultipleNegativesSymmetricRankingLoss(model, **options)
        else:
            loss = module.CachedMultipleNegativesRankingLoss(model, **options)
        features = batch(model, 8)
        torch.manual_seed(11)
        results.append(gradients(loss, lambda loss=loss, features=features: value_of(loss, features)))
        states.append(torch.get_rng_state())
    close(*results, replayed=True)
    assert torch.equal(*states)


class Normalised(nn.Sequential):
    """An encoder whose rows depend on each other, and that remembers what it has seen."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Embedding(50, 8, padding_idx=0), nn.BatchNorm1d(8))
        self.double()

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        embeddings = self[0](features["input_ids"]).sum(1)
        return {"sentence_embedding": self[1](embeddings)}


def test_an_encoder_whose_rows_depend_on_each_other(close: Callable[..., None]) -> None:
    """Without packing and without kept activations: the loss, gradients and running statistics of stock."""
    ids = torch.randint(1, 50, (2, 8, 4), generator=torch.Generator().manual_seed(0))
    columns = [{"input_ids": column, "attention_mask": torch.ones_like(column)} for column in ids]
    results = []
    for module, options in ((losses, {"packing": "none", "activation_budget": 0}), (stock, {})):
        model = Normalised()
        loss = module.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4, **options)
        results.append([*gradients(loss, lambda loss=loss: value_of(loss, columns)), *model[1].buffers()])
    close(*results, replayed=True)


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[tuple[bytes, Tensor, bool, torch.dtype]]]:
    """What a model was given, what it made of it, whether with a graph, and the type that its layers computed in."""
    calls: list[tuple[bytes, Tensor, bool, torch.dtype]] = []
    types: list[torch.dtype] = []

    def record(_: Any, inputs: Any, output: dict[str, Tensor]) -> None:
        embeddings = output["sentence_embedding"]
        content = output["input_ids"].numpy().tobytes()
        calls.append((content, embeddings.detach().clone(), embeddings.requires_grad, types[-1]))

    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    handles = [
        layer.register_forward_hook(lambda _, __, output: types.append(output.dtype)),
        model.register_forward_hook(record),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@packings
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("budget", [0, 200_000])
@pytest.mark.parametrize("name", ["ranking", "guided", "objective"])
def test_the_replay_embeds_as_the_first_pass_did_to_the_bit(
    bert: Any, name: str, packing: str, autocast: bool, budget: int
) -> None:
    """With dropout, under autocast too, and with the backward pass outside of it."""
    model, guide = with_dropout(bert(torch.float32)), with_dropout(bert(torch.float32)) if name == "guided" else None
    loss = around(name, "none", model, guide, mini_batch_size=3, packing=packing, activation_budget=budget)
    features = [
        model.preprocess([f"{word} {WORDS[i]} {column}" for i, word in enumerate(WORDS[:9])]) for column in "ab"
    ]
    with recorded(model) as calls:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            value = value_of(loss, features)
        torch.rand(3)
        value.backward()
    first = {content: output for content, output, *_ in calls[: len({content for content, *_ in calls})]}
    replayed = calls[len(first) :]
    assert replayed or budget
    if not budget:
        assert len(replayed) == len(first)
    for content, output, graph, _ in replayed:
        assert graph
        assert torch.equal(output, first[content])
    assert {dtype for *_, dtype in calls} == {torch.bfloat16 if autocast else torch.float32}
    assert all(p.grad is not None for n, p in model.named_parameters() if "pooler" not in n)


@pytest.mark.parametrize("name", ["guided", "cosent", "weighted", "objective"])
def test_two_forwards_then_one_scaled_backward(bert: Any, close: Callable[..., None], name: str) -> None:
    """As a gradient scaler and accumulation do, of batches of different sizes."""
    model, guide = bert(), bert() if name == "guided" else None
    first, second = batch(model, 8), batch(model, 5)
    results = []
    for options in ({}, {"mini_batch_size": 3, "activation_budget": 200_000}):
        loss = around(name, "none", model, guide, **options)
        results.append(
            gradients(
                loss, lambda loss=loss: 1024 * (value_of(loss, copy.deepcopy(first)) + 2 * value_of(loss, second))
            )
        )
    close(results[1], results[0])


def test_a_column_that_the_loss_does_not_read_is_refused(bert: Any) -> None:
    model = bert()
    with pytest.raises(ValueError, match=r"did not use input column\(s\) 2\b"):
        value_of(losses.CachedCoSENTLoss(model, mini_batch_size=3), batch(model, 7, 3))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "foo"}, r"packing.*'foo'"),
        ({"activation_budget": -1}, r"activation_budget.*-1"),
        ({"unique_rows": "yes"}, r"unique_rows.*'yes'"),
        ({"unique_rows": True, "packing": "none"}, "unique_rows=True needs packing='length'"),
    ],
)
def test_bad_options_are_named(bert: Any, name: str, options: dict[str, Any], message: str) -> None:
    model = bert()
    with pytest.raises((ValueError, TypeError), match=message):
        around(name, "none", model, model, mini_batch_size=3, **options)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_whatever_equals_an_integer_is_a_mini_batch(bert: Any, name: str) -> None:
    """As in stock, whose arithmetic takes them; the loss shows the integer."""
    model, guide = bert(), bert() if name == "guided" else None
    loss = around(name, "none", model, guide, mini_batch_size=torch.tensor(3), mini_batch_num_tokens=1e4)
    shown = loss.get_config_dict()
    for key, number in (("mini_batch_size", 3), ("mini_batch_num_tokens", 10_000)):
        assert type(shown[key]) is int
        assert shown[key] == number
    loss.mini_batch_num_tokens = None
    loss.mini_batch_size = True
    assert value_of(loss, batch(model, 3)).isfinite()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_options_that_are_set_are_kept_and_shown(bert: Any, name: str) -> None:
    """In the configuration, and by copies; those that are not set leave the configuration what it is in stock."""
    model, guide = bert(), bert() if name == "guided" else None
    new = {"unique_rows": True, "activation_budget": 5}
    plain = around(name, "none", model, guide, mini_batch_size=3)
    loss = around(name, "none", model, guide, mini_batch_size=3, **new)
    assert loss.get_config_dict() == plain.get_config_dict() | new
    copied = copy.deepcopy(loss).get_config_dict()
    assert {name: copied[name] for name in new} == new
    assert not new.keys() & plain.get_config_dict().keys()


class OwnStage(losses.CachedCoSENTLoss):
    """A subclass that back-propagates its loss itself, and returns it as it is."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        loss = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if with_backward:
            loss.backward()
        return loss


def test_a_stage_of_one_s_own_may_return_its_loss_attached(bert: Any, close: Callable[..., None]) -> None:
    """As over stock's gradient cache, which detaches it."""
    model = bert()
    features = batch(model, 7)
    loss, plain = OwnStage(model, mini_batch_size=3), losses.CoSENTLoss(model)
    expected = gradients(plain, lambda: value_of(plain, features))
    close(gradients(loss, lambda: value_of(loss, features)), expected)


def test_gradients_may_be_asked_for_by_parameter(bert: Any) -> None:
    """``backward(inputs=...)`` of the loss runs the second pass, as over stock's gradient cache."""
    model = bert()
    wanted = [p for n, p in model.named_parameters() if "pooler" not in n]
    loss = value_of(losses.CachedCoSENTLoss(model, mini_batch_size=3), batch(model, 7))
    loss.backward(inputs=wanted)
    assert all(p.grad is not None for p in wanted)


def test_an_override_that_wraps_stock_s_method_is_called(bert: Any) -> None:
    """``functools.wraps`` makes it say that it is stock's."""
    model = bert()
    loss, calls = losses.CachedCoSENTLoss(model, mini_batch_size=3), []
    original = loss.embed_minibatch

    @functools.wraps(original)
    def counted(**kwargs: Any) -> Any:
        calls.append(kwargs["with_grad"])
        return original(**kwargs)

    loss.embed_minibatch = counted
    value_of(loss, batch(model, 7)).backward()
    assert calls == [False] * 6 + [True] * 6


@pytest.mark.parametrize("options", [{}, {"packing": "none", "activation_budget": 10**9}], ids=str)
def test_options_that_an_override_cannot_have_are_logged(
    bert: Any, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    model = bert()
    loss = losses.CachedCoSENTLoss(model, mini_batch_size=3, **options)
    original = loss.embed_minibatch
    loss.embed_minibatch = lambda **kwargs: original(**kwargs)
    value_of(loss, batch(model, 7))
    assert caplog.text.count("its embed_minibatch was overridden") == 1


def test_lists_that_an_override_has_to_cut_are_logged(bert: Any, caplog: pytest.LogCaptureFixture) -> None:
    """They reach it whole, as stock hands them."""
    model = bert()
    loss = losses.CachedCoSENTLoss(model, mini_batch_size=3)
    original = loss.embed_minibatch
    loss.embed_minibatch = lambda **kwargs: original(**kwargs)
    value_of(loss, [{**column, "names": list("abcdefg")} for column in batch(model, 7)])
    assert caplog.text.count("['names']") == 1


@pytest.mark.parametrize("name", ["cosent", "weighted"])
def test_an_iterator_of_one_s_own_is_refused_where_nothing_calls_it(bert: Any, name: str) -> None:
    model = bert()
    loss = around(name, "none", model, None, mini_batch_size=3)
    loss.embed_minibatch_iter = lambda **kwargs: iter(())
    with pytest.raises(TypeError, match="override embed_minibatch"):
        value_of(loss, batch(model, 7))
