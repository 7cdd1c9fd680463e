"""Writes docs/benchmarks.md, the page of all recorded results, and the picture beside it.

The results are JSON files in a folder for each machine, as the benchmarks write them; the page says nothing that is not
in them. A clone has them in benchmarks/results: run it in the root of one, or say where they are.

    python -m sbert_kernels bench report [--results FOLDER] [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbert_kernels.bench.results import TITLES, Result, read
from sbert_kernels.bench.studies import BENCH, shown

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/benchmarks.md")
PICTURE = "step-time.svg"
INTRODUCTION = f"""# Benchmarks

<!-- Written by `{BENCH} report` from the files in benchmarks/results. Do not edit: change those, and run it again. -->

Every number here stands in a JSON file under `benchmarks/results`, with the commit, the machine and the day. Rows in
which ours is slower are shown like all others.

* Contenders are timed in one process, in turn (A B A B ...), after their losses and gradients were found equal. A time
  is the median of the rounds.
* Peak memory is what a process of its own takes on top of its inputs, or on a GPU a call; gradients are included.
* "Stock" is sentence-transformers, "torch.compile" is stock compiled.
* The limit beside a time is the time of work that cannot be avoided; the text above each table says which work that is.

![Step time and memory of stock and of sbert-kernels]({PICTURE})
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``bench report`` to a parser."""
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        default=RESULTS,
        help=f"it holds a folder for each machine (default: {RESULTS})",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=PAGE, help=f"the page; the picture goes beside it (default: {PAGE})"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the page and its picture, and says where."""
    folder, out = args.results, args.out
    results = read(folder)
    if not results:
        raise SystemExit(
            f"argument --results: got {folder.absolute()}, wanted one that holds a folder of JSON files a machine"
        )

    from sbert_kernels.bench import picture

    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(results), encoding="utf-8")
    picture.write(results, out.parent / PICTURE)
    print(out, out.parent / PICTURE, sep="\n")


def render(results: Sequence[Result]) -> str:
    """Returns the page as Markdown: a section a machine, and in it a table a study."""
    parts = [INTRODUCTION]
    folder, study = "", None
    for result in results:
        if result.folder != folder:
            folder, study = result.folder, None
            parts += [f"## {TITLES.get(folder, folder)}", _machine_text(result.machine)]
        if result.study is not study:
            study = result.study
            parts += [f"### {result.title}", f"{study.text} Repeat it with `{study.repeat}`."]
        else:
            parts.append(f"#### {result.title}")
        parts.append(_origin(result))
        parts.append(_table(result))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _machine_text(machine: Mapping[str, Any]) -> str:
    """Returns the facts about a machine in one sentence."""
    versions = ("python", "torch", "sentence-transformers", "triton")
    facts = [
        machine.get("gpu"),
        f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads on {machine['cores']} cores",
        f"{machine['ram_gib']} GiB RAM" if machine.get("ram_gib") else None,
        *(f"{name} {machine[name]}" for name in versions if machine.get(name)),
    ]
    return "; ".join(fact for fact in facts if fact) + "."


def _origin(result: Result) -> str:
    """Returns where a table comes from."""
    code = f"commit `{result.commit}`" if result.commit else f"version {result.machine.get('sbert-kernels')}"
    parts = [f"`{result.folder}/{result.name}.json`, {code}, {result.date}"]
    parts += [str(result.machine["data"])] if "data" in result.machine else []
    parts += [result.remark] if result.remark else []
    return f"*{'; '.join(parts)}.*"


def _table(result: Result) -> str:
    from sbert_kernels.bench.report import markdown_table

    return markdown_table([shown(result.study, row) for row in result.rows])
