"""The command line of ``python -m sbert_kernels bench``. It imports a benchmark, and torch, only to run it."""

from __future__ import annotations

import argparse
import functools
import importlib

from sbert_kernels.bench import page
from sbert_kernels.bench.cases import contrastive, gpu, gradcache, host, kernels, objective, ranking, training

# Each subject's cases, with the options of its command line, and what it measures.
SUBJECTS = {
    "contrastive": (contrastive, "the in-batch-negatives losses, from embeddings to gradients"),
    "ranking": (ranking, "the ranking losses CoSENT and AnglE, from embeddings to gradients"),
    "objective": (objective, "AnglE's whole objective on a model, against the sum of three stock losses"),
    "training": (training, "whole training steps of a static-embedding model, and what they are made of"),
    "gradcache": (gradcache, "a step of a transformer through the gradient cache, stock's engine and ours"),
    "host": (host, "what a step costs the host of a GPU, without one: time, launches, calls"),
    "kernels": (kernels, "each kernel of a backend alone, beside the vendor's product or a copy of the same bytes"),
    "gpu": (gpu, "our kernels on one GPU: parity, time, memory and peers"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a sub-command for each subject, and one that writes the page about all results."""
    commands = parser.add_subparsers(dest="subject", required=True, metavar=" | ".join([*SUBJECTS, "report"]))
    for name, (cases, text) in SUBJECTS.items():
        subject = commands.add_parser(name, help=text)
        cases.add_arguments(subject)
        subject.set_defaults(run=functools.partial(_measure, name))
    report = commands.add_parser("report", help="write docs/benchmarks.md and its picture from the recorded results")
    page.add_arguments(report)
    report.set_defaults(run=page.run)


def _measure(subject: str, arguments: argparse.Namespace) -> None:
    importlib.import_module(f"sbert_kernels.bench.{subject}").run(arguments)
