"""Training with the real ``SentenceTransformerTrainer``, whose steps are recorded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sbert_kernels.workloads.steps import Recording, StepRecorder
from sbert_kernels.workloads.texts import Row

COLUMNS = ("query", "text", "score")  # of rows, as far as they go; the Trainer takes the last for labels


@dataclass(frozen=True)
class Settings:
    """Holds what the Trainer is told.

    With `workers` so many processes tokenize the next batches during a step. With `tokenize_ahead` all texts are
    tokenized once before the first step, which a model that is not a static one ignores. Without either the step waits.
    """

    batch_size: int
    steps: int
    lr: float
    seed: int
    output: Path
    workers: int = 0
    tokenize_ahead: bool = False


class TokenizedTexts:
    """Turns texts into features as ``StaticEmbedding.preprocess`` does, but tokenizes each text once, at the start.

    A training of several epochs tokenizes each text in every epoch otherwise, which takes half of a step.
    """

    def __init__(self, module: StaticEmbedding, rows: Sequence[Row]) -> None:
        texts = list(dict.fromkeys(text for first, second, *_ in rows for text in (first, second)))
        encodings = module.tokenizer.encode_batch(texts, add_special_tokens=False)
        self._ids = {
            text: np.array(encoding.ids, dtype=np.int64) for text, encoding in zip(texts, encodings, strict=True)
        }

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, Tensor]:
        """Returns the ids of all tokens one after the other, and where each of the texts begins among them."""
        ids = [self._ids[text] for text in texts]
        offsets = np.cumsum([0, *(len(tokens) for tokens in ids[:-1])])
        return {"input_ids": torch.from_numpy(np.concatenate(ids)), "offsets": torch.from_numpy(offsets)}


def prepare(
    model: SentenceTransformer, loss: nn.Module, rows: Sequence[Row], settings: Settings, description: str = ""
) -> Callable[[], Recording]:
    """Sets a training up and returns a function that trains the model in place and returns the recorded steps.

    With a description there is a progress bar, which begins with it.
    """
    recorder = StepRecorder(model, loss)
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
        dataloader_persistent_workers=settings.workers > 0,
        dataloader_prefetch_factor=2 if settings.workers else None,
    )
    # The Trainer would look for examples with a progress bar of its own, in the midst of ours.
    texts = [text for _, text, *_ in rows[:3]]
    widget: list[dict[str, Any]] = [{"source_sentence": rows[0][0], "sentences": texts}]
    model.model_card_data.widget = widget
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(dict(zip(COLUMNS, zip(*rows, strict=True), strict=False))),
        loss=loss,
        callbacks=[recorder, _Bar(recorder.recording, description)] if description else [recorder],
    )
    trainer.remove_callback(PrinterCallback)
    if settings.tokenize_ahead and isinstance(module := model[0], StaticEmbedding):
        trainer.data_collator.preprocess_fn = TokenizedTexts(module, rows)

    def train() -> Recording:
        with _single_threaded_tokenizers() if settings.workers else contextlib.nullcontext():
            trainer.train()
        return recorder.recording

    return train


@contextlib.contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Turns the threads of tokenizers off for a block of code.

    A process that was forked after tokenizers used threads has lost them; each worker is to tokenize on its own.
    """
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
    """Shows the steps and their loss on one progress bar."""

    def __init__(self, recording: Recording, description: str) -> None:
        self.recording = recording
        self.description = description

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(total=state.max_steps, desc=f"{self.description:>13}", unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.set_postfix(loss=f"{self.recording.losses[-1]:.3f}", refresh=False)
        self.bar.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()


def quiet_libraries() -> None:
    """Turns progress bars and advice of the libraries off, so that the terminal shows only ours and their errors."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
