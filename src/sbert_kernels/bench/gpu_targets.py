"""What the rows of `bench gpu` say: which targets are met, and where the cost model is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sbert_kernels.bench import gpu_peers

NOT_RUN = "not run"  # begins the cell of a contender that there was no time for
NOISE = 1.02  # ratios below are no choice of the wrong strategy


@dataclass(frozen=True)
class Verdict:
    """A target, whether it is met (None: not measured), and what was found."""

    target: str
    met: bool | None
    found: str

    @property
    def word(self) -> str:
        return {True: "pass", False: "FAIL", None: "not measured"}[self.met]


def verdicts(rows: Mapping[str, Sequence[Mapping[str, Any]]], gpu: str) -> list[Verdict]:
    """What the rows of the reports, by kind, say of the targets. Rows of ours that broke meet none."""
    in_batch_rows, memory_rows = rows.get("contrastive", ()), rows.get("memory", ())
    times = [*in_batch_rows, *rows.get("losses", ())]

    def central(row: Mapping[str, Any]) -> bool:
        return (row.get("N"), row.get("D"), row.get("dtype")) == (65536, 768, "bfloat16")

    main = next(filter(central, in_batch_rows), {})
    memory = next((row for row in memory_rows if row.get("N") == 65536), {})
    found = []
    if "H100" in gpu or "H200" in gpu:
        where = "N=65536 D=768 bfloat16"
        found.append(_bounded(f"{where}: 2.5 times as fast as eager", main, "eager/ours", least=2.5))
        found.append(_bounded(f"{where}: 60% of the GEMM rate", main, "% of GEMM", least=60.0))
        found.append(_bounded(f"{where}: at most 1536 MiB extra", memory, "ours MiB", most=1536.0))
    for peer in ("compiled", *gpu_peers.PEERS):
        large = [row for row in in_batch_rows if row.get("N", 0) >= 4096]
        found.append(_fastest(f"faster than {peer} at every N >= 4096", large, peer))
    whole = [row for row in in_batch_rows if row.get("N") == 262144 and _ran(row)]
    broken = [row["case"] for row in whole if not _number(row["ours ms"])]
    names = ", ".join(broken or [row["case"] for row in whole]) or "-"
    found.append(Verdict("N=262144 runs", not broken if whole else None, names))
    found.append(_fastest("never slower than eager at N >= 1024", [r for r in times if r.get("N", 0) >= 1024], "eager"))
    return found


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _ran(row: Mapping[str, Any]) -> bool:
    """Whether there was time for ours."""
    return not str(row["ours ms"]).startswith(NOT_RUN)


def _bounded(
    target: str, row: Mapping[str, Any], key: str, least: float = -math.inf, most: float = math.inf
) -> Verdict:
    value = row.get(key)
    if not _number(value):
        return Verdict(target, False if "note" in row else None, row.get("note", "-"))
    return Verdict(target, least <= value <= most, f"{value:.3g}")


def _fastest(target: str, rows: Sequence[Mapping[str, Any]], peer: str) -> Verdict:
    """Over every row in which the peer has a time."""
    compared = [row for row in rows if _number(row.get(f"{peer} ms")) and _ran(row)]
    if not compared:
        return Verdict(target, None, "-")
    ratios = {row["case"]: row[f"{peer} ms"] / row["ours ms"] if _number(row["ours ms"]) else 0.0 for row in compared}
    worst = min(ratios, key=ratios.__getitem__)
    text = f"at least {ratios[worst]:.3g} times, in {len(ratios)} cases; the least at {worst}"
    return Verdict(target, ratios[worst] >= 1, text)


def wrong_choices(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Where the cost model took the slower strategy."""
    return [
        f"{row['case']}: took {row['chosen']}, {row['faster']} is {row['chosen/faster']:.2f} times as fast"
        for row in rows
        if row.get("chosen/faster", math.nan) > NOISE
    ]
