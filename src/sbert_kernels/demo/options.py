"""The demo's command line: every option once, with its default for each loss and model.

Cheap to import, since ``python -m sbert_kernels --help`` builds this parser.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sbert_kernels.workloads.recipes import LEARNING_RATES, MATRYOSHKA_DIMS, STATIC_DIM, default_matryoshka_dims
from sbert_kernels.workloads.requirements import UserError


@dataclass(frozen=True)
class Defaults:
    """Holds the values of options that the command line does not name.

    They are chosen so that the demo takes at most three minutes on two cores.
    """

    batch_size: int
    steps: int
    compare_steps: int
    lr: float
    held_out: int  # pairs
    distractors: int = 0  # further held-out texts in the corpus, without a query
    graded: int = 0  # pairs that a teacher makes graded ones of, to train on


_IN_BATCH = {
    "static": Defaults(
        batch_size=4096,
        steps=30,
        compare_steps=5,
        lr=LEARNING_RATES["static"],
        held_out=1000,
        distractors=2000,
    ),
    "minilm": Defaults(
        batch_size=128, steps=4, compare_steps=2, lr=LEARNING_RATES["minilm"], held_out=250, distractors=250
    ),
}
# By loss, then by model.
DEFAULTS = {
    "matryoshka": _IN_BATCH,
    "mnr": _IN_BATCH,
    "angle": {
        "static": Defaults(batch_size=1024, steps=30, compare_steps=5, lr=5e-2, held_out=300, graded=1700),
        "minilm": Defaults(batch_size=64, steps=8, compare_steps=2, lr=5e-5, held_out=300),
    },
}
MODELS = tuple(_IN_BATCH)


@dataclass(frozen=True)
class Options:
    """Holds the options of one run of the demo, with every default filled in."""

    loss: str  # a key of DEFAULTS
    model: str
    data: Path | None
    columns: tuple[str, ...] | None  # of the query, its text and, for angle, their score
    dataset: str | None
    batch_size: int
    steps: int | None  # one of steps and epochs is None
    epochs: float | None
    compare_steps: int
    dim: int | None  # None: as the model has it
    matryoshka_dims: tuple[int, ...] | None  # None: those of the loss
    lr: float
    seed: int
    output: Path
    threads: int | None  # None: as torch chooses

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Options:
        """Returns the options of a parsed command line; raises UserError if they do not go together."""
        values = {name: getattr(args, name) for name in cls.__dataclass_fields__}
        defaults = DEFAULTS[args.loss][args.model]
        for name in ("batch_size", "compare_steps", "lr"):
            if values[name] is None:
                values[name] = getattr(defaults, name)
        if values["steps"] is None and values["epochs"] is None:
            values["steps"] = defaults.steps
        if args.model == "static":
            values["dim"] = args.dim or STATIC_DIM
        elif args.dim is not None:
            raise UserError(f"argument --dim: got {args.dim} with --model {args.model}, but only static has a free one")
        if args.matryoshka_dims and args.loss == "mnr":
            dims = ",".join(map(str, args.matryoshka_dims))
            raise UserError(
                f"argument --matryoshka-dims: got {dims} with --loss mnr, which trains whole embeddings only; wanted "
                "--loss matryoshka"
            )
        if values["columns"] and not (values["data"] or values["dataset"]):
            raise UserError(
                f"argument --columns: got {','.join(args.columns)}, but neither --data nor --dataset is given"
            )
        scored = len(values["columns"] or ()) == 3
        if scored and args.loss != "angle":
            raise UserError(
                f"argument --columns: got {','.join(args.columns)} with --loss {args.loss}, but only angle has a use "
                "for scores"
            )
        if args.loss == "angle" and args.model == "minilm" and not scored:
            raise UserError(
                "argument --model: got minilm with --loss angle, but it is the teacher that makes the scores and "
                "cannot learn from itself; wanted scores of your own, as a third name in --columns"
            )
        return cls(**values)

    def trained_dims(self, dim: int) -> tuple[int, ...]:
        """Returns the Matryoshka dimensions to train of a model of ``dim``, widest first; none for a plain loss."""
        if self.matryoshka_dims is None:
            return default_matryoshka_dims(dim) if self.loss == "matryoshka" else ()
        if max(self.matryoshka_dims) > dim:
            raise UserError(
                f"argument --matryoshka-dims: got {max(self.matryoshka_dims)}, wanted at most the model's {dim} "
                "dimensions"
            )
        return tuple(sorted(self.matryoshka_dims, reverse=True))

    def training_steps(self, pairs: int) -> int:
        """Returns ``steps``, or those of ``epochs`` over so many pairs in full batches."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # from_arguments fills one of the two in
        return max(1, round(self.epochs * (pairs // self.batch_size)))


def _number(
    kind: type[int] | type[float], at_least: float | None = None, above: float | None = None
) -> Callable[[str], int | float]:
    """Returns an argparse type: a number of this kind within the bound. argparse puts the argument's name first."""
    wanted = "a whole number" if kind is int else "a number"
    if at_least is not None:
        wanted += f" of at least {at_least}"
    if above is not None:
        wanted += f" above {above}"

    def parse(text: str) -> int | float:
        value: int | float | None
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
    """Adds the demo's options to ``parser``."""

    def per_model(name: str) -> str:
        return "; ".join(
            f"{loss}: " + ", ".join(f"{model} {getattr(defaults, name)}" for model, defaults in models.items())
            for loss, models in DEFAULTS.items()
        )

    parser.add_argument(
        "--loss",
        choices=tuple(DEFAULTS),
        default="matryoshka",
        help="mnr: in-batch negatives, MultipleNegativesRankingLoss (for minilm the cached one); matryoshka: the same "
        "within MatryoshkaLoss; angle: AnglEObjective on pairs that a teacher scores, or on scores of your own "
        "(default: %(default)s)",
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
        "--matryoshka-dims",
        type=_dims,
        metavar="D,D,...",
        help="train embeddings cut to these dimensions, with MatryoshkaLoss (default for matryoshka: the model's, and "
        f"those of {', '.join(map(str, MATRYOSHKA_DIMS))} that are smaller; for angle: none)",
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
