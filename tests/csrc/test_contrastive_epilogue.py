"""The epilogue that the CUDA kernels share with the host computes the contract of `contrastive_weights`."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from support.host_epilogue import TILE, Diagonals, Epilogue, contrastive_weights, walk_tile

LOG2E = 1 / math.log(2)


@dataclass(frozen=True)
class Case:
    """One call: which entries are special, and which outputs are asked for."""

    policy: str = "rows"
    shape: tuple[int, int] = (200, 310)
    excluded: tuple[int, int, int] = (0, 0, 0)
    special: tuple[int, int, int] = (0, 0, 0)
    ids: bool = False
    own_column: int = 0
    two_sided: bool = False
    column_sums: int = 0
    shift: float = 0.0


def expected(case: Case, x: dict[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Returns (e, weights) in fp64, written down from the contract."""
    p = x["row_factor"].double()[:, None] * x["column_factor"].double()
    s = (x["rows"].double() @ x["columns"].double().T) * p
    m, n = torch.arange(case.shape[0])[:, None], torch.arange(case.shape[1])

    def on(diagonals: tuple[int, int, int]) -> Tensor:
        first, stride, count = diagonals
        found = torch.zeros(case.shape, dtype=torch.bool)
        for k in range(count):
            found |= n - m == first + k * stride
        return found

    e = torch.exp(torch.where(on(case.special), 1.25 * scale * s, scale * s) - case.shift)
    e[on(case.excluded)] = 0.0
    if case.ids:
        e[(x["row_ids"][:, None] == x["column_ids"]) & (n - m != case.own_column)] = 0.0
    if case.policy != "known":
        return e, e * x["column_factor"].double()
    coefficients = x["row_coefficient"].double()[:, None]
    if case.two_sided:
        coefficients = coefficients + x["column_coefficient"].double()
    return e, e * p * coefficients


def inputs(shape: tuple[int, int], width: int = 40) -> dict[str, Tensor]:
    """Returns vectors, factors, coefficients and ids that repeat now and then.

    Some ids differ in high bits alone, and two of them are alike once they are folded into 32 bits.
    """
    m, n = shape
    torch.manual_seed(0)
    found: dict[str, Tensor] = {"rows": torch.randn(m, width).bfloat16(), "columns": torch.randn(n, width).bfloat16()}
    for name in ("row", "column"):
        vectors = found[f"{name}s"].float()
        found[f"{name}_factor"] = 1 / vectors.norm(dim=1)
        found[f"{name}_coefficient"] = torch.rand(len(vectors))
        found[f"{name}_ids"] = torch.randint(0, 30, (len(vectors),)) << torch.randint(0, 2, (len(vectors),)) * 32
    if m > 5 and n > 7:
        found["row_ids"][5], found["column_ids"][7] = 0x9E3779B1, 1 << 32
    return found


