"""Equal texts have equal ids, whatever the layout of the batch; different texts have different ones."""

from __future__ import annotations

import pytest
import torch

from sbert_kernels.losses._row_ids import row_ids

ROWS = [[5, 6, 7], [5], [7, 6, 5], [5, 6, 7], [5, 0], [0, 5]]


def padded(rows: list[list[int]], width: int, left: bool = False) -> dict[str, torch.Tensor]:
    ids, mask = torch.full((len(rows), width), 99), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def test_ids_depend_on_the_tokens_alone() -> None:
    flat = torch.tensor([token for row in ROWS for token in row])
    ends = torch.tensor([len(row) for row in ROWS]).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    expected = row_ids(padded(ROWS, 3))
    for features in (
        padded(ROWS, 8),
        padded(ROWS, 5, left=True),
        {"input_ids": flat[None], "cu_seq_lens_q": starts.int()},
        {"input_ids": flat, "offsets": starts[:-1]},
    ):
        assert torch.equal(row_ids(features), expected)
    assert expected[0] == expected[3]
    assert len(expected.unique()) == len(ROWS) - 1


def test_an_empty_row_keeps_its_place() -> None:
    ids = row_ids({"input_ids": torch.tensor([3, 4]), "offsets": torch.tensor([0, 0, 1, 2])})
    assert ids[0] == ids[3] == 0
    assert torch.equal(ids[1:3], row_ids(padded([[3], [4]], 2)))


def test_no_collisions_among_many_short_texts() -> None:
    tokens = torch.cartesian_prod(torch.arange(300), torch.arange(300), torch.arange(3))
    assert len(row_ids({"input_ids": tokens}).unique()) == len(tokens)


def test_images_are_refused() -> None:
    features = padded(ROWS, 3) | {"pixel_values": torch.zeros(6, 3, 2, 2)}
    with pytest.raises(ValueError, match=r"but column 2 of the batch also holds \['pixel_values'\]"):
        row_ids(features, 2)
