"""What the CUDA library's operator has to write, in float64, and how what it wrote differs from that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Of weights that are rounded to the type; of sums in float32, and of those of single tiles, at scale 20, of which the
# errors of logits are multiples.
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 1e-3}
OF_SUMS, OF_TILES = 1e-5, 1e-4
TILE = 128


def faults(arguments: dict[str, Any], begin: int = 0, end: int | None = None) -> list[str]:
    """Returns all that is wrong with what a call of these arguments has written, of the rows from begin to end.

    Sums of columns are of all rows, and looked at only with all of them.
    """
    given, found = arguments, list[str]()
    rows = range(len(given["rows"]))[begin:end]
    part = slice(rows.start, rows.stop)
    e, p, gone = _exponentials(given, part)
    lenience = max(1.0, given["scale"] / 20)
    if given["weights"] is not None:
        factor = given["column_factor"].double()
        if given["row_coefficient"] is not None:
            factor = given["row_coefficient"][part].double()[:, None]
            if given["column_coefficient"] is not None:
                factor = factor + given["column_coefficient"].double()
            factor = factor * p
        found += _of_weights(given["weights"][part], e * factor, gone)
        storage = given["weights"]._base
        if storage is not None and not storage[part, e.shape[1] :].isnan().all():
            found.append("what lies behind the columns was written to")
    if given["row_sums"] is not None:
        tiles = [tile.sum(1) for tile in e.split(TILE, 1)]
        found += _of_sums("row_sums", given["row_sums"][:, part], tiles, lenience)
    if given["column_sums"] is not None and len(rows) == len(given["rows"]):
        summed = e[:, : given["column_sums"].shape[1]]
        found += _of_sums("column_sums", given["column_sums"], [tile.sum(0) for tile in summed.split(TILE)], lenience)
    return found


def _exponentials(given: dict[str, Any], part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Returns exponentials of logits, products of the factors, and which entries are left out, each (rows, columns)."""
    rows, columns = given["rows"][part].double(), given["columns"].double()
    p = given["row_factor"][part].double()[:, None] * given["column_factor"].double()
    numbers = [torch.arange(len(x), device=rows.device) for x in (given["rows"], columns)]
    diagonal = numbers[1] - numbers[0][part, None]

    def on(diagonals: Sequence[int]) -> Tensor:
        first, stride, count = diagonals
        hit = torch.zeros_like(diagonal, dtype=torch.bool)
        for k in range(count):
            hit |= diagonal == first + k * stride
        return hit

    ratio = torch.where(on(given["special"]), given["special_ratio"], 1.0).double()
    gone = on(given["excluded"])
    if given["row_ids"] is not None:
        same = given["row_ids"][part, None] == given["column_ids"]
        gone |= same & (diagonal != given["own_column"])
    z = given["scale"] * ratio * (rows @ columns.T) * p - given["shift"]
    return z.exp().masked_fill(gone, 0.0), p, gone


def _of_weights(weights: Tensor, exact: Tensor, gone: Tensor) -> list[str]:
    found = [f"{int(weights.isnan().sum())} weights were not written"] if weights.isnan().any() else []
    if weights[gone].any():
        found.append(f"{int((weights[gone] != 0).sum())} weights of entries that are left out are not zero")
    limit, errors = ROUNDING[weights.dtype], (weights.double() - exact).norm(dim=1)
    sizes = exact.norm(dim=1)
    whole = float(errors.norm() / sizes.norm().clamp(min=1e-300))  # 0 where all entries are left out
    worst = float((errors / sizes.clamp(min=1e-300)).max())
    if not whole <= limit or not worst <= 2 * limit:
        found.append(f"weights are {whole:.2g} off, {worst:.2g} in the worst row; {limit:.2g} is a rounding")
    return found


def _of_sums(name: str, sums: Tensor, tiles: Sequence[Tensor], lenience: float) -> list[str]:
    exact = torch.stack(list(tiles))
    if sums.shape != exact.shape:
        return [f"{name} has the shape {list(sums.shape)}, wanted {list(exact.shape)}"]
    total, wanted = sums.double().sum(0), exact.sum(0)
    whole = float((total - wanted).norm() / wanted.norm().clamp(min=1e-300))
    worst = float(((sums.double() - exact).abs() / exact.clamp(min=1e-30)).max())
    if not whole <= lenience * OF_SUMS or not worst <= lenience * OF_TILES:
        return [f"{name} is {whole:.2g} off, {worst:.2g} in the worst tile"]
    return []
