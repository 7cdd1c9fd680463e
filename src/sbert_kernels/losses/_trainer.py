"""What a Trainer of sentence-transformers does for the values that a loss learns: keep them, log them, name them.

A Trainer saves the model alone, not the loss. :class:`LearnedValues` writes the values into ``trainer_state.json`` of
each checkpoint, as exact numbers, and puts them back when training resumes, adds them to each line of the log, and to
the model card as they are when it is written. A Trainer gets it by itself when it is given a loss of ours.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from sentence_transformers.base.trainer import BaseTrainer
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState

from ..logs import log_once
from ._learned import LearnsValues, learned_values
from .weighted import component_names

logger = logging.getLogger(__name__)

# Below this share of its value over a whole training, a value as good as stands still.
STANDS_STILL = 0.01


class LearnedValues(TrainerCallback, ExportableState):
    """Keeps the values that the losses of a Trainer learn: in its checkpoints, its log and its model card."""

    def __init__(self, trainer: BaseTrainer | None = None) -> None:
        # Weak, or the two would keep each other alive. None: made anew by a Trainer that restores its callbacks.
        self._trainer = weakref.ref(trainer) if trainer is not None else lambda: None
        if trainer is not None:
            _trainers.add(trainer)
        self.values: dict[str, Any] = {}  # as read from a checkpoint, if this was made from one
        self._in_training: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LearnedValues:
        return LearnedValues(memo.get(id(self._trainer())))  # the copy of the Trainer that is copied with this

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: every value as a number, which JSON writes and reads without rounding."""
        values = {name: value.item() for name, value in self._learned().items()}
        return {"args": {}, "attributes": {"values": values}}

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self._find_trainer(state)
        learned = self._in_training = self._learned()
        kept = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step:  # resumed from a checkpoint
            _restore(learned, kept)
        # A checkpoint of a run without this callback has no entry, which the Trainer would look for when it saves.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        _clear(learned)
        for name, value in learned.items():
            _check_optimizer(name, value, optimizer, state.max_steps)
        if (trainer := self._trainer()) is not None and args.world_size > 1:
            _check_gathering(trainer)
            _name_components(trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Before 6.2 the Trainer clears the gradients of the model alone.
        _clear(self._in_training)
        if control.should_save:
            self._write_card()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            self._write_card()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write_card()  # a better model than before is saved after this

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        values = {name: float(f"{value.item():.6g}") for name, value in self._learned().items()}
        logs.update(values)
        state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            file = os.path.join(state.best_model_checkpoint, "trainer_state.json")
            if os.path.isfile(file):
                kept = TrainerState.load_from_json(file).stateful_callbacks.get(type(self).__name__)
                _restore(self._learned(), kept)
        self._write_card()

    def _find_trainer(self, state: Any) -> None:
        if self._trainer() is None:
            found = next((trainer for trainer in _trainers if trainer.state is state), None)
            if found is not None:
                self._trainer = weakref.ref(found)
        if (trainer := self._trainer()) is not None:
            # Before the callbacks that report the log, behind the one that decides what a step ends with.
            callbacks = trainer.callback_handler.callbacks
            callbacks.insert(1, callbacks.pop(callbacks.index(self)))

    def _learned(self) -> dict[str, Tensor]:
        """The values by name, in a dictionary of losses behind the name of the data set."""
        trainer = self._trainer()
        found: dict[str, Tensor] = {}
        for dataset, loss in _losses_of(trainer) if trainer is not None else ():
            for name, value in learned_values(loss).items():
                if all(value is not other for other in found.values()):
                    found[f"{dataset}.{name}" if dataset else name] = value
        return found

    def _write_card(self) -> None:
        """Puts the values into the configurations that the model card shows, which were read before training."""
        trainer = self._trainer()
        if trainer is None or not self._learned():
            return
        data = trainer.model.model_card_data
        for datasets, described in (
            (trainer.train_dataset, data.train_datasets),
            (trainer.eval_dataset, data.eval_datasets),
        ):
            # What describes data sets of an earlier training of the same model is left as it is.
            names = list(datasets) if isinstance(datasets, dict) else [None] * (datasets is not None)
            for name, about in zip(names, described, strict=False):
                loss = trainer.loss[name] if isinstance(trainer.loss, dict) else trainer.loss
                shown = about.get("loss", {})
                if "config_code" in shown and learned_values(loss):
                    shown["config_code"] = _with_numbers_of(loss, shown["config_code"])


_trainers: weakref.WeakSet[BaseTrainer] = weakref.WeakSet()


def follow_trainers() -> None:
    """Has every Trainer that is given a loss of ours keep what it learns."""
    prepare = BaseTrainer.prepare_loss

    @functools.wraps(prepare)
    def prepare_loss(self: BaseTrainer, loss: Any, model: Any) -> nn.Module:
        prepared = prepare(self, loss, model)
        if self not in _trainers and any(isinstance(module, LearnsValues) for module in prepared.modules()):
            self.add_callback(LearnedValues(self))
        return prepared

    BaseTrainer.prepare_loss = prepare_loss


def _losses_of(trainer: BaseTrainer) -> Iterator[tuple[str, nn.Module]]:
    """The losses of a Trainer, each with the name of its data set ("" where there is one loss for all)."""
    loss = getattr(trainer, "loss", None)
    if isinstance(loss, dict):
        yield from loss.items()
    elif isinstance(loss, nn.Module):
        yield "", loss


def _restore(learned: dict[str, Tensor], kept: Any) -> None:
    """Sets the values to those that a checkpoint has kept, and says so of each that it has not."""
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
    for value in learned.values():
        value.grad = None


def _check_optimizer(name: str, value: Tensor, optimizer: Any, steps: int) -> None:
    """Says what a user has to set so that a value is learned at all."""
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
    # Some optimizers find a rate of their own.
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
    """Refuses what would hang: a collective of one loss, while another rank's batch belongs to another loss.

    Raises:
        ValueError: a dictionary of different losses of which one gathers, with ranks that are dealt batches in turn.
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
    """Starts the Trainer's sums of the terms of losses, so that each rank has the same ones in the same order.

    The Trainer gathers them key after key, and meets a key only on a rank that has run its loss.
    """
    names = dict.fromkeys(name for _, loss in _losses_of(trainer) for name in component_names(loss))
    if not names:
        return
    sums = trainer.accum_loss_components["train"]
    parameter = next(trainer.model.parameters())
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    for name in names:
        sums.setdefault(name, torch.zeros((), dtype=wide, device=parameter.device))
    sums.setdefault("steps", torch.zeros((), dtype=torch.int64, device=parameter.device))


def _with_numbers_of(loss: nn.Module, code: str) -> str:
    """Returns a configuration in JSON between fences, with the numbers that the loss's has now."""
    found = re.search(r"\{.*\}", code, re.DOTALL)
    try:
        shown = json.loads(found.group()) if found else None
    except ValueError:
        shown = None
    if shown is None:
        return code
    now = loss.get_config_dict()
    fresh = {key: now[key] if isinstance(now.get(key), (int, float, dict)) else value for key, value in shown.items()}
    indent = code[: len(code) - len(code.lstrip())]
    try:
        text = json.dumps(fresh, indent=4).replace("\n", "\n" + indent)
    except TypeError:
        return code
    return code[: found.start()] + text + code[found.end() :]
