"""Says which of the project's goals a run of ``bench gpu`` meets, and where it chose the slower way of making weights.

python -m benchmarks.goals benchmarks/results/h200
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbert_kernels.bench import gpu_peers
from sbert_kernels.bench.cases.gpu import KINDS
from sbert_kernels.bench.gpu_jobs import NOT_RUN

NOISE = 1.02  # ratios below are no choice of the slower way


# Of forward and backward on an H100 or H200: the case, and the most milliseconds.
MILLISECONDS = (
    ("N=65536 D=768 bfloat16", 31.0),
    ("N=262144 D=768 bfloat16", 500.0),
    ("N=1024 D=768 bfloat16", 0.25),
    ("N=65536 D=384 bfloat16", 17.0),
    ("N=65536 D=768 bfloat16, 2 directions", 45.0),
    ("N=16384 D=768 float32 highest", 30.0),
)


@dataclass(frozen=True)
class Verdict:
    """Holds a goal, if it is met (None: not measured), and what was found."""

    goal: str
    met: bool | None
    found: str

    @property
    def word(self) -> str:
        """Returns the verdict in one word or two."""
        return {True: "pass", False: "FAIL", None: "not measured"}[self.met]


def verdicts(rows: Mapping[str, Sequence[Mapping[str, Any]]], gpu: str) -> list[Verdict]:
    """Returns what the rows of the reports, by kind, say of each goal. Rows of ours that broke meet none."""
    in_batch_rows, memory_rows = rows.get("contrastive", ()), rows.get("memory", ())
    times = [*in_batch_rows, *rows.get("losses", ())]

    def row_of(case: str, *kinds: str) -> Mapping[str, Any]:
        return next((row for kind in kinds for row in rows.get(kind, ()) if row["case"] == case), {})

    main = row_of("N=65536 D=768 bfloat16", "contrastive")
    memory = next((row for row in memory_rows if row.get("N") == 65536), {})
    found = []
    if "H100" in gpu or "H200" in gpu:
        where = "N=65536 D=768 bfloat16"
        found.append(_bounded(f"{where}: 2.5 times as fast as eager", main, "eager/ours", least=2.5))
        found.append(_bounded(f"{where}: 60% of the GEMM rate", main, "% of GEMM", least=60.0))
        found.append(_bounded(f"{where}: at most 1536 MiB extra", memory, "ours MiB", most=1536.0))
        for case, most in MILLISECONDS:
            row = row_of(case, "backends", "contrastive", "losses")
            found.append(_bounded(f"{case}: at most {most:g} ms", row, "ours ms", most=most))
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
    """True if there was time for ours."""
    return not str(row["ours ms"]).startswith(NOT_RUN)


def _bounded(goal: str, row: Mapping[str, Any], key: str, least: float = -math.inf, most: float = math.inf) -> Verdict:
    value = row.get(key, math.nan)
    if not _number(value):
        return Verdict(goal, False if "note" in row else None, row.get("note", "-"))
    return Verdict(goal, least <= value <= most, f"{value:.3g}")


def _fastest(goal: str, rows: Sequence[Mapping[str, Any]], peer: str) -> Verdict:
    """Returns the verdict over every row in which the peer has a time."""
    compared = [row for row in rows if _number(row.get(f"{peer} ms")) and _ran(row)]
    if not compared:
        return Verdict(goal, None, "-")
    ratios = {row["case"]: row[f"{peer} ms"] / row["ours ms"] if _number(row["ours ms"]) else 0.0 for row in compared}
    worst = min(ratios, key=ratios.__getitem__)
    text = f"at least {ratios[worst]:.3g} times, in {len(ratios)} cases; the least at {worst}"
    return Verdict(goal, ratios[worst] >= 1, text)


def wrong_choices(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each row in which the library did not choose the faster way of making the weights."""
    return [
        f"{row['case']}: {row['faster']} is {row['ours/faster']:.2f} times as fast"
        for row in rows
        if _number(row.get("ours/faster")) and row["ours/faster"] > NOISE
    ]


def main() -> None:
    """Reads the reports in a folder that ``bench gpu`` wrote, and prints the verdicts."""
    parser = argparse.ArgumentParser(description="Says which goals a run of `bench gpu` meets.")
    parser.add_argument("folder", type=Path, help="what --output of `bench gpu` named")
    folder = parser.parse_args().folder
    files = {kind: folder / f"gpu-{kind}.json" for kind in KINDS}
    reports = {kind: json.loads(file.read_text(encoding="utf-8")) for kind, file in files.items() if file.is_file()}
    if not reports:
        wanted = f"one with files such as {files['contrastive'].name}, which `bench gpu --output` writes on a card"
        raise SystemExit(f"argument folder: got {folder}, wanted {wanted}")
    card = next(iter(reports.values()))["machine"]["gpu"]
    rows = {kind: report["rows"] for kind, report in reports.items()}
    print(card)
    for verdict in verdicts(rows, card):
        print(f"  {verdict.word}: {verdict.goal} ({verdict.found})")
    for line in wrong_choices(rows.get("weights", ())):
        print(f"  the slower way of making the weights was chosen: {line}")


if __name__ == "__main__":
    main()
