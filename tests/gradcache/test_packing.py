"""Which rows go together: each once, unchanged, within the budget, never beside a row that preprocesses otherwise."""

from __future__ import annotations

import copy
import itertools
from collections import deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.base.losses.gradcache import _create_minibatch, _minibatch_ranges
from torch import Tensor

from sbert_kernels.gradcache import packing as packs
from sbert_kernels.gradcache.packing import CALL_TOKENS, Limits, Pool, Sliced, pack

Batch = list[dict[str, Any]]


def make_pools(batch: Any, encoders: Any, limits: Limits, **options: Any) -> list[Pool | Sliced]:
    """With the same limits for every column."""
    return packs.make_pools(batch, encoders, [limits] * len(batch), **options)


def column(lengths: list[int], *, width: int = 0, left: bool = False, pad: int = 0, start: int = 100) -> dict[str, Any]:
    """A column of padded texts of the given lengths, each token of it a number that occurs nowhere else in it."""
    width = max(width, *lengths)
    ids = torch.full((len(lengths), width), pad)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    types = torch.zeros_like(mask)
    for row, length in enumerate(lengths):
        own = slice(width - length, width) if left else slice(0, length)
        ids[row, own] = start + row * width + torch.arange(length)
        mask[row, own] = 1
        types[row, own] = torch.arange(length) % 2
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@st.composite
def batches(draw: st.DrawFn, most_rows: int = 9, most_tokens: int = 12) -> Batch:
    """One to four columns; their prompts, tasks, sides and kinds of padding, and keys, differ or not."""
    batch: Batch = []
    for position in range(draw(st.integers(1, 4))):
        features = column(
            draw(st.lists(st.integers(1, most_tokens), min_size=1, max_size=most_rows)),
            width=draw(st.integers(1, most_tokens + 2)),
            left=draw(st.booleans()),
            pad=draw(st.sampled_from([0, 1])),
            start=1000 * (position + 1),
        )
        if draw(st.booleans()):
            del features["token_type_ids"]
        if draw(st.booleans()):
            features["prompt_length"] = draw(st.integers(2, 3))
        if draw(st.booleans()):
            features["task"] = draw(st.sampled_from(["query", "document"]))
        if draw(st.booleans()):
            features["pixel_values"] = torch.randn(len(features["input_ids"]), 3, 2, 2)
        batch.append(features)
    return batch


limits = st.builds(Limits, rows=st.integers(1, 9), tokens=st.none() | st.integers(1, 60))


def sources(pools: list[Pool | Sliced], batch: Batch) -> list[list[list[tuple[int, int]]]]:
    """For each pool, the (column, row) pairs of the batch that each of its rows stands for."""
    found = []
    for pool in pools:
        rows: list[list[tuple[int, int]]] = [[] for _ in range(pool.rows)]
        for position in pool.columns:
            index = pool.index(position)
            for row in range(len(batch[position]["input_ids"])):
                rows[row if index is None else int(index[row])].append((position, row))
        found.append(rows)
    return found


def content(features: dict[str, Any], row: int) -> dict[str, Any]:
    """A row's features up to its last token, and whatever belongs to all rows."""
    mask = features["attention_mask"]
    active = mask[row].nonzero()
    end = int(active.max()) + 1 if len(active) else mask.shape[1]
    return {
        key: value
        if not isinstance(value, Tensor)
        else value[row, :end].tolist()
        if value.ndim == 2
        else value[row].tolist()
        for key, value in features.items()
    }


@given(batch=batches(), limits=limits, packing=st.sampled_from(["length", "none"]), unique=st.booleans())
def test_every_row_is_in_exactly_one_mini_batch(batch: Batch, limits: Limits, packing: str, unique: bool) -> None:
    pools = make_pools(batch, [0] * len(batch), limits, packing=packing, unique_rows=unique)
    assert sorted(position for pool in pools for position in pool.columns) == list(range(len(batch)))
    for pool, rows in zip(pools, sources(pools, batch), strict=True):
        packed = np.concatenate([mini_batch.rows for mini_batch in pool.mini_batches])
        assert sorted(packed.tolist()) == list(range(pool.rows))
        assert all(rows), "a row that stands for none of the batch"


