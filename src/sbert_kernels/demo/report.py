"""What the demo found out: printed, and written down as results.json and results.png beside the trained model."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sentence_transformers import SentenceTransformer

from sbert_kernels import machine
from sbert_kernels.demo.comparison import Side, largest_difference
from sbert_kernels.demo.objectives import Data
from sbert_kernels.demo.options import Options
from sbert_kernels.workloads.charts import draw_stacks
from sbert_kernels.workloads.models import dim_of
from sbert_kernels.workloads.steps import PARTS, Recording, Step, median_step, whole
from sbert_kernels.workloads.texts import Pairs

WIDTH, INDENT = 100, 10  # of the lines on the terminal
COLOURS = {
    "stock": "#94a3b8",
    "sbert-kernels": "#c2410c",
    "training": "#1e293b",
    "before": "#cbd5e1",
    "after": "#c2410c",
}


@dataclass(frozen=True)
class Results:
    """Holds all that one run measured."""

    options: Options
    pairs: Pairs
    data: Data
    sides: dict[str, Side]
    training: Recording
    before: dict[str, float]
    after: dict[str, float]
    seconds: dict[str, float]  # of the parts of the run


# --- on the terminal --------------------------------------------------------------------------------------------------


def print_data(pairs: Pairs, data: Data) -> None:
    """Says where the pairs came from, what was left out, and what they are used for."""
    _print("Machine", machine.line())
    _print("Data", f"{len(pairs.pairs):,} pairs from {pairs.source}")
    if pairs.counts:
        _print("", ", ".join(f"{package} {count:,}" for package, count in pairs.counts.items()))
    _print("", "left out: " + ", ".join(f"{count:,} {reason}" for reason, count in pairs.left_out.items()))
    for line in data.lines:
        _print("", line)


def print_plan(options: Options, comparison: str, model: SentenceTransformer, steps: int) -> None:
    """Says which model takes which steps."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    dim = dim_of(model)
    _print("Model", f"{options.model}: {dim} dimensions, {millions:.1f} M parameters")
    if dims := options.trained_dims(dim):
        _print("Loss", f"MatryoshkaLoss at {', '.join(map(str, dims))} dimensions")
    _print(
        "Plan",
        f"{options.compare_steps} steps from the same seed with {comparison}, each in a process of its own; then "
        f"{steps} steps of training with ours; {options.batch_size:,} pairs a step"
        + (", of texts that are tokenized once, before the first step" if options.model == "static" else ""),
    )


def _print(label: str, text: str) -> None:
    print(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=f"{label:<{INDENT}}",
            subsequent_indent=" " * INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        ),
        flush=True,
    )


def print_results(results: Results) -> None:
    """Prints the comparison, what training brought, and where the time went."""
    print(f"\n{'':<28}" + "".join(f"{name:>16}" for name in results.sides) + "   stock / ours")
    sides = list(results.sides.values())
    for label, show, value in (
        ("step time, median", _step_time, _seconds),
        ("peak memory of training", _peak_memory, lambda side: side.peak_extra_bytes),
    ):
        print(f"{label:<28}" + "".join(f"{show(side):>16}" for side in sides) + f"{_ratio(*map(value, sides)):>15}")
        if show is _step_time:
            for part in PARTS:
                cells = [f"{step[part]:.3f} s" if (step := _median(side)) else "" for side in sides]
                print(f"  {part:<26}" + "".join(f"{cell:>16}" for cell in cells))
    cells = [f"{side.recording.losses[-1]:.6f}" if side.recording else _reason(side) for side in sides]
    print(f"{'loss of the last step':<28}" + "".join(f"{cell:>16}" for cell in cells))
    if (difference := largest_difference(results.sides)) is not None:
        print(f"{'largest relative difference':<28}{difference:>32.1e}")
    print(f"\n{results.data.evaluation.label:<28}{'before':>16}{'after':>16}")
    for metric, before in results.before.items():
        print(f"{metric:<28}{before:>16.3f}{results.after[metric]:>16.3f}")
    losses = results.training.losses
    print(f"{'loss, first and last step':<28}{losses[0]:>16.3f}{losses[-1]:>16.3f}")
    for name in _terms(results.training):
        first, last = (results.training.terms[step][name] for step in (0, -1))
        print(f"  {name:<26}{first:>16.3f}{last:>16.3f}")
    parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in results.seconds.items())
    print()
    _print("Time", parts)


def _terms(recording: Recording) -> list[str]:
    """Returns the names of the terms of a training's loss, if it has several."""
    return list(recording.terms[0]) if recording.terms else []


def _median(side: Side) -> Step | None:
    return median_step(side.recording.warm_steps) if side.recording else None


def _seconds(side: Side) -> float | None:
    return whole(step) if (step := _median(side)) else None


def _step_time(side: Side) -> str:
    return f"{_seconds(side):.3f} s" if side.recording else _reason(side)


def _reason(side: Side) -> str:
    """Returns why a side of the comparison has no recording."""
    return side.error or "not known"


def _peak_memory(side: Side) -> str:
    if side.error:
        return side.error
    return "not known" if side.peak_extra_bytes is None else f"{side.peak_extra_bytes / machine.MIB:,.0f} MiB"


