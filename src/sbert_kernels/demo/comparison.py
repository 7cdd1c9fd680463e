"""The comparison of stock losses with their replacement, in the steps of a real training.

Both sides take the same steps from the same seed, each in a process of its own: a peak of memory that one side reached
would hide the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sentence_transformers import SentenceTransformer

from sbert_kernels import machine
from sbert_kernels.demo.objectives import objective_of
from sbert_kernels.demo.options import Options
from sbert_kernels.workloads.models import minilm_model, static_model, without_dropout
from sbert_kernels.workloads.recipes import SIDES
from sbert_kernels.workloads.steps import Recording, difference
from sbert_kernels.workloads.texts import Row
from sbert_kernels.workloads.training import Settings, prepare, quiet_libraries


@dataclass(frozen=True)
class Side:
    """Holds what one side of the comparison measured.

    `recording` is None if the side failed, and `error` says why; the peak is None where it cannot be measured.
    """

    recording: Recording | None
    peak_extra_bytes: int | None
    error: str | None


def compare(options: Options, rows: Sequence[Row]) -> dict[str, Side]:
    """Trains ``compare_steps`` steps with each module of ``SIDES`` and returns what each side measured."""
    # One batch more than is trained on: the Trainer loads a batch ahead, in the last step as in any other.
    seen = rows[: (options.compare_steps + 1) * options.batch_size]
    sides = {}
    for name in SIDES:
        result = machine.run_in_process(_comparison, name, options, seen)
        sides[name] = Side(result.value, result.peak_extra_bytes, result.error)
    return sides


def largest_difference(sides: dict[str, Side]) -> float | None:
    """Returns the largest relative difference of the two loss curves at one step; None if one of them is missing."""
    recordings = [side.recording for side in sides.values() if side.recording is not None]
    return difference(*recordings) if len(recordings) == len(sides) else None


def _comparison(name: str, options: Options, rows: Sequence[Row]) -> Callable[[], Recording]:
    quiet_libraries()
    # The sides may encode a batch more or less often, and would draw other masks.
    model = without_dropout(build_model(options))
    loss = objective_of(options).loss(model, name)
    return prepare(model, loss, rows, settings_of(options, options.compare_steps), name)


def build_model(options: Options) -> SentenceTransformer:
    """Returns the untrained model, on the CPU: the same weights for the same options in every process."""
    if options.model == "minilm":
        return minilm_model()
    assert options.dim is not None  # Options.from_arguments fills it in
    return static_model(options.dim, options.seed)


def settings_of(options: Options, steps: int) -> Settings:
    """Returns what these options tell the Trainer, with texts that are tokenized once, before the first step."""
    return Settings(options.batch_size, steps, options.lr, options.seed, options.output, tokenize_ahead=True)
