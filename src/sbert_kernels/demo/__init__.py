"""The main job in one command: ``python -m sbert_kernels demo`` trains an embedding model on this machine, offline.

It reads text pairs out of the docstrings of the installed packages, takes the same few steps with the stock loss and
with ours, trains on with ours, and says how much better the model is at held-out texts afterwards. torch and
sentence-transformers are imported by :func:`run`, not by this module.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sbert_kernels.demo.options import Options, add_arguments
from sbert_kernels.workloads.requirements import UserError, require_packages

if TYPE_CHECKING:
    from sbert_kernels.workloads.texts import Pairs

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Runs the demo with parsed options of :func:`add_arguments`; returns 0, or 2 if there is a mistake in them."""
    try:
        _run(Options.from_arguments(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: Options) -> None:
    begin = time.perf_counter()
    require_packages()
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"argument --output: {options.output} is a file, wanted a folder")

    pairs = _read(options)
    seconds = {"reading": time.perf_counter() - begin}

    import torch

    from sbert_kernels.demo import report
    from sbert_kernels.demo.comparison import build_model, compare, settings_of
    from sbert_kernels.demo.objectives import objective_of
    from sbert_kernels.workloads.models import dim_of
    from sbert_kernels.workloads.training import prepare, quiet_libraries

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
    dims = options.trained_dims(dim_of(model))
    data = timed("preparing", lambda: objective.prepare(pairs))
    report.print_data(pairs, data)
    steps = options.training_steps(len(data.rows))
    report.print_plan(options, objective.comparison, model, steps)
    sides = timed("comparison", lambda: compare(options, data.rows))
    before = timed("evaluation before", lambda: data.evaluation(model, dims))
    loss = objective.training_loss(model)
    train = timed("tokenizing", lambda: prepare(model, loss, data.rows, settings_of(options, steps), "training"))
    recording = timed("training", train)
    after = timed("evaluation after", lambda: data.evaluation(model, dims))
    seconds["total"] = time.perf_counter() - begin

    results = report.Results(options, pairs, data, sides, recording, before, after, seconds)
    report.print_results(results)
    report.write(results, model)


def _read(options: Options) -> Pairs:
    from sbert_kernels.demo import data
    from sbert_kernels.workloads import texts

    if options.data is not None:
        return data.file_pairs(options.data, options.columns)
    if options.dataset is not None:
        return data.hub_pairs(options.dataset, options.columns)
    return texts.docstring_pairs()
