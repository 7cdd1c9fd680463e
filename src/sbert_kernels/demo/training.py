"""Training with the real ``SentenceTransformerTrainer``, and the comparison of stock losses with their replacement.

Both sides of the comparison take the same steps from the same seed, each in a process of its own: a peak of memory that
one side reached would hide the other's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from sbert_kernels.bench.harness import run_in_process
from sbert_kernels.bench.steps import Recording, StepRecorder, difference, median_step, whole
from sbert_kernels.demo.data import Row
from sbert_kernels.demo.models import build_model, without_dropout
from sbert_kernels.demo.objectives import SIDES, objective_of
from sbert_kernels.demo.options import Options

COLUMNS = ("query", "text", "score")  # of rows, as far as they go; the Trainer takes the last for labels


@dataclass(frozen=True)
class Settings:
    """What the Trainer is told."""

    batch_size: int
    steps: int
    lr: float
    seed: int
    output: Path
    workers: int = 0  # processes that tokenize the next batches during a step; 0: the step waits for its own


@dataclass(frozen=True)
class Side:
    """One side of the comparison. ``recording`` is None if ``error`` says why; None bytes are not known here."""

    recording: Recording | None
    peak_extra_bytes: int | None
    error: str | None


def compare(options: Options, rows: list[Row]) -> dict[str, Side]:
    """Train ``compare_steps`` steps with each module of ``SIDES``."""
    # One batch more than is trained on: the Trainer loads a batch ahead, in the last step as in any other.
    seen = rows[: (options.compare_steps + 1) * options.batch_size]
    sides = {}
    for name in SIDES:
        result = run_in_process(_comparison, name, options, seen)
        sides[name] = Side(result.value, result.peak_extra_bytes, result.error)
    return sides


def largest_difference(sides: dict[str, Side]) -> float | None:
    """Between the loss curves of the two sides, relative and at the same step; None if one of them has none."""
    recordings = [side.recording for side in sides.values()]
    return None if None in recordings else difference(*recordings)


def workers_for(side: Side) -> int:
    """One where a worker can tokenize beside the step and there is something to gain, else none.

    A worker tokenizes on one core what would be spread over all of them otherwise, so that it only keeps up with a step
    whose other parts take a good deal longer; behind, it takes a core from them and makes them wait too.
    """
    if side.recording is None:
        return 0
    step = median_step(side.recording.warm_steps)
    rest = whole(step) - step["tokenize"]
    return 1 if step["tokenize"] > 0.1 * whole(step) and rest > 1.5 * step["tokenize"] else 0


def _comparison(name: str, options: Options, rows: list[Row]) -> Callable[[], Recording]:
    quiet_libraries()
    # The sides may encode a batch more or less often, and would draw other masks.
    model = without_dropout(build_model(options))
    loss = objective_of(options).loss(model, name)
    return prepare(model, loss, rows, demo_settings(options, options.compare_steps), name)


def demo_settings(options: Options, steps: int, workers: int = 0) -> Settings:
    """What these options tell the Trainer."""
    return Settings(options.batch_size, steps, options.lr, options.seed, options.output, workers)


def prepare(
    model: SentenceTransformer, loss: nn.Module, rows: Sequence[Row], settings: Settings, description: str = ""
) -> Callable[[], Recording]:
    """Set everything up; the returned function trains the model in place, on one bar if there is a description."""
    recorder = StepRecorder(model, loss)
    overlap = {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2} if settings.workers else {}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(settings.output),
        per_device_train_batch_size=settings.batch_size,
        dataloader_drop_last=True,  # a smaller batch has fewer negatives, so that its loss is another one
        dataloader_num_workers=settings.workers,
        max_steps=settings.steps,
        learning_rate=settings.lr,
        seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # the bar below shows the loss instead of printing a line for each step
        use_cpu=True,
        **overlap,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(dict(zip(COLUMNS, zip(*rows, strict=True), strict=False))),
        loss=loss,
        callbacks=[recorder, _Bar(recorder.recording, description)] if description else [recorder],
    )
    trainer.remove_callback(PrinterCallback)

    def train() -> Recording:
        with _single_threaded_tokenizers() if settings.workers else contextlib.nullcontext():
            trainer.train()
        return recorder.recording

    return train


@contextlib.contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """A process that was forked after tokenizers used threads has lost them; each worker is to tokenize on its own."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Bar(TrainerCallback):
    """The steps and their loss on one bar."""

    def __init__(self, recording: Recording, description: str) -> None:
        self.recording = recording
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = tqdm(total=state.max_steps, desc=f"{self.description:>13}", unit="step")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.set_postfix(loss=f"{self.recording.losses[-1]:.3f}", refresh=False)
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


def quiet_libraries() -> None:
    """Leave the terminal to the demo: no bars and no advice of the libraries under it, only their errors."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