def _ratio(stock: float | None, ours: float | None) -> str:
    return f"{stock / ours:.2f}x" if stock and ours else "-"


# --- on disk ----------------------------------------------------------------------------------------------------------


def write(results: Results, model: SentenceTransformer) -> None:
    """Writes the model, results.json and results.png to the output folder, and says where."""
    output = results.options.output
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(output / "model"))
    (output / "results.json").write_text(json.dumps(as_json(results), indent=2, default=str) + "\n", encoding="utf-8")
    figure = draw(results)
    figure.savefig(output / "results.png", dpi=150)
    _print("Written", f"{output / 'results.json'}, {output / 'results.png'}")
    _print("", f"{output / 'model'}, which SentenceTransformer({str(output / 'model')!r}) loads")


def as_json(results: Results) -> dict[str, Any]:
    """Returns everything in ``results`` but the texts themselves."""
    pairs = results.pairs
    return {
        "commit": machine.commit(),
        "machine": machine.facts(),
        "options": dataclasses.asdict(results.options),
        "data": {
            "source": pairs.source,
            "pairs": len(pairs.pairs),
            "pairs_by_package": pairs.counts,
            "left_out": pairs.left_out,
            **results.data.facts,
        },
        "comparison": {
            "largest_relative_loss_difference": largest_difference(results.sides),
            **{
                name: {**dataclasses.asdict(side), "median_step": _median(side), "median_step_seconds": _seconds(side)}
                for name, side in results.sides.items()
            },
        },
        "training": dataclasses.asdict(results.training),
        "before": results.before,
        "after": results.after,
        "seconds": results.seconds,
    }


def draw(results: Results) -> Figure:
    """Draws four panels: losses, held-out scores before and after, step time, peak memory."""
    options = results.options
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"sbert-kernels demo: {options.loss}, {options.model}, batch size {options.batch_size:,}, "
        f"{len(results.data.rows):,} pairs",
        fontsize=13,
    )
    (losses, held_out), (times, memory) = figure.subplots(2, 2)
    _draw_losses(losses, results)
    _draw_evaluation(held_out, results)
    times.set(title="Step time (median)", xlabel="seconds")
    draw_stacks(times, {f"{name}\n{side.error or ''}": _median(side) or {} for name, side in results.sides.items()})
    _draw_bars(
        memory,
        "Peak memory of training, over what was loaded",
        "MiB",
        {name: side.peak_extra_bytes and side.peak_extra_bytes / machine.MIB for name, side in results.sides.items()},
        {name: _peak_memory(side) for name, side in results.sides.items()},
    )
    for axes in (losses, held_out, times, memory):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_losses(axes: Axes, results: Results) -> None:
    curve = results.training.losses
    axes.plot(range(1, len(curve) + 1), curve, color=COLOURS["training"], label="training with sbert-kernels")
    for name, style in zip(_terms(results.training), ("--", ":", "-."), strict=False):
        values = [step[name] for step in results.training.terms]
        axes.plot(
            range(1, len(values) + 1), values, style, color=COLOURS["training"], linewidth=1, label=f"its {name} term"
        )
    # The stock curve is wide and light, so that ours shows on top of it where the two are equal.
    styles: dict[str, dict[str, Any]] = {
        "stock": {"linewidth": 6},
        "sbert-kernels": {"linewidth": 1.5, "marker": "o", "markersize": 3},
    }
    for name, side in results.sides.items():
        if side.recording:
            steps = range(1, len(side.recording.losses) + 1)
            axes.plot(steps, side.recording.losses, color=COLOURS[name], label=f"comparison: {name}", **styles[name])
    title = "Loss"
    if (difference := largest_difference(results.sides)) is not None:
        title += f" (stock and ours differ by at most {difference:.1e} of it)"
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.margins(y=0.4)  # room for the legend
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper right", ncols=2, fontsize=8)


def _draw_evaluation(axes: Axes, results: Results) -> None:
    width = 0.38
    fontsize = 9 if len(results.before) <= 3 else 7
    for offset, (name, scores) in zip(
        (-width / 2, width / 2), (("before", results.before), ("after", results.after)), strict=True
    ):
        bars = axes.bar(
            [i + offset for i in range(len(scores))],
            list(scores.values()),
            width,
            color=COLOURS[name],
            label=f"{name} training",
        )
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=fontsize)
    axes.set(
        title=results.data.evaluation.title,
        xticks=range(len(results.before)),
        xticklabels=[metric.replace(", ", "\n") for metric in results.before],
        ylim=(min(0, 1.1 * min(*results.before.values(), *results.after.values())), 1.1),
    )
    axes.tick_params(axis="x", labelsize=fontsize)
    axes.legend(frameon=False, loc="upper left")


def _draw_bars(
    axes: Axes, title: str, unit: str, values: Mapping[str, float | None], labels: Mapping[str, str]
) -> None:
    names = list(values)
    bars = axes.bar(names, [values[name] or 0 for name in names], 0.5, color=[COLOURS[name] for name in names])
    axes.bar_label(bars, labels=[labels[name] for name in names], padding=2)
    axes.set(title=title, ylabel=unit)
    axes.margins(y=0.15)
