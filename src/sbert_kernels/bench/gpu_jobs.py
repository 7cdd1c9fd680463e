"""The jobs of `bench gpu` in the order in which they run, and the time that there is for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sbert_kernels.bench.cases import contrastive, ranking
from sbert_kernels.bench.cases.contrastive import FOUR_DIRECTIONS, MNR

PARITY_ROWS = 1000  # no multiple of any tile
NOT_RUN = "not run"  # begins the cell of a contender that there was no time for
MATRYOSHKA = (768, 512, 256, 128, 64)


@dataclass(frozen=True)
class Job:
    """Describes one row of a report. Without peers it is a short job."""

    kind: str  # one of KINDS
    case: contrastive.Case | ranking.Case
    peers: bool = True
    mask: bool = False  # every two rows have the same document, which is no negative

    @property
    def precision(self) -> str:
        """Returns the precision of float32 products, as torch.set_float32_matmul_precision has it."""
        return getattr(self.case, "precision", "highest")

    @property
    def in_batch(self) -> contrastive.Case:
        """Returns the case of a job of the in-batch loss; raises TypeError for a ranking loss."""
        if isinstance(self.case, ranking.Case):
            raise TypeError(f"case: got the ranking loss {self.name}, wanted an in-batch loss")
        return self.case

    @property
    def columns(self) -> dict[str, Any]:
        """Returns the columns that every row of a report begins with."""
        rows = self.case.rows if isinstance(self.case, ranking.Case) else self.case.batch
        return {"case": self.name, "N": rows, "D": self.case.dim, "dtype": self.case.dtype}

    @property
    def name(self) -> str:
        """Returns the size, the type and the options in one line."""
        case = self.case
        if isinstance(case, ranking.Case):
            return f"{'+'.join(case.losses)} {case.size} {case.dtype}"
        options = [f"{case.negatives} negatives"] if case.negatives else []
        options += [f"{key} {value}" for key, value in case.options.items() if key != "directions"]
        options += [f"{case.terms} directions"] if case.terms > 1 else []
        options += ["mask"] if self.mask else []
        options += [f"prefixes {','.join(map(str, case.dims))}"] if case.dims else []
        kind = case.dtype if case.dtype != "float32" else f"float32 {case.precision}"
        return ", ".join([f"N={case.batch} D={case.dim} {kind}", *options])


def in_batch(rows: int, dim: int, dtype: str = "bfloat16", **values: Any) -> contrastive.Case:
    """Returns a case of the in-batch-negatives loss."""
    return contrastive.Case(MNR, rows, rows, dim=dim, dtype=dtype, **values)


OURS_COLUMN = {"parity": "tiled error", "contrastive": "ours ms", "memory": "ours MiB", "losses": "ours ms"}
# Seconds that have to be left for a job to begin: what it may take, so that the last one ends in time.
LEAST_SECONDS = {"parity": 5.0, "contrastive": 20.0, "memory": 30.0, "losses": 10.0}


def plan(quick: bool = False) -> list[Job]:
    """Returns the jobs, the most important first."""
    float32 = {"dtype": "float32"}
    parity = [
        Job("parity", in_batch(PARITY_ROWS, 384, **kind, **options), mask=mask)
        for kind in ({}, float32, {**float32, "precision": "high"})
        for options, mask in (
            ({}, False),
            ({"negatives": 3}, False),
            ({"options": {"directions": FOUR_DIRECTIONS}, "terms": 4}, False),
            ({"options": {"scale": 100.0}, "scale": 100.0}, False),
            ({}, True),
            ({"dims": (384, 128, 64)}, False),
        )
        if kind.get("precision") != "high" or not (options or mask)
    ]
    parity += [
        Job("parity", ranking.Case((loss,), PARITY_ROWS, dtype=dtype))
        for dtype in ("bfloat16", "float32")
        for loss in (ranking.COSENT, ranking.ANGLE)
    ]
    if quick:
        return [*parity, *(Job("contrastive", in_batch(rows, 768)) for rows in (65536, 4096))]

    def matryoshka(rows: int) -> Job:
        return Job("losses", in_batch(rows, MATRYOSHKA[0], dims=MATRYOSHKA))

    def pairs(loss: str, rows: int, dim: int | None = 384) -> Job:
        return Job("losses", ranking.Case((loss,), rows, dim=dim))

    high = {**float32, "precision": "high"}
    return [
        *parity,
        Job("contrastive", in_batch(65536, 768)),
        Job("memory", in_batch(65536, 768)),
        Job("contrastive", in_batch(262144, 768)),
        *(Job("contrastive", in_batch(rows, 768)) for rows in (16384, 4096)),
        Job("contrastive", in_batch(1024, 768), peers=False),
        matryoshka(16384),
        *(pairs(loss, 8192) for loss in (ranking.COSENT, ranking.ANGLE)),
        Job("memory", in_batch(262144, 768)),
        *(Job("contrastive", in_batch(rows, dim)) for dim in (384, 1024) for rows in (65536, 16384, 4096)),
        *(pairs(loss, rows) for rows in (65536, 1024) for loss in (ranking.COSENT, ranking.ANGLE)),
        *(pairs(ranking.COSENT, rows, None) for rows in (1024, 8192, 65536, 1048576)),
        matryoshka(65536),
        *(Job("contrastive", in_batch(rows, 768, **high)) for rows in (16384, 4096)),
        *(Job("contrastive", in_batch(rows, 768, **float32)) for rows in (16384, 4096)),
        *(Job("memory", in_batch(rows, 768)) for rows in (16384, 4096)),
        *(Job("contrastive", in_batch(262144, dim), peers=False) for dim in (384, 1024)),
        *(Job("contrastive", in_batch(1024, 768, **kind), peers=False) for kind in (high, float32)),
        *(Job("contrastive", in_batch(rows, dim, **high)) for dim in (384, 1024) for rows in (16384, 4096)),
        *(Job("contrastive", in_batch(rows, dim, **float32)) for dim in (384, 1024) for rows in (16384, 4096)),
        *(Job("contrastive", in_batch(65536, dim, **high)) for dim in (768, 384, 1024)),
        *(Job("contrastive", in_batch(262144, dim, **high), peers=False) for dim in (768, 384, 1024)),
    ]


class Budget:
    """Counts seconds from now on; `clock` is read for the time."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        """Returns the seconds that are left; negative ones if none are."""
        return self._end - self._clock()


class Pace:
    """Foresees how long calls take from calls of other sizes: time grows with the square of N."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], tuple[int, float]] = {}

    def note(self, name: str, case: contrastive.Case, seconds: float) -> None:
        """Remembers how long a contender took for a case."""
        self._seen[name, case.dim, case.dtype, case.precision] = case.batch, seconds

    def seconds(self, name: str, case: contrastive.Case) -> float:
        """Returns what a call should take; 0 where nothing alike has been seen."""
        rows, seconds = self._seen.get((name, case.dim, case.dtype, case.precision), (case.batch, 0.0))
        return seconds * (case.batch / rows) ** 2
