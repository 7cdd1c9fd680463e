"""The demo's command line: every option once, with its default for each objective and model.

Cheap to import, since ``python -m sbert_kernels --help`` builds this parser.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class DemoError(Exception):
    """Something that the user can mend; the demo prints it without a traceback."""


@dataclass(frozen=True)
class Defaults:
    """What an option is when the command line does not name it, chosen so that the demo fits in three minutes on two
    cores."""

    batch_size: int
    steps: int
    compare_steps: int
    lr: float
    held_out: int  # pairs
    distractors: int = 0  # further held-out texts in the corpus, without a query
    graded: int = 0  # pairs that a teacher makes graded ones of, to train on


# By objective, then by model.
DEFAULTS = {
    "mnr": {
        # The learning rate of ST's static-embedding recipe: only a few rows of the table get a gradient in each step.
        "static": Defaults(batch_size=4096, steps=30, compare_steps=5, lr=2e-1, held_out=1000, distractors=2000),
        "minilm": Defaults(batch_size=128, steps=4, compare_steps=2, lr=1e-4, held_out=250, distractors=250),
    },
    "angle": {
        "static": Defaults(batch_size=1024, steps=30, compare_steps=5, lr=5e-2, held_out=300, graded=1700),
        "minilm": Defaults(batch_size=64, steps=8, compare_steps=2, lr=5e-5, held_out=300),
    },
}
MODELS = tuple(DEFAULTS["mnr"])
STATIC_DIM = 512
MATRYOSHKA_DIMS = (512, 256, 128, 64, 32)


@dataclass(frozen=True)
class Options:
    """One run of the demo, with every default filled in."""

    objective: str
    model: str
    data: Path | None
    columns: tuple[str, ...] | None  # of the query, its text and, for angle, their score
    dataset: str | None
    batch_size: int
    steps: int | None  # one of steps and epochs is None
    epochs: float | None
    compare_steps: int
    dim: int | None  # None: as the model has it
    matryoshka: tuple[int, ...] | None  # None: the plain loss; (): the default dimensions
    lr: float
    seed: int
    output: Path
    threads: int | None  # None: as torch chooses

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Options:
        values = {name: getattr(args, name) for name in cls.__dataclass_fields__}
        defaults = DEFAULTS[args.objective][args.model]
        for name in ("batch_size", "compare_steps", "lr"):
            if values[name] is None:
                values[name] = getattr(defaults, name)
        if values["steps"] is None and values["epochs"] is None:
            values["steps"] = defaults.steps
        if args.model == "static":
            values["dim"] = args.dim or STATIC_DIM
        elif args.dim is not None:
            raise DemoError(f"argument --dim: got {args.dim} with --model {args.model}, but only static has a free one")
        if values["columns"] and not (values["data"] or values["dataset"]):
            raise DemoError(
                f"argument --columns: got {','.join(args.columns)}, but neither --data nor --dataset is given"
            )
        scored = len(values["columns"] or ()) == 3
        if scored and args.objective != "angle":
            raise DemoError(
                f"argument --columns: got {','.join(args.columns)} with --objective {args.objective}, but only angle "
                "has a use for scores"
            )
        if args.objective == "angle" and args.model == "minilm" and not scored:
            raise DemoError(
                "argument --model: got minilm with --objective angle, but it is the teacher that makes the scores and "
                "cannot learn from itself; wanted scores of your own, as a third name in --columns"
            )
        return cls(**values)

    def matryoshka_dims(self, dim: int) -> tuple[int, ...]:
        """The dimensions to train of a model of ``dim``, widest first; none without ``--matryoshka``."""
        if self.matryoshka is None:
            return ()
        if not self.matryoshka:
            return default_matryoshka_dims(dim)
        if max(self.matryoshka) > dim:
            raise DemoError(
                f"argument --matryoshka: got {max(self.matryoshka)}, wanted at most the model's {dim} dimensions"
            )
        return tuple(sorted(self.matryoshka, reverse=True))

    def training_steps(self, pairs: int) -> int:
        """``steps``, or ``epochs`` over so many pairs in full batches."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * (pairs // self.batch_size)))