@given(batch=batches(), limits=limits, unique=st.booleans())
def test_a_mini_batch_holds_its_rows_as_they_were(batch: Batch, limits: Limits, unique: bool) -> None:
    """Tokens, mask and types of each up to its last token, leading padding with them; then only padding."""
    pools = make_pools(batch, [0] * len(batch), limits, unique_rows=unique)
    for pool, rows in zip(pools, sources(pools, batch), strict=True):
        for mini_batch in pool.mini_batches:
            features = mini_batch.features()
            width = features["input_ids"].shape[1]
            longest = 0
            for place, row in enumerate(mini_batch.rows):
                for position, own in rows[row]:
                    original = batch[position]
                    expected = content(original, own)
                    assert list(features) == list(original)
                    assert content(features, place) == expected
                    end = len(expected["input_ids"])
                    longest = max(longest, end)
                    assert not features["attention_mask"][place, end:].any()
                    if "token_type_ids" in original:
                        assert not features["token_type_ids"][place, end:].any()
            assert width == longest
            assert mini_batch.tokens == width * len(mini_batch.rows)
            assert all(
                features[key].dtype == value.dtype for key, value in original.items() if isinstance(value, Tensor)
            )


@given(batch=batches(), limits=limits)
def test_no_mini_batch_is_over_the_budget_unless_it_is_one_row(batch: Batch, limits: Limits) -> None:
    """The widest that stock would embed of any column on the same route, or the number of tokens that is given."""
    for pool in make_pools(batch, [0] * len(batch), limits):
        task = batch[pool.columns[0]].get("task")
        stock = [
            min(limits.rows, _rows(features))
            * max(len(content(features, row)["input_ids"]) for row in range(_rows(features)))
            for features in batch
            if features.get("task") == task
        ]
        for mini_batch in pool.mini_batches:
            assert len(mini_batch.rows) == 1 or mini_batch.features()["input_ids"].numel() <= (
                limits.tokens or max(stock)
            )


def test_a_number_of_tokens_is_the_only_limit() -> None:
    """As in stock: the number of rows says nothing then."""
    (pool,) = make_pools([column([2] * 50)], [0], Limits(rows=1, tokens=100))
    assert [len(mini_batch.rows) for mini_batch in pool.mini_batches] == [50]


@given(batch=batches(), limits=limits, encoders=st.lists(st.integers(0, 1), min_size=4, max_size=4))
def test_columns_that_preprocess_otherwise_never_mix(batch: Batch, limits: Limits, encoders: list[int]) -> None:
    for pool in make_pools(batch, encoders[: len(batch)], limits):
        first, *others = pool.columns
        for other in others:
            assert encoders[first] == encoders[other]
            assert set(batch[first]) == set(batch[other])
            assert all(batch[first].get(key) == batch[other].get(key) for key in ("prompt_length", "task"))


def test_columns_that_preprocess_alike_share_a_pool() -> None:
    """Whatever their widths and lengths; a short text of one then fills a mini-batch of the other."""
    batch = [column([3, 2, 5]), column([9, 2, 4], width=11)]
    (pool,) = make_pools(batch, [0, 0], Limits(rows=32, tokens=100))
    assert pool.columns == (0, 1)
    assert len(pool.mini_batches) == 1
    assert len(make_pools(batch, [0, 1], Limits(rows=32))) == 2


def _rows(features: dict[str, Any]) -> int:
    return len(features["attention_mask"])


PARTIALLY = {
    "dtype": lambda features: features | {"token_type_ids": features["token_type_ids"].to(torch.int32)},
    "float padding of another width": lambda features: (
        features | {"inputs_embeds": torch.zeros(*features["input_ids"].shape, 2)}
    ),
    "image of another size": lambda features: features | {"pixel_values": torch.zeros(_rows(features), 3, 4, 4)},
    "a number for all rows": lambda features: features | {"temperature": torch.tensor(2.0)},
    "a list for all rows": lambda features: features | {"names": ["a", "b", "c", "d"]},
}


@pytest.mark.parametrize("difference", PARTIALLY)
def test_columns_with_the_same_keys_may_differ_too(difference: str) -> None:
    first = PARTIALLY[difference](column([3, 2, 5], width=6))
    second = {
        "dtype": column([3, 4], width=6),
        "float padding of another width": PARTIALLY[difference](column([3, 4], width=7)),
        "image of another size": column([3, 4], width=6) | {"pixel_values": torch.zeros(2, 3, 5, 5)},
        "a number for all rows": column([3, 4], width=6) | {"temperature": torch.tensor(3.0)},
        "a list for all rows": column([3, 4], width=6) | {"names": ["a", "b", "c", "e"]},
    }[difference]
    assert len(make_pools([first, second], [0, 0], Limits(rows=4))) == 2
    assert len(make_pools([first, copy.deepcopy(first)], [0, 0], Limits(rows=4))) == 1


