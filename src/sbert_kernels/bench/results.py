"""The recorded results: JSON files in a folder for each machine, as the benchmarks write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbert_kernels.bench.studies import LEFT_OUT, STUDIES, Study, study_of

# In the order of the page; folders of other machines come after them, under their own names.
TITLES = {
    "cpu-epyc-2-cores": "CPU: two cores of an AMD EPYC",
    "h200": "GPU: NVIDIA H200",
    "aot": "Compiled kernels, without a GPU",
}


@dataclass(frozen=True)
class Result:
    """Holds one file of results: of which machine and study it is, and what it says."""

    folder: str
    name: str
    title: str
    commit: str
    date: str
    machine: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    remark: str = ""

    @property
    def study(self) -> Study:
        """Returns the study that the results belong to."""
        return study_of(self.name)


def read(folder: Path) -> list[Result]:
    """Returns all results in the folders of a folder, in the order of the page; raises ValueError for a wrong file."""
    results = []
    for file in sorted(folder.glob("*/*.json")):
        if file.stem in LEFT_OUT:
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        wanted = {"title", "commit", "date", "machine", "rows"}
        if missing := wanted - set(content):
            raise ValueError(f"{file}: has no {', '.join(sorted(missing))}")
        study_of(file.stem)
        results.append(Result(file.parent.name, file.stem, **content))
    machines = [*TITLES, *sorted({result.folder for result in results} - set(TITLES))]
    studies = list(STUDIES.values())
    return sorted(results, key=lambda result: (machines.index(result.folder), studies.index(result.study), result.name))
