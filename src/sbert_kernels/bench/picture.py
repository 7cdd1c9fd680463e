"""The picture of the README: step time and memory, stock beside ours, drawn from the recorded results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sbert_kernels.bench.results import Result
from sbert_kernels.workloads.charts import OURS_COLOUR, cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STOCK_COLOUR = "#94a3b8"
CPU, GPU = "cpu-epyc-2-cores", "h200"


@dataclass(frozen=True)
class Number:
    """Says where a number of the results stands: the file, the row whose columns have these values, and the column."""

    file: str  # folder/name
    row: Mapping[str, str]
    column: str

    def read(self, results: Sequence[Result]) -> float:
        """Returns the number; raises ValueError if the results do not have it."""
        for result in results:
            if f"{result.folder}/{result.name}" != self.file:
                continue
            for row in result.rows:
                if self.row.items() <= row.items() and isinstance(row.get(self.column), (int, float)):
                    return float(row[self.column])
        raise ValueError(f"{self.file}.json: has no number {self.column!r} in a row with {dict(self.row)}")


@dataclass(frozen=True)
class Comparison:
    """Describes two bars in each of the two panels: stock, then ours."""

    label: str
    unit: str  # of the times
    times: tuple[Number, Number]
    memory: tuple[Number, Number]  # MiB


def _sides(label: str, file: str, case: str, column: str, ours: str, unit: str) -> Comparison:
    """Returns a comparison of two rows that a column tells apart."""
    rows = [{"case": case, column: side} for side in ("stock", ours)]
    time = "s" if unit == "s" else "step ms"
    times, memory = ([Number(file, row, name) for row in rows] for name in (time, "peak extra MiB"))
    return Comparison(label, unit, (times[0], times[1]), (memory[0], memory[1]))


def _columns(label: str, time_file: str, memory_file: str, case: str, stock: str = "stock") -> Comparison:
    """Returns a comparison of two columns."""
    row = {"case": case}
    return Comparison(
        label,
        "ms",
        (Number(time_file, row, f"{stock} ms"), Number(time_file, row, "ours ms")),
        (Number(memory_file, row, f"{stock} MiB"), Number(memory_file, row, "ours MiB")),
    )


COMPARISONS = (
    _sides(
        "CPU, Matryoshka(MNR)\ntraining step, static model, 8,192 pairs",
        f"{CPU}/training-again",
        "matryoshka N=8192 D=512",
        "side",
        "sbert-kernels",
        "ms",
    ),
    _sides(
        "CPU, MNR\ntraining step, static model, 8,192 pairs",
        f"{CPU}/training-again",
        "mnr N=8192 D=512",
        "side",
        "sbert-kernels",
        "ms",
    ),
    _sides(
        "CPU, cached MNR\nforward + backward, MiniLM, 512 pairs",
        f"{CPU}/gradcache-text",
        "text N=512 L=256",
        "contender",
        "ours",
        "s",
    ),
    _columns(
        "CPU, MNR\nloss alone, N=8,192, float32",
        f"{CPU}/contrastive-again",
        f"{CPU}/contrastive-again",
        "mnr N=8192 D=384",
    ),
    _columns(
        "CPU, AnglE\nloss alone, N=65,536, float32",
        f"{CPU}/ranking-again",
        f"{CPU}/ranking-again",
        "angle-large N=65536 D=384",
    ),
    _columns(
        "H200, MNR\nloss alone, N=65,536, bfloat16",
        f"{GPU}/gpu-contrastive",
        f"{GPU}/gpu-memory",
        "N=65536 D=768 bfloat16",
        "eager",
    ),
)


def write(results: Sequence[Result], path: Path) -> None:
    """Draws both panels into an SVG file. Each pair of bars is as long as stock's number says, and carries both."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit('the picture needs matplotlib: pip install "sbert-kernels[demo]"') from error

    figure = Figure(figsize=(11, 0.75 * len(COMPARISONS) + 0.9), layout="constrained")
    FigureCanvasSVG(figure)
    time, memory = figure.subplots(1, 2, sharey=True)
    units = [comparison.unit for comparison in COMPARISONS]
    _draw(time, "Time", [[number.read(results) for number in c.times] for c in COMPARISONS], units)
    _draw(memory, "Peak memory", [[number.read(results) for number in c.memory] for c in COMPARISONS], ["MiB"] * 99)
    time.set_yticks(range(len(COMPARISONS)), [comparison.label for comparison in COMPARISONS], fontsize=9)
    time.set_ylim(len(COMPARISONS) - 0.4, -0.6)
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=2, frameon=False, loc="outside lower center")
    # The same results give the same file: no date, and no random names of its elements.
    with matplotlib.rc_context({"svg.hashsalt": "sbert-kernels"}):
        figure.savefig(path, metadata={"Date": None})


def _draw(axis: Axes, title: str, values: Sequence[Sequence[float]], units: Sequence[str]) -> None:
    """Draws the bars of one panel as shares of stock's, since the numbers themselves differ by thousands."""
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    for which, (name, colour) in enumerate((("sentence-transformers", STOCK_COLOUR), ("sbert-kernels", OURS_COLOUR))):
        shares = [pair[which] / pair[0] for pair in values]
        places = [row + (0.19 if which else -0.19) for row in range(len(values))]
        axis.barh(places, shares, height=0.36, color=colour, label=name)
        for place, share, pair, unit in zip(places, shares, values, units, strict=False):
            text = f" {cell(pair[which])} {unit}"
            if which:
                text += f"   ({cell(pair[0] / pair[1])}x)"
            axis.text(share, place, text, va="center", fontsize=8)
    axis.set_xlim(0, 1.35)
    axis.set_xticks([])
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