IMAGES = {
    "pixel_values": torch.randn(8, 6),
    "image_grid_thw": torch.tensor([[1, 2, 1]] * 4),
    "num_images_per_sample": torch.tensor([1, 0, 1, 1, 1]),
}


@pytest.mark.parametrize(
    "features",
    [
        torch.randn(5, 3),
        {"sentence_embedding": torch.randn(5, 3)},
        column([4, 1, 3, 3, 2]) | {"query_expansion_positions": torch.eye(5, 4, dtype=torch.bool)},
        column([4, 1, 3, 3, 2]) | IMAGES,
        column([4, 1, 3, 3, 2]) | {"per_token_of_the_batch": torch.arange(13)},
        column([4, 1, 3, 3, 2]) | {"of_tokens_or_not": torch.randn(5, 4)},
    ],
    ids=["tensor", "no mask", "expansion", "image grid", "another first dimension", "a dimension as large"],
)
def test_what_has_no_rows_of_tokens_is_cut_as_stock_does(features: Any) -> None:
    (pool,) = make_pools([features], [0], Limits(rows=2))
    assert isinstance(pool, Sliced)
    for mini_batch, begin in zip(pool.mini_batches, (0, 2, 4), strict=True):
        assert mini_batch.rows.tolist() == list(range(5))[begin : begin + 2]
        ours = mini_batch.features()
        if isinstance(features, Tensor):
            assert torch.equal(ours, features[begin : begin + 2])
            continue
        same(ours, _create_minibatch(features, begin, begin + 2))


def test_flattened_inputs_are_cut_as_stock_does() -> None:
    ends = torch.tensor([0, 4, 5, 8, 10], dtype=torch.int32)
    features = {
        "input_ids": torch.arange(10)[None],
        "position_ids": torch.arange(10)[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": 4,
        "max_length_k": 4,
    }
    (pool,) = make_pools([features], [0], Limits(rows=32, tokens=5))
    assert [mini_batch.rows.tolist() for mini_batch in pool.mini_batches] == [[0, 1], [2, 3]]
    for mini_batch, (begin, end) in zip(pool.mini_batches, ((0, 2), (2, 4)), strict=True):
        same(mini_batch.features(), _create_minibatch(features, begin, end))


@given(batch=batches(), limits=limits)
def test_without_packing_they_are_stock_s_mini_batches(batch: Batch, limits: Limits) -> None:
    pools = make_pools(batch, [0] * len(batch), limits, packing="none")
    for pool, features in zip(pools, batch, strict=True):
        ranges = _minibatch_ranges(features, limits.rows, limits.tokens)
        for mini_batch, (begin, end) in zip(pool.mini_batches, ranges, strict=True):
            assert mini_batch.rows.tolist() == list(range(begin, end))
            same(mini_batch.features(), _create_minibatch(features, begin, end))


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value) if isinstance(value, Tensor) else ours[key] == value


@given(batch=batches(), limits=limits, packing=st.sampled_from(["length", "none"]))
def test_modules_may_write_into_the_features_of_a_mini_batch(batch: Batch, limits: Limits, packing: str) -> None:
    """Neither the batch nor the second pass over it sees what the first pass wrote."""
    before = copy.deepcopy(batch)
    mini_batches = [
        mini_batch
        for pool in make_pools(batch, [0] * len(batch), limits, packing=packing)
        for mini_batch in pool.mini_batches
    ]
    first = [mini_batch.features() for mini_batch in mini_batches]
    kept = copy.deepcopy(first)
    for features in first:
        for value in features.values():
            if isinstance(value, Tensor):
                value.zero_()
        features.clear()
    for ours, theirs in zip(batch, before, strict=True):
        same(ours, theirs)
    for mini_batch, theirs in zip(mini_batches, kept, strict=True):
        same(mini_batch.features(), theirs)


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_what_the_column_itself_pads_with(left: bool) -> None:
    """Else what the caller says, for a column that shows none."""
    batch = [column([3, 2], pad=7, left=left), column([6, 5], pad=8, start=200), column([4, 4], start=300)]
    (pool,) = make_pools(batch, [0] * 3, Limits(rows=32, tokens=100), pad=[9, 9, 9])
    (mini_batch,) = pool.mini_batches
    first = [7, 101 + 2, 104] if left else [103, 104, 7]
    assert mini_batch.features()["input_ids"].tolist() == [
        [100, 101, 102, 7, 7, 7],
        [*first, 7, 7, 7],
        [200, 201, 202, 203, 204, 205],
        [206, 207, 208, 209, 210, 8],
        [300, 301, 302, 303, 9, 9],
        [304, 305, 306, 307, 9, 9],
    ]


