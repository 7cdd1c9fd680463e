"""The self-check of the CUDA kernels asks each of them, and hears a wrong one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sbert_kernels.backends import CudaBackend, self_check
from sbert_kernels.backends.self_check import Kind, cases
from support import cuda_operator
from support.host_epilogue import TILE

CPU = torch.device("cpu")
LARGE_ROWS = cases.large_rows
NAMES = [*inspect.signature(cuda_operator.check).parameters]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "ROWS", 16)
    monkeypatch.setattr(cases, "large_rows", lambda multiprocessors: 16)
    for name in ("LEAST_LARGE_WIDTH", "MOST_LARGE_WIDTH"):
        monkeypatch.setattr(cases, name, 16)
    # Of few and narrow vectors some weights are large, and their roundings show in a whole gradient.
    monkeypatch.setattr(cases, "OF_LARGE", max(cases.ROUNDINGS.values()))


def kind(dtype: torch.dtype) -> Kind:
    return Kind("contrastive", dtype, 16)


def policy(arguments: dict[str, Any]) -> str:
    name = (
        "known" if arguments["row_coefficient"] is not None else "rows" if arguments["weights"] is not None else "sums"
    )
    return name + (" of ids" if arguments["row_ids"] is not None else "")


@pytest.mark.usefixtures("emulated")
def test_every_policy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[torch.dtype, set[str]] = {torch.bfloat16: set(), torch.float16: set()}
    check = cuda_operator.check

    def noted(*arguments: Any) -> None:
        asked[arguments[0].dtype].add(policy(dict(zip(NAMES, arguments, strict=True))))
        check(*arguments)

    monkeypatch.setattr(cuda_operator, "check", noted)
    for dtype in asked:
        assert self_check._compare(CudaBackend(), kind(dtype), CPU) == (True, None)
    assert asked == {
        torch.bfloat16: {"rows", "rows of ids", "sums", "sums of ids", "known"},
        torch.float16: {"sums", "sums of ids", "known", "known of ids"},
    }


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("output", ["weights", "row_sums"])
def test_a_wrong_output_is_found(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = cuda_operator.contrastive_weights

    def wrong(*arguments: Any) -> None:
        compute(*arguments)
        written = arguments[NAMES.index(output)]
        if written is not None:
            written[..., ::5] *= 1.5  # of some rows or columns

    monkeypatch.setattr(cuda_operator, "contrastive_weights", wrong)
    _, found = self_check._compare(CudaBackend(), kind(torch.bfloat16), CPU)
    assert found is not None


def not_a_number(tile: Tensor, before: Tensor) -> None:
    tile.fill_(float("nan"))


def of_the_tile_before(tile: Tensor, before: Tensor) -> None:
    rows, columns = map(min, tile.shape, before.shape)
    tile[:rows, :columns] = before[:rows, :columns]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("spoil", [not_a_number, of_the_tile_before])
def test_wrong_weights_of_a_block_s_later_tiles_are_found(
    spoil: Callable[[Tensor, Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of the second warp group, of a barrier between tiles or of the loads' second round."""
    compute, blocks, launches = cuda_operator.contrastive_weights, self_check._CPU_MULTIPROCESSORS, []

    def wrong(*arguments: Any) -> None:
        compute(*arguments)
        weights = arguments[NAMES.index("weights")]
        if weights is None:
            return
        tiles = [part for rows in weights.split(cases.TILE) for part in rows.split(cases.TILE, dim=1)]
        launches.append(len(tiles))
        for index in range(blocks, len(tiles)):
            spoil(tiles[index], tiles[index - blocks])

    monkeypatch.setattr(cuda_operator, "contrastive_weights", wrong)
    monkeypatch.setattr(cases, "large_rows", LARGE_ROWS)
    _, found = self_check._compare(CudaBackend(), kind(torch.bfloat16), CPU)
    assert found is not None
    assert "one direction, several tiles a block: " in found
    assert max(launches) > 3 * blocks


def test_tiles_are_those_of_the_kernels() -> None:
    assert TILE == cases.TILE