def default_matryoshka_dims(dim: int) -> tuple[int, ...]:
    """``MATRYOSHKA_DIMS`` as far as they are below ``dim``, after ``dim`` itself."""
    return (dim, *(smaller for smaller in MATRYOSHKA_DIMS if smaller < dim))


def _number(
    kind: type[int] | type[float], at_least: float | None = None, above: float | None = None
) -> Callable[[str], int | float]:
    """An argparse type: a number of this kind within the bound; argparse puts the argument's name before the error."""
    wanted = "a whole number" if kind is int else "a number"
    if at_least is not None:
        wanted += f" of at least {at_least}"
    if above is not None:
        wanted += f" above {above}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if (
            value is None
            or not abs(value) < float("inf")
            or (at_least is not None and value < at_least)
            or (above is not None and value <= above)
        ):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {wanted}")
        return value

    return parse


def _columns(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if len(names) not in (2, 3) or not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted two or three different column names with commas between them"
        )
    return names


def _dims(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or len({*map(int, parts)}) < len(parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted different whole numbers above 0 with commas between")
    return tuple(map(int, parts))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to ``parser``."""

    def per_model(name: str) -> str:
        return "; ".join(
            f"{objective}: " + ", ".join(f"{model} {getattr(defaults, name)}" for model, defaults in models.items())
            for objective, models in DEFAULTS.items()
        )

    parser.add_argument(
        "--objective",
        choices=tuple(DEFAULTS),
        default="mnr",
        help="mnr: in-batch negatives, MultipleNegativesRankingLoss (for minilm the cached one); angle: AnglEObjective "
        "on pairs that a teacher scores, or on scores of your own (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="static",
        help="static: a StaticEmbedding model from fresh weights; minilm: all-MiniLM-L6-v2, fine-tuned; with angle, on "
        "scores of your own only (default: %(default)s)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="a .csv, .jsonl or .parquet file of text pairs (default: the docstrings of the installed packages)",
    )
    source.add_argument(
        "--dataset", metavar="ID", help="a dataset of the Hugging Face hub, ID or ID:CONFIG; needs a network"
    )
    parser.add_argument(
        "--columns",
        type=_columns,
        metavar="A,B[,SCORE]",
        help="the columns of --data or --dataset with the query and its text, and for angle the score of the two "
        "(default: the first two of text, which a teacher scores)",
    )
    parser.add_argument(
        "--batch-size", type=_number(int, at_least=2), metavar="N", help=f"pairs a step ({per_model('batch_size')})"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=_number(int, at_least=1), metavar="N", help=f"training steps ({per_model('steps')})"
    )
    length.add_argument(
        "--epochs", type=_number(float, above=0), metavar="X", help="passes over the data, in place of --steps"
    )
    parser.add_argument(
        "--compare-steps",
        type=_number(int, at_least=2),
        metavar="N",
        help=f"steps of the comparison with the stock loss; the first warms up ({per_model('compare_steps')})",
    )
    parser.add_argument(
        "--dim", type=_number(int, at_least=1), metavar="D", help=f"embedding dimension of static ({STATIC_DIM})"
    )
    parser.add_argument(
        "--matryoshka",
        type=_dims,
        nargs="?",
        const=(),
        metavar="D,D,...",
        help="train with MatryoshkaLoss at these dimensions (default: the model's, and those of "
        f"{', '.join(map(str, MATRYOSHKA_DIMS))} that are smaller)",
    )
    parser.add_argument("--lr", type=_number(float, above=0), metavar="X", help=f"learning rate ({per_model('lr')})")
    parser.add_argument("--seed", type=_number(int, at_least=0), default=0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("sbert-kernels-demo"),
        metavar="FOLDER",
        help="where the model, results.json and results.png go (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=_number(int, at_least=1), metavar="N", help="threads of torch (default: as it chooses)"
    )