def test_a_row_of_padding_alone_keeps_its_width() -> None:
    features = column([3, 2, 5])
    features["attention_mask"][1] = 0
    (pool,) = make_pools([features], [0], Limits(rows=1))
    assert sorted(mini_batch.features()["input_ids"].shape[1] for mini_batch in pool.mini_batches) == [3, 5, 5]


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    repeats=st.lists(st.integers(0, 11), max_size=12),
    widths=st.tuples(st.integers(4, 6), st.integers(4, 6)),
    cut=st.integers(1, 23),
)
def test_unique_rows_are_those_that_are_equal_in_every_key(
    lengths: list[int], repeats: list[int], widths: tuple[int, int], cut: int
) -> None:
    """In columns of two widths, of few ids and lengths, so that rows are equal, or differ in one key, by chance."""
    generator = torch.Generator().manual_seed(len(lengths))
    lengths = lengths + [lengths[index % len(lengths)] for index in repeats]
    cut = min(cut, len(lengths))
    batch = []
    for own, width in ((lengths[:cut], widths[0]), (lengths[cut:], widths[1])):
        if own:
            features = column(own, width=width)
            for key in ("input_ids", "token_type_ids"):
                features[key] = features["attention_mask"] * torch.randint(1, 3, (len(own), width), generator=generator)
            batch.append(features | {"weight": torch.randint(0, 2, (len(own),), generator=generator).bfloat16()})
    (pool,) = make_pools(batch, [0] * len(batch), Limits(rows=32), unique_rows=True)
    (rows,) = sources([pool], batch)
    groups = [[content(batch[position], row) for position, row in group] for group in rows]
    assert all(member == group[0] for group in groups for member in group)
    assert all(one[0] != other[0] for one, other in itertools.combinations(groups, 2))


Record = namedtuple("Record", ["a", "b", "c"])
LISTED = column([2, 2, 2])


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["a", "b", "a"], 2),
        (("a", "a", "a"), 1),
        ([torch.tensor([1.0, 2.0]), torch.tensor([1.0]), torch.arange(1.0, 3.0)], 2),
        ([torch.tensor(1), torch.tensor(1.0), torch.tensor(1, dtype=torch.bfloat16)], 3),
        (np.array([[1, 2], [1, 3], [1, 3]]), 2),
        (np.array(["a", "a", "b"], dtype=object), 2),
        ([lambda: None, lambda: None, lambda: None], 3),
    ],
    ids=["list", "tuple", "tensors", "types", "array", "objects", "what cannot be compared"],
)
def test_unique_rows_are_equal_in_their_lists_too(values: Any, classes: int) -> None:
    features = LISTED | {"input_ids": torch.ones(3, 2, dtype=torch.int64), "values": values}
    (pool,) = make_pools([features], [0], Limits(rows=32), unique_rows=True)
    assert pool.rows == classes


@pytest.mark.parametrize("values", [["a", "b", "c"], ("a", "b", "c"), np.array([1, 2, 3])], ids=repr)
def test_columns_whose_lists_are_of_one_kind_share_a_pool(values: Any) -> None:
    (pool,) = make_pools([LISTED | {"values": values}] * 2, [0, 0], Limits(rows=2))
    for mini_batch in pool.mini_batches:
        taken = mini_batch.features()["values"]
        assert type(taken) is type(values)
        assert list(taken) == [values[row % 3] for row in mini_batch.rows]
    other = {"values": np.array([1.5, 2, 3]) if isinstance(values, np.ndarray) else np.array(values)}
    assert len(make_pools([LISTED | {"values": values}, LISTED | other], [0, 0], Limits(rows=2))) == 2


