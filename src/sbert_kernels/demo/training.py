"""Training with the real ``SentenceTransformerTrainer``, and the comparison of a stock loss with its replacement.

Both sides of the comparison take the same steps from the same seed, each in a process of its own: a peak of memory that
one side reached would hide the other's.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from sbert_kernels.benchmarks.harness import run_in_process
from sbert_kernels.demo.data import Pair
from sbert_kernels.demo.models import build_model
from sbert_kernels.demo.options import Options

# The same class names and constructors in both modules: to change the import is all it takes.
SIDES = {"stock": "sentence_transformers.sentence_transformer.losses", "sbert-kernels": "sbert_kernels.losses"}
MINI_BATCH_SIZE = 32  # of the cached loss


@dataclass(frozen=True)
class Curve:
    """The loss of each step, and its seconds: forward, backward and optimizer, without tokenizing."""

    losses: list[float]
    step_seconds: list[float]

    @property
    def median_step_seconds(self) -> float:
        """Over the steps after the first, which allocates and warms up."""
        return statistics.median(self.step_seconds[1:])


@dataclass(frozen=True)
class Side:
    """One side of the comparison. ``curve`` is None if ``error`` says why; None bytes are not known on this system."""

    curve: Curve | None
    peak_extra_bytes: int | None
    error: str | None


def compare(options: Options, pairs: list[Pair]) -> dict[str, Side]:
    """Train ``compare_steps`` steps with each module of ``SIDES``."""
    seen = pairs[: options.compare_steps * options.batch_size]
    sides = {}
    for name in SIDES:
        result = run_in_process(_comparison, name, options, seen)
        sides[name] = Side(result.value, result.peak_extra_bytes, result.error)
    return sides


def largest_difference(sides: dict[str, Side]) -> float | None:
    """Between the loss curves of the two sides, at the same step; None if one of them has none."""
    curves = [side.curve for side in sides.values()]
    if None in curves:
        return None
    return max(abs(a - b) for a, b in zip(*(curve.losses for curve in curves), strict=True))


def _comparison(name: str, options: Options, pairs: list[Pair]) -> Callable[[], Curve]:
    quiet_libraries()
    model = build_model(options)
    return prepare(model, build_loss(model, SIDES[name], options), pairs, options, options.compare_steps, name)


def build_loss(model: SentenceTransformer, module: str, options: Options) -> nn.Module:
    """The loss that goes with the model of these options, from a module of ``SIDES``."""
    losses = importlib.import_module(module)
    if options.model == "static":
        return losses.MultipleNegativesRankingLoss(model)
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=MINI_BATCH_SIZE)


def prepare(
    model: SentenceTransformer, loss: nn.Module, pairs: list[Pair], options: Options, steps: int, description: str
) -> Callable[[], Curve]:
    """Set everything up; the returned function trains the model in place for so many steps."""
    recorder = _Recorder(description)
    loss.register_forward_hook(recorder.record_loss)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(options.output),
        per_device_train_batch_size=options.batch_size,
        dataloader_drop_last=True,  # a smaller batch has fewer negatives, so that its loss is another one
        max_steps=steps,
        learning_rate=options.lr,
        seed=options.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # the recorder's bar shows the loss instead of printing a line for each step
        use_cpu=True,
    )
    queries, texts = zip(*pairs, strict=True)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"query": queries, "text": texts}),
        loss=loss,
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)

    def train() -> Curve:
        trainer.train()
        return Curve(recorder.losses, recorder.step_seconds)

    return train


class _Recorder(TrainerCallback):
    """Notes each step's loss (a forward hook, since some versions round what they log) and seconds, on one bar."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.losses: list[float] = []
        self.step_seconds: list[float] = []

    def record_loss(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.losses.append(output.item())

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = tqdm(total=state.max_steps, desc=f"{self.description:>13}", unit="step")

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.step_seconds.append(time.perf_counter() - self.begin)
        self.bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


def quiet_libraries() -> None:
    """Leave the terminal to the demo: no bars and no advice of the libraries under it, only their errors."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
