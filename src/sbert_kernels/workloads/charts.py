"""Numbers and stacked bars as reports of the benchmarks and the demo show them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTHING = "-"
OURS_COLOUR = "#c2410c"
# From what the loss has nothing to do with (greys) to what the kernels replace (warm).
PART_COLOURS = ("#cbd5e1", "#94a3b8", "#c2410c", "#fb923c", "#64748b", "#334155", "#e2e8f0")


def cell(value: object) -> str:
    """Returns a value for people: three significant digits, whole numbers from 1000 on, a dash for what is missing."""
    if value is None or isinstance(value, (list, tuple)) or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def draw_stacks(axis: Axes, stacks: Mapping[str, Mapping[str, float]]) -> None:
    """Draws one horizontal bar a name: its parts in the order of the first bar that has any, and their sum at its end.

    A name without parts gets a dash.
    """
    parts = next((list(stack) for stack in stacks.values() if stack), [])
    places = range(len(stacks))
    ends = [0.0] * len(stacks)
    for part, colour in zip(parts, PART_COLOURS, strict=False):
        widths = [stack.get(part, 0.0) for stack in stacks.values()]
        axis.barh(places, widths, left=ends, height=0.7, color=colour, label=part)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for place, end, stack in zip(places, ends, stacks.values(), strict=True):
        axis.text(end, place, f" {cell(end) if stack else NOTHING}", va="center", fontsize=8)
    axis.set_xlim(0, max(ends) * 1.12 or 1)
    axis.set_ylim(len(stacks) - 0.4, -0.6)
    axis.set_yticks(places, list(stacks), fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    if parts:
        axis.legend(ncols=4, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12))
