"""Short runs of the stock Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments


def train(
    model: SentenceTransformer,
    loss: Any,
    folder: Path,
    data: Any,
    eval_data: Any = None,
    resume: str | None = None,
    trainer_class: type[SentenceTransformerTrainer] = SentenceTransformerTrainer,
    **options: Any,
) -> SentenceTransformerTrainer:
    """Trains on the CPU, logs every step, and returns the trainer.

    ``options`` are those of SentenceTransformerTrainingArguments. ``resume`` names a checkpoint of ``folder`` to go on
    from.
    """
    quiet = {"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    arguments = SentenceTransformerTrainingArguments(output_dir=str(folder), **(quiet | options))
    trainer = trainer_class(model=model, args=arguments, train_dataset=data, eval_dataset=eval_data, loss=loss)
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
    return trainer


def logged_values(trainer: SentenceTransformerTrainer, *keys: str) -> list[float]:
    """Returns the numbers that the trainer has logged under these names, in the order in which it logged them."""
    return [float(entry[key]) for entry in trainer.state.log_history for key in keys if key in entry]