OF_ALL_ROWS = {
    "modality": ("text", "image", "audio"),
    "prompt_length": [1, 1, 1],
    "task": "any",
    "shape": torch.Size([3, 2, 2]),
    "record": Record(1, 2, 3),
    "word": "abc",
    "names": ["a", "b"],
    "number": np.array(3),
    "table": np.zeros((2, 3)),
    "options": {"sizes": [1, 2]},
    "nothing": None,
}


@pytest.mark.parametrize("packing", ["length", "none"])
def test_what_belongs_to_all_rows_is_handed_on_as_it_is(packing: str) -> None:
    for pool in make_pools([LISTED | OF_ALL_ROWS], [0], Limits(rows=2), packing=packing):
        for mini_batch in pool.mini_batches:
            features = mini_batch.features()
            assert all(features[key] is value for key, value in OF_ALL_ROWS.items())


@pytest.mark.parametrize("packing", ["length", "none"])
@pytest.mark.parametrize(
    "value",
    [
        {"names": ["a", "b", "c"]},
        [["a", "b", "c"], ["d", "e", "f"]],
        {"deep": [{"inputs": torch.zeros(3, 2)}]},
        Record(torch.zeros(3, 2), None, None),
        tuple((torch.zeros(3, 2), torch.zeros(3, 2)) for _ in range(3)),
        deque(["a", "b", "c"]),
        range(3),
    ],
    ids=["dictionary", "fields", "deep", "record", "layers", "deque", "range"],
)
def test_rows_that_hide_are_refused_by_name(value: Any, packing: str) -> None:
    batch = [LISTED, LISTED | {"extra": value}]
    with pytest.raises(ValueError, match=r"column 1 of the batch: 'extra', a \w+, may have one entry for each"):
        make_pools(batch, [0, 0], Limits(rows=2), packing=packing)


def test_a_single_row_is_never_cut_whatever_stands_beside_it() -> None:
    """A list of one entry may be the row's or all rows': columns that have one are not mixed."""
    features = column([2]) | {"values": ["a"], "options": {"names": ["a"]}}
    pools = make_pools([features, features], [0, 0], Limits(rows=2))
    assert [pool.columns for pool in pools] == [(0,), (1,)]
    for pool in pools:
        (mini_batch,) = pool.mini_batches
        assert mini_batch.features()["values"] == ["a"]


def cost(lengths: np.ndarray, groups: list[np.ndarray], per_call: int) -> int:
    return sum(len(group) * int(lengths[group].max()) + per_call for group in groups)


some_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(np.asarray)


@given(lengths=some_lengths, budget=st.integers(1, 400), per_call=st.sampled_from([0, 1, 64, 2048]))
def test_packs_each_row_once_within_the_budget(lengths: np.ndarray, budget: int, per_call: int) -> None:
    groups = pack(lengths, budget, per_call)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    assert all(len(group) * lengths[group].max() <= budget or len(group) == 1 for group in groups)
    longest = [lengths[group].max() for group in groups]
    assert longest == sorted(longest, reverse=True)


@given(lengths=some_lengths, rows=st.integers(1, 16), per_call=st.sampled_from([0, *CALL_TOKENS.values(), 2048]))
def test_never_more_padded_tokens_than_stock_s_order(lengths: np.ndarray, rows: int, per_call: int) -> None:
    """Unless that saves calls, by what a call costs.

    Texts of one length are kept together, which may take one call more for each place where stock's mini-batches, once
    sorted, divide such texts.
    """
    stock = [np.arange(begin, min(begin + rows, len(lengths))) for begin in range(0, len(lengths), rows)]
    budget = min(rows, len(lengths)) * int(lengths.max())
    ordered = np.sort(lengths)[::-1]
    divided = sum(int(ordered[cut - 1] == ordered[cut]) for cut in range(rows, len(lengths), rows))
    assert (
        cost(lengths, pack(lengths, budget, per_call), per_call) <= cost(lengths, stock, per_call) + per_call * divided
    )


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 20_000), min_size=1, max_size=40).map(np.asarray), rows=st.integers(1, 8))
def test_texts_longer_than_the_search_tells_apart(lengths: np.ndarray, rows: int) -> None:
    """Audio has that many samples. Lengths are taken together in steps; the budget holds exactly."""
    budget = rows * int(lengths.max())
    groups = pack(lengths, budget, CALL_TOKENS["cpu"])
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    assert all(len(group) * lengths[group].max() <= budget for group in groups)
