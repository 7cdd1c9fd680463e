"""The cached losses on every kind of features that preprocessing can give: the plain loss's value and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from torch import Tensor, nn

from sbert_kernels import losses
from support.cached_losses import (
    OBJECTIVES,
    PACKINGS,
    WORDS,
    around,
    batch,
    in_one_piece,
    through_the_cache,
    value_of,
)
from support.numbers import assert_close


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


@pytest.mark.parametrize("options", PACKINGS)
def test_a_guide_that_tokenizes_texts_itself(bert: Any, other_path: Path, options: dict[str, Any]) -> None:
    model, guide = bert(), tiny_model(other_path)
    loss = around("guided", "none", model, guide, mini_batch_size=3, **options)
    assert loss.must_retokenize
    features = batch(model, 9, 3)
    assert_close(through_the_cache(loss, features), in_one_piece(around("guided", "none", model, guide), features))


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


def test_a_column_that_the_loss_does_not_read_is_refused(bert: Any) -> None:
    model = bert()
    with pytest.raises(ValueError, match=r"did not use input column\(s\) 2\b"):
        value_of(losses.CachedCoSENTLoss(model, mini_batch_size=3), batch(model, 7, 3))


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


packings = pytest.mark.parametrize("packing", ["length", "none"])


@packings
@pytest.mark.parametrize("case", [name for name in vars(Inputs) if not name.startswith("_")])
def test_every_kind_of_features(inputs: Inputs, case: str, packing: str) -> None:
    model, features = getattr(inputs, case)()
    expected = in_one_piece(around("ranking", "none", model, None), features)
    for options in ({"mini_batch_size": 3}, {"mini_batch_size": 1}, {"mini_batch_num_tokens": 25}):
        loss = around("ranking", "none", model, None, packing=packing, **options)
        assert_close(through_the_cache(loss, features), expected)
