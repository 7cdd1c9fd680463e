"""The one report of the project: rows of numbers as JSON, as a Markdown table and as bar charts.

Numbers are printed as they were measured. A ratio below 1 is a loss of ours, and reads as one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbert_kernels import machine
from sbert_kernels.workloads.charts import NOTHING, OURS_COLOUR, cell, draw_stacks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PEER_COLOURS = ("#94a3b8", "#475569", "#cbd5e1", "#1e293b", "#64748b", "#9ca3af", "#374151", "#e2e8f0", "#0f172a")


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as a Markdown table, with columns in the order in which they first appear.

    Numbers are printed as they were measured. Lists and columns without any value are left out.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [key for key in columns if any(cell(row.get(key)) != NOTHING for row in rows)]
    numeric = {key for key in columns if any(isinstance(row.get(key), (int, float)) for row in rows)}
    lines = [columns, ["---:" if key in numeric else ":---" for key in columns]]
    lines += [[cell(row.get(key)) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Chart:
    """Describes one panel of horizontal bars. `bars` maps a name in the legend to a column; the first bar is ours.

    The first column names the row.
    """

    label: str
    bars: Mapping[str, str]


@dataclass(frozen=True)
class StackedChart:
    """Describes one panel with a bar for each row, of parts laid end to end. `bars` maps legend names to columns.

    `names` are the columns that together name the row.
    """

    label: str
    bars: Mapping[str, str]
    names: Sequence[str]


@dataclass
class Report:
    """Holds the rows of one run of a benchmark and writes them down.

    A row maps the name of a column to a number, a text (such as "out of memory"), None or a list. None and nan print as
    a dash and are null in the JSON; lists (raw samples) are for the JSON only; a column without any value is not
    printed. `name` is the stem of the files that `write` makes. The JSON also says which commit ran, and on which day.
    """

    title: str
    name: str
    machine: Mapping[str, Any] = field(default_factory=dict)
    machine_line: str = ""
    charts: Sequence[Chart | StackedChart] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **columns: Any) -> None:
        """Appends one row; columns whose name is not an identifier go in as `add(**{"ours ms": 1.0})`."""
        self.rows.append(columns)

    def markdown(self) -> str:
        """Returns the rows as a Markdown table."""
        return markdown_table(self.rows)

    def write(self, folder: Path) -> list[Path]:
        """Writes `<name>.json`, `<name>.md` and `<name>.png`, and returns the paths that it wrote."""
        folder.mkdir(parents=True, exist_ok=True)
        data, table, image = (folder / f"{self.name}{suffix}" for suffix in (".json", ".md", ".png"))
        rows = [{key: _json_value(value) for key, value in row.items()} for row in self.rows]
        content = {
            "title": self.title,
            "commit": machine.commit(),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "machine": dict(self.machine),
            "rows": rows,
        }
        data.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        header = f"# {self.title}\n\n" + (f"{self.machine_line}\n\n" if self.machine_line else "")
        table.write_text(f"{header}{self.markdown()}\n", encoding="utf-8")
        return [data, table, image] if self._plot(image) else [data, table]

    def _plot(self, path: Path) -> bool:
        panels = [(chart, self._rows_of(chart)) for chart in self.charts]
        panels = [(chart, rows) for chart, rows in panels if rows]
        if not panels:
            return False
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
            return False
        bars = [1 if isinstance(chart, StackedChart) else len(chart.bars) for chart, _ in panels]
        heights = [0.8 + 0.22 * len(rows) * (count + 0.6) for (_, rows), count in zip(panels, bars, strict=True)]
        figure = Figure(figsize=(10, sum(heights) + 0.9), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(self.title, fontsize=12, fontweight="bold")
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, (chart, rows) in zip(axes, panels, strict=True):
            axis.set_title(chart.label, loc="left", fontsize=10)
            if isinstance(chart, StackedChart):
                named = {", ".join(cell(row.get(key)) for key in chart.names): row for row in rows}
                stacks = {name: {part: row[key] for part, key in chart.bars.items()} for name, row in named.items()}
                draw_stacks(axis, stacks)
            else:
                _draw(axis, chart, rows)
        figure.supxlabel(self.machine_line, fontsize=6, color="#64748b")
        figure.savefig(path, dpi=150)
        return True

    def _rows_of(self, chart: Chart | StackedChart) -> list[dict[str, Any]]:
        return [row for row in self.rows if any(_positive(row.get(key)) for key in chart.bars.values())]


def _draw(axis: Axes, chart: Chart, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws one group of bars a row; each bar carries its value, and a peer's bar how many times ours it is."""
    ours_key = next(iter(chart.bars.values()))
    colours = dict(zip(chart.bars, (OURS_COLOUR, *_PEER_COLOURS), strict=False))
    values = [row[key] for row in rows for key in chart.bars.values() if _positive(row.get(key))]
    left = 10 ** math.floor(math.log10(min(values)) - 0.2)  # bars on a log axis need a foot to stand on
    ticks, place = [], 0.0
    for row in rows:
        shown = {name: key for name, key in chart.bars.items() if cell(row.get(key)) != NOTHING}
        ticks.append(place + (len(shown) - 1) / 2)
        for name, key in shown.items():
            value, ours, end = row[key], row.get(ours_key), left
            text = f" {cell(value)}"
            if _positive(value):
                end = value
                axis.barh(place, end - left, left=left, height=0.9, color=colours[name], label=name)
                if key != ours_key and _positive(ours):
                    text += f"   ({cell(value / ours)}x)"
            axis.text(end, place, text, va="center", fontsize=8)
            place += 1
        place += 0.6
    axis.set_xscale("log")
    axis.set_xlim(left, max(values) * 4)  # room for the text at the longest bar
    axis.set_ylim(place - 1, -0.8)
    axis.set_yticks(ticks, [cell(next(iter(row.values()))) for row in rows], fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    legend = {name: handle for handle, name in zip(handles, labels, strict=True)}
    # Above the panel, and ending where it ends, however many bars there are.
    corner: dict[str, Any] = {"bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.0}
    axis.legend(
        list(legend.values()), list(legend), loc="lower right", ncols=len(legend), fontsize=9, frameon=False, **corner
    )


def _positive(value: Any) -> bool:  # a number that a bar can show
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _json_value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
