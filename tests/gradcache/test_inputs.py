"""GradCache takes every kind of input that an encoder does, and gives the gradients of embedding it in one piece."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbert_kernels import GradCache
from support.gradcache import ROWS, Tokens, assert_unchanged, contrast, embed, parameters, token_column
from support.gradients import value_and_gradients
from support.numbers import assert_close


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
    expected = value_and_gradients(lambda: contrast(embed(encoders, columns, *encode)), tensors)
    for mini_batch_size in (1, 3, 100):
        cache = GradCache(
            encoders, contrast, mini_batch_size=mini_batch_size, packing=packing, encode=encode[0] if encode else None
        )
        assert_close(value_and_gradients(lambda cache=cache: cache(columns), tensors), expected)
    assert_unchanged(columns, before)
