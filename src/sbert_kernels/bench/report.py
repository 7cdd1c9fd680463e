"""The one report of the project: rows of numbers as JSON, as a Markdown table and as bar charts.

Numbers are printed as they were measured. A ratio below 1 is a loss of ours, and reads as one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_OURS_COLOUR = "#c2410c"
_PEER_COLOURS = ("#94a3b8", "#475569", "#cbd5e1", "#1e293b", "#64748b")
# From what ours has nothing to do with (greys) to what it replaces (warm).
_PART_COLOURS = ("#cbd5e1", "#94a3b8", "#c2410c", "#fb923c", "#64748b", "#334155", "#e2e8f0")
_NOTHING = "-"


@dataclass(frozen=True)
class Chart:
    """One panel of horizontal bars. `bars` maps a name in the legend to a column; the first bar is ours.

    The first column names the row.
    """

    label: str
    bars: Mapping[str, str]


@dataclass(frozen=True)
class StackedChart:
    """One panel with a bar for each row, of parts laid end to end. `bars` maps a name in the legend to a column.

    `names` are the columns that together name the row.
    """

    label: str
    bars: Mapping[str, str]
    names: Sequence[str]


@dataclass
class Report:
    """Rows that share their columns, in the order in which columns first appear.

    A row maps the name of a column to a number, a text (such as "out of memory"), None or a list. None and nan print as
    a dash and are null in the JSON; lists (raw samples) are for the JSON only; a column without any value is not
    printed. `name` is the stem of the files that `write` makes.
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
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        columns = [key for key in columns if any(_cell(row.get(key)) != _NOTHING for row in self.rows)]
        numeric = {key for key in columns if any(isinstance(row.get(key), (int, float)) for row in self.rows)}
        lines = [columns, ["---:" if key in numeric else ":---" for key in columns]]
        lines += [[_cell(row.get(key)) for key in columns] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def write(self, folder: Path) -> list[Path]:
        """Writes `<name>.json`, `<name>.md` and `<name>.png`, and returns the paths that it wrote."""
        folder.mkdir(parents=True, exist_ok=True)
        data, table, image = (folder / f"{self.name}{suffix}" for suffix in (".json", ".md", ".png"))
        rows = [{key: _json_value(value) for key, value in row.items()} for row in self.rows]
        content = {"title": self.title, "machine": dict(self.machine), "rows": rows}
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
                named = {", ".join(_cell(row.get(key)) for key in chart.names): row for row in rows}
                stacks = {name: {part: row.get(key) for part, key in chart.bars.items()} for name, row in named.items()}
                draw_stacks(axis, stacks)
            else:
                _draw(axis, chart, rows)
        figure.supxlabel(self.machine_line, fontsize=6, color="#64748b")
        figure.savefig(path, dpi=150)
        return True

    def _rows_of(self, chart: Chart | StackedChart) -> list[dict[str, Any]]:
        return [row for row in self.rows if any(_positive(row.get(key)) for key in chart.bars.values())]


def _draw(axis: Any, chart: Chart, rows: Sequence[Mapping[str, Any]]) -> None:
    """One group of bars a row; each bar carries its value, and a peer's bar how many times ours it is."""
    ours_key = next(iter(chart.bars.values()))
    colours = dict(zip(chart.bars, (_OURS_COLOUR, *_PEER_COLOURS), strict=False))
    values = [row[key] for row in rows for key in chart.bars.values() if _positive(row.get(key))]
    left = 10 ** math.floor(math.log10(min(values)) - 0.2)  # bars on a log axis need a foot to stand on
    ticks, place = [], 0.0
    for row in rows:
        shown = {name: key for name, key in chart.bars.items() if _cell(row.get(key)) != _NOTHING}
        ticks.append(place + (len(shown) - 1) / 2)
        for name, key in shown.items():
            value, ours, end = row[key], row.get(ours_key), left
            text = f" {_cell(value)}"
            if _positive(value):
                end = value
                axis.barh(place, end - left, left=left, height=0.9, color=colours[name], label=name)
                if key != ours_key and _positive(ours):
                    text += f"   ({_cell(value / ours)}x)"
            axis.text(end, place, text, va="center", fontsize=8)
            place += 1
        place += 0.6
    axis.set_xscale("log")
    axis.set_xlim(left, max(values) * 4)  # room for the text at the longest bar
    axis.set_ylim(place - 1, -0.8)
    axis.set_yticks(ticks, [_cell(next(iter(row.values()))) for row in rows], fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    legend = {name: handle for handle, name in zip(handles, labels, strict=True)}
    # Above the panel, and ending where it ends, however many bars there are.
    corner = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.0}
    axis.legend(legend.values(), legend, ncols=len(legend), fontsize=9, frameon=False, **corner)


def draw_stacks(axis: Any, stacks: Mapping[str, Mapping[str, float]]) -> None:
    """One horizontal bar a name, of its parts in the order of the first that has any, with their sum at the end."""
    parts = next((list(stack) for stack in stacks.values() if stack), [])
    places = range(len(stacks))
    ends = [0.0] * len(stacks)
    for part, colour in zip(parts, _PART_COLOURS, strict=False):
        widths = [stack.get(part, 0.0) for stack in stacks.values()]
        axis.barh(places, widths, left=ends, height=0.7, color=colour, label=part)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for place, end, stack in zip(places, ends, stacks.values(), strict=True):
        axis.text(end, place, f" {_cell(end) if stack else _NOTHING}", va="center", fontsize=8)
    axis.set_xlim(0, max(ends) * 1.12 or 1)
    axis.set_ylim(len(stacks) - 0.4, -0.6)
    axis.set_yticks(places, list(stacks), fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    if parts:
        axis.legend(ncols=4, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _json_value(value: Any) -> Any:
    if _is_list(value):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    """A value for people: three significant digits, whole numbers from 1000 on, a dash for what was not measured."""
    if value is None or _is_list(value) or (isinstance(value, float) and math.isnan(value)):
        return _NOTHING
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return str(value).replace("|", "\\|")
