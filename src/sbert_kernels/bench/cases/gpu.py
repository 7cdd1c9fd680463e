"""The kinds of jobs of ``bench gpu``, and the options of its command line."""

from __future__ import annotations

import argparse

from sbert_kernels.bench import arguments

KINDS = {
    "parity": "errors beside eager's, both against float64",
    "backends": "time of the in-batch loss by each of our backends, at the sizes of the project's goals",
    "host": "time of the host alone, of steps that follow one another without waiting for the card",
    "contrastive": "time of the in-batch loss",
    "memory": "peak extra memory of the in-batch loss",
    "weights": "time of the two ways of making the weights",
    "losses": "time of the symmetric loss, GIST, Matryoshka, CoSENT and AnglE",
    "training": "whole training steps of transformers with random weights, on real texts",
    "sigmoid": "time of another library's sigmoid loss, which is another loss of the same shape",
}
# Their rows come with those of the kind that they are measured with.
WITHOUT_JOBS = {"memory": "contrastive"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    kinds = [kind for kind in KINDS if kind not in WITHOUT_JOBS]
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="what the whole command may take (default: %(default)s)"
    )
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="which jobs (default: all)")
    arguments.add_arguments(parser, quick="the main parity rows, host, and four sizes of the in-batch loss", repeats=12)
