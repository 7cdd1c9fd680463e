"""Has a Trainer of sentence-transformers keep, log and show the values that a loss learns.

A Trainer saves only the model, not the loss. :class:`LearnedValues` is a callback that writes the values into
``trainer_state.json`` of each checkpoint, as exact numbers, restores them when training resumes, and adds them to each
line of the log and to the model card. A Trainer that is given a loss of this package gets it without being asked.
"""

from __future__ import annotations

import json
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState

from .._stock import BaseTrainer, after_prepare_loss, described_data_sets, summed_components
from ..logs import log_once
from ._learned import LearnsValues, learned_values
from .weighted import component_names

logger = logging.getLogger(__name__)

# A value that can change by less than this share of itself in the whole training does hardly change.
STANDS_STILL = 0.01


class LearnedValues(TrainerCallback, ExportableState):
    """Keeps the values that the losses of a Trainer learn: in its checkpoints, its log and its model card."""

    def __init__(self, trainer: BaseTrainer | None = None) -> None:
        # Weak, or Trainer and callback would keep each other alive. A Trainer that restores its callbacks gives None.
        self._trainer: Callable[[], BaseTrainer | None] = lambda: None
        if trainer is not None:
            self._trainer = weakref.ref(trainer)
            _trainers.add(trainer)
        self.values: dict[str, Any] = {}  # as read from a checkpoint, if this object was made from one
        self._in_training: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LearnedValues:
        return LearnedValues(memo.get(id(self._trainer())))  # of the Trainer's copy, if it is copied too

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: each value as a float, which JSON writes and reads without rounding."""
        values = {name: value.item() for name, value in self._learned().items()}
        return {"args": {}, "attributes": {"values": values}}

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Restores the values of a checkpoint, and checks that they can be learned; called as training begins."""
        self._find_trainer(state)
        learned = self._in_training = self._learned()
        kept = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step:  # resumed from a checkpoint
            _restore(learned, kept)
        # The Trainer looks for this entry when it saves, and a checkpoint of a run without this callback has none.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        _clear(learned)
        for name, value in learned.items():
            _check_optimizer(name, value, optimizer, state.max_steps)
        if (trainer := self._trainer()) is not None and args.world_size > 1:
            _check_gathering(trainer)
            _name_components(trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Clears the gradients of the values; called after the optimizer's step."""
        # A Trainer clears only those of the model, before sentence-transformers 6.2.
        _clear(self._in_training)
        if control.should_save:
            self._write_card()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Updates the model card, if the model is to be saved now."""
        if control.should_save:
            self._write_card()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Updates the model card: a model better than before is saved next."""
        self._write_card()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Adds the values to a line of the log that has a loss."""
        if logs is None or "loss" not in logs:
            return
        values = {name: float(f"{value.item():.6g}") for name, value in self._learned().items()}
        logs.update(values)
        state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restores the values of the best checkpoint, if its model was loaded, and updates the model card."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            file = os.path.join(state.best_model_checkpoint, "trainer_state.json")
            if os.path.isfile(file):
                kept = TrainerState.load_from_json(file).stateful_callbacks.get(type(self).__name__)
                _restore(self._learned(), kept)
        self._write_card()

    def _find_trainer(self, state: Any) -> None:
        """Finds the Trainer of a state, if it is not known yet, and moves this callback to its place in it."""
        if self._trainer() is None:
            found = next((trainer for trainer in _trainers if trainer.state is state), None)
            if found is not None:
                self._trainer = weakref.ref(found)
        if (trainer := self._trainer()) is not None:
            # Behind the Trainer's first callback, which decides what a step ends with, and before those that report.
            callbacks = trainer.callback_handler.callbacks
            callbacks.insert(1, callbacks.pop(callbacks.index(self)))

    def _learned(self) -> dict[str, Tensor]:
        """Returns the values by name, with the name of the data set before it if each has a loss of its own."""
        trainer = self._trainer()
        found: dict[str, Tensor] = {}
        for dataset, loss in _losses_of(trainer) if trainer is not None else ():
            for name, value in learned_values(loss).items():
                if all(value is not other for other in found.values()):
                    found[f"{dataset}.{name}" if dataset else name] = value
        return found

    def _write_card(self) -> None:
        """Puts the values into the configurations that the model card shows, which were written before training."""
        trainer = self._trainer()
        if trainer is None or not self._learned():
            return
        for data_sets, described in described_data_sets(trainer):
            # What describes data sets of an earlier training of the same model stands behind these, and stays.
            names = list(data_sets) if isinstance(data_sets, dict) else [""] * (data_sets is not None)
            for name, about in zip(names, described, strict=False):
                loss = trainer.loss[name] if isinstance(trainer.loss, dict) else trainer.loss
                shown = about.get("loss", {})
                if "config_code" in shown and learned_values(loss):
                    shown["config_code"] = _with_numbers_of(loss, shown["config_code"])


_trainers: weakref.WeakSet[BaseTrainer] = weakref.WeakSet()


def follow_trainers() -> None:
    """Has every Trainer that is given a loss of this package keep what it learns."""

    def follow(trainer: BaseTrainer, loss: nn.Module) -> None:
        if trainer not in _trainers and any(isinstance(module, LearnsValues) for module in loss.modules()):
            trainer.add_callback(LearnedValues(trainer))

    after_prepare_loss(follow)


def _losses_of(trainer: BaseTrainer) -> Iterator[tuple[str, nn.Module]]:
    """Yields the losses of a Trainer, each with the name of its data set, or "" if there is one loss for all."""
    loss = getattr(trainer, "loss", None)
    if isinstance(loss, dict):
        yield from loss.items()
    elif isinstance(loss, nn.Module):
        yield "", loss


def _restore(learned: dict[str, Tensor], kept: Any) -> None:
    """Sets the values to those that a checkpoint has kept, and logs each value that it has not kept."""
    values = kept.get("attributes", {}).get("values", {}) if isinstance(kept, dict) else {}
    for name, value in learned.items():
        if name in values:
            with torch.no_grad():
                value.fill_(values[name])
        else:
            logger.warning(
                "%s is learned, but the checkpoint does not hold it: training goes on from %s.", name, value.item()
            )
    for name in values.keys() - learned.keys():
        logger.warning("the checkpoint holds %s = %s, which no loss learns now.", name, values[name])


def _clear(learned: dict[str, Tensor]) -> None:
    """Removes the gradients of the values."""
    for value in learned.values():
        value.grad = None


def _check_optimizer(name: str, value: Tensor, optimizer: Any, steps: int) -> None:
    """Logs what a user has to set so that a value is learned at all.

    Args:
        name: The path of the value in the loss.
        value: The tensor.
        optimizer: The optimizer of the training.
        steps: The number of its steps.
    """
    groups = getattr(optimizer, "param_groups", [])
    group = next((group for group in groups if any(value is parameter for parameter in group["params"])), None)
    if group is None and not isinstance(value, nn.Parameter):
        log_once(
            logger,
            f"{name} of the loss is a tensor that requires a gradient but no nn.Parameter, so that no optimizer finds "
            f"it and it is not learned: give nn.Parameter({name.rpartition('.')[2]}).",
        )
        return
    if group is None:
        log_once(
            logger,
            f"{name} of the loss requires a gradient, but the optimizer does not hold it, so it is not learned: an "
            "optimizer of your own must be built from loss.parameters(), not from model.parameters().",
        )
        return
    # Some optimizers have no learning rate of the user's.
    rate, decay, now = group.get("initial_lr", group.get("lr")), group.get("weight_decay"), value.item()
    last = name.rpartition(".")[2]
    better = abs(now) / 400
    if rate is not None and rate < better and rate * steps < STANDS_STILL * abs(now):
        log_once(
            logger,
            f"{name} = {now:g} is learned at a rate of {rate:g}. Adam moves it by no more than that in each of {steps} "
            f"steps, so it hardly changes: learning_rate_mapping={{{last + '$'!r}: {better:.2g}}} of the training "
            "arguments, say, gives it a rate of its own.",
        )
    if decay:
        log_once(
            logger,
            f"{name} = {now:g} is learned under weight_decay={decay:g}, which pulls it towards 0. If that is not what "
            "you want, leave weight_decay out of the training arguments, or give the Trainer an optimizer of your own "
            "(optimizers=) with weight_decay=0 for it.",
        )


def _check_gathering(trainer: BaseTrainer) -> None:
    """Refuses a training that would hang: one rank gathers embeddings for its loss while another runs another loss.

    Raises:
        ValueError: The data sets have different losses, one of them gathers, and in one step the ranks may have batches
            of different data sets.
    """
    losses = dict(_losses_of(trainer))
    different = len({id(loss) for loss in losses.values()}) > 1
    gathering = [
        name
        for name, loss in losses.items()
        if any(getattr(module, "gather_across_devices", False) for module in loss.modules())
    ]
    own_sampler = callable(trainer.args.multi_dataset_batch_sampler)
    if different and gathering and not own_sampler and not trainer.accelerator.split_batches:
        raise ValueError(
            f"the losses of the data sets {gathering} have gather_across_devices=True, but in one step the ranks have "
            "batches of different data sets, so that a rank would wait for ever for ranks that run another loss. Leave "
            "it out, use one loss for all data sets, or give a multi_dataset_batch_sampler of your own that deals all "
            "ranks the same data set in one step."
        )


def _name_components(trainer: BaseTrainer) -> None:
    """Starts the Trainer's sums of the terms of losses with zeros, so that all ranks have the same names in one order.

    The Trainer gathers the sums name by name, and by itself knows a name only on a rank that has run its loss.
    """
    names = dict.fromkeys(name for _, loss in _losses_of(trainer) for name in component_names(loss))
    if not names:
        return
    sums = summed_components(trainer)
    parameter = next(trainer.model.parameters())
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    for name in names:
        sums.setdefault(name, torch.zeros((), dtype=wide, device=parameter.device))
    sums.setdefault("steps", torch.zeros((), dtype=torch.int64, device=parameter.device))


def _with_numbers_of(loss: nn.Module, code: str) -> str:
    """Returns a loss's configuration, JSON between the fences of a code block, with the numbers that it has now."""
    found = re.search(r"\{.*\}", code, re.DOTALL)
    try:
        shown = json.loads(found.group()) if found else None
    except ValueError:
        shown = None
    if found is None or shown is None:
        return code
    config_of: Any = loss.get_config_dict
    now = config_of()
    fresh = {key: now[key] if isinstance(now.get(key), (int, float, dict)) else value for key, value in shown.items()}
    indent = code[: len(code) - len(code.lstrip())]
    try:
        text = json.dumps(fresh, indent=4).replace("\n", "\n" + indent)
    except TypeError:
        return code
    return code[: found.start()] + text + code[found.end() :]