CASES = [
    Case(),
    Case(shape=(1, 1)),
    Case(shape=(128, 256), excluded=(5, 0, 1), shift=3.0),
    Case(shape=(129, 127), excluded=(-2, 0, 1)),
    Case(excluded=(17, 60, 4)),
    Case(excluded=(3, 0, 1), special=(40, 90, 3)),
    Case(excluded=(3, 0, 1), special=(3, 90, 3)),
    Case(special=(3, 90, 3), shift=3.0),
    # A diagonal that touches one corner of a tile, and has one entry there: the lower left, the upper right.
    Case(shape=(256, 256), excluded=(1, 0, 1)),
    Case(shape=(256, 256), excluded=(-127, 0, 1)),
    Case(shape=(256, 256), excluded=(127, 0, 1)),
    Case(shape=(256, 256), excluded=(-255, 0, 1)),
    Case(shape=(256, 256), excluded=(255, 0, 1)),
    Case(ids=True, own_column=20, excluded=(20, 0, 1)),
    Case("sums"),
    Case("sums", column_sums=310),
    Case("sums", column_sums=200, excluded=(0, 0, 1), shape=(257, 401)),
    Case("sums", ids=True, own_column=-1, special=(-1, 1, 2), column_sums=1),
    Case("known"),
    Case("known", two_sided=True, excluded=(0, 0, 1), shift=4.0),
    Case("known", ids=True, own_column=7, special=(9, -3, 3)),
    Case("known", two_sided=True, shape=(130, 391)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_sums_follow_the_contract(case: Case) -> None:
    """Every entry, every row and every column, in tiles with edges; each output is written whole and nothing else."""
    scale, (m, n), x = 6.0, case.shape, inputs(case.shape)
    wide = torch.full((m + 1, n + 3), math.nan)  # what lies around the weights must stay as it is
    weights = None if case.policy == "sums" else wide[:m, :n]
    row_sums = None if case.policy == "known" else torch.full((-(-n // TILE), m), math.nan)
    column_sums = torch.full((-(-m // TILE), case.column_sums), math.nan) if case.column_sums else None
    contrastive_weights(
        *(x[name] for name in ("rows", "columns", "row_factor", "column_factor")),
        scale,
        case.shift,
        case.excluded,
        case.special,
        1.25,
        *((x["row_ids"], x["column_ids"]) if case.ids else (None, None)),
        case.own_column,
        x["row_coefficient"] if case.policy == "known" else None,
        x["column_coefficient"] if case.two_sided else None,
        weights,
        row_sums,
        column_sums,
    )
    e, wanted = expected(case, x, scale)
    # 2^z with z of up to 9 has a relative error of z times float32's rounding, a few times.
    tolerance = {"rtol": 5e-6, "atol": 0.0}
    if weights is not None:
        assert torch.equal(weights == 0, e == 0)
        torch.testing.assert_close(weights.double(), wanted, **tolerance)
        assert bool(wide[m].isnan().all())
        assert bool(wide[:, n:].isnan().all())
    if row_sums is not None:
        torch.testing.assert_close(row_sums.double().sum(0), e.sum(1), **tolerance)
    if column_sums is not None:
        torch.testing.assert_close(column_sums.double().sum(0), e.sum(0)[: case.column_sums], **tolerance)


def test_a_row_of_nan_stays_alone() -> None:
    """Weights and row sums of other rows do not see it; sums over a column do, as in eager torch."""
    x = inputs((130, 140))
    clean, spoilt = {}, {}
    for found, vectors in ((clean, x["rows"]), (spoilt, x["rows"].index_fill(0, torch.tensor([70]), math.nan))):
        found |= {"weights": torch.empty(130, 140), "row_sums": torch.empty(2, 130)}
        factors = (x["columns"], x["row_factor"], x["column_factor"])
        nothing = (None, None, 0, None, None)
        contrastive_weights(vectors, *factors, 6.0, 0.0, (0, 0, 1), (0, 0, 0), 1.0, *nothing, **found, column_sums=None)
    rest = torch.arange(130) != 70
    assert torch.equal(clean["weights"][rest], spoilt["weights"][rest])
    assert torch.equal(clean["row_sums"][:, rest], spoilt["row_sums"][:, rest])
    assert bool(spoilt["row_sums"][:, 70].isnan().all())
    assert spoilt["weights"][70, 70] == 0  # excluded is excluded


@pytest.mark.parametrize("tile", [(2, 0), (0, 2), (2, 2)])
def test_a_tile_outside_of_the_matrix_writes_no_sums(tile: tuple[int, int]) -> None:
    """Blocks come in clusters, so that an odd number of tiles has one more: its sums have no place."""
    x = inputs((200, 200))
    written = torch.full((2, 4, 200), math.nan)
    epilogue = Epilogue(
        rows=200,
        columns=200,
        row_factor=x["row_factor"].data_ptr(),
        column_factor=x["column_factor"].data_ptr(),
        logit_factor=1.0,
        inverse_logit_factor=1.0,
        row_sums=written[0].data_ptr(),
        column_sums=written[1].data_ptr(),
        summed_columns=200,
    )
    for policy in ("rows", "sums"):
        walk_tile(epilogue, policy, False, *tile, torch.zeros(TILE, TILE))
    assert bool(written.isnan().all())


FAR = (1 << 31) - (1 << 15) - 1  # the most rows and columns that the operator takes


@pytest.mark.parametrize(
    ("policy", "tile_row", "tile_column"),
    [
        *itertools.product(("rows", "sums", "known"), (FAR // TILE,), (FAR // TILE,)),
        ("sums", FAR // TILE, 3),
        ("sums", 3, FAR // TILE),
        ("rows", 1 << 15, 1 << 15),
    ],
)
def test_tiles_far_from_the_first_entry(policy: str, tile_row: int, tile_column: int) -> None:
    """Entry numbers, and numbers of sums, beyond 2^31: the same bits as the same tile of a small matrix."""
    begin_m, begin_n = tile_row * TILE, tile_column * TILE
    m, n = min(TILE, FAR - begin_m), min(TILE, FAR - begin_n)
    x = inputs((m, n))
    dots = torch.zeros(TILE, TILE)
    dots[:m, :n] = x["rows"].float() @ x["columns"].float().T
    apart = begin_n - begin_m

    def walk(far: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns weights and sums of the tile, at its place or as the first one of a matrix of its size."""
        at_m, at_n, of_m, of_n = (begin_m, begin_n, FAR, FAR) if far else (0, 0, m, n)
        row_sums, column_sums = torch.full((m,), math.nan), torch.full((n,), math.nan)

        def behind(name: str, begin: int) -> int:
            """Returns the address of an array of which only the numbers from `begin` on are there."""
            return x[name].data_ptr() - begin * x[name].element_size()

        epilogue = Epilogue(
            rows=of_m,
            columns=of_n,
            row_factor=behind("row_factor", at_m),
            column_factor=behind("column_factor", at_n),
            logit_factor=6 * LOG2E,
            inverse_logit_factor=1 / (6 * LOG2E),
            excluded=Diagonals(5 + (apart if far else 0), 0, 1),
            special=Diagonals(9 + (apart if far else 0), 20, 2),
            special_ratio=1.25,
            row_ids=behind("row_ids", at_m),
            column_ids=behind("column_ids", at_n),
            own_column=5 + (apart if far else 0),
            row_coefficient=behind("row_coefficient", at_m),
            column_coefficient=behind("column_coefficient", at_n),
            row_sums=row_sums.data_ptr() - 4 * ((tile_column if far else 0) * of_m + at_m),
            column_sums=column_sums.data_ptr() - 4 * ((tile_row if far else 0) * of_n + at_n),
            summed_columns=of_n,
        )
        tile = (tile_row, tile_column) if far else (0, 0)
        weights = walk_tile(epilogue, policy, True, *tile, dots)
        return weights[:m, :n], row_sums, column_sums

    for far, near in zip(walk(True), walk(False), strict=True):
        assert torch.equal(far.nan_to_num(nan=-1.0), near.nan_to_num(nan=-1.0))


def test_the_far_tiles_would_not_do_in_32_bits() -> None:
    """The test above would pass in vain if its numbers were small."""
    assert FAR * (FAR // TILE) > 1 << 31
    assert FAR + TILE < 1 << 31
