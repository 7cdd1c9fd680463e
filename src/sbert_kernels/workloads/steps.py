"""Where the time of a training step goes: one stopwatch, switched by events of the Trainer, the model and the loss.

Each event closes the running part and opens the next, so that the parts of a step add up to it. A step is what a user
waits for: from the end of the step before to its own end, loading included. Accelerators are not waited for: CPU only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

PARTS = {
    "tokenize": "rows read, tokenized and collated; with workers, what is left of it to wait for",
    "encode": "the model's forward",
    "loss": "from the embeddings to the loss; where the loss makes its gradients at once, those too",
    "loss backward": "from the start of backward until a gradient reaches the embeddings",
    "encoder backward": "from there to the last parameter's gradient",
    "optimizer": "gradient clipping, the optimizer's step, zero_grad",
    "rest": "the Trainer's own: logging, callbacks, moving of inputs",
}
Step = Mapping[str, float]  # seconds of each of PARTS


@dataclass(frozen=True)
class Recording:
    """Holds the loss and the parts of each step of one training, and the terms of a loss that has several."""

    losses: list[float]
    steps: list[Step]
    terms: list[dict[str, float]] = field(default_factory=list)  # of each step, by name; none where there is but one

    @property
    def warm_steps(self) -> list[Step]:
        """Returns all steps but the first, which also allocates, loads a batch more, and starts the workers."""
        return self.steps[1:]


def whole(step: Step) -> float:
    """Returns the seconds of the whole step."""
    return sum(step.values())


def median_step(steps: Sequence[Step]) -> Step:
    """Returns the step of median duration; of an even number of steps, the shorter of the middle two."""
    return sorted(steps, key=whole)[(len(steps) - 1) // 2]


def difference(a: Recording, b: Recording) -> float:
    """Returns the largest relative difference of two loss curves at one step; nan if either curve holds a nan."""
    x, y = (torch.tensor(recording.losses, dtype=torch.float64) for recording in (a, b))
    return ((x - y).abs() / x.abs()).max().item()


class StepRecorder(TrainerCallback):
    """Records a training of `model` with `loss`: a callback for the Trainer, whose `logging_steps` has to be 1.

    The hooks that it sets on the two when the training begins are gone when it ends. `recording` grows by each step.
    The loss of a step is read by a hook, since some versions of the Trainer round what they log.
    """

    def __init__(self, model: nn.Sequential, loss: nn.Module) -> None:
        self.recording = Recording([], [])
        self._model = model
        self._loss = loss
        self._handles: list[Any] = []
        self._seconds: dict[str, float] = {}
        self._part, self._since = "tokenize", 0.0

    # -- the stopwatch ------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def _charge(self) -> None:
        """Adds the seconds since the last event to the running part."""
        now = time.perf_counter()
        self._seconds[self._part] += now - self._since
        self._since = now

    def _switch(self, part: str) -> None:
        self._charge()
        self._part = part

    # -- the Trainer's events, in their order -------------------------------------------------------------------------

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sets the hooks and starts the clock."""
        self._reset()
        self._part, self._since = "tokenize", time.perf_counter()
        # Not the model as a whole: MatryoshkaLoss shrinks embeddings in a forward of the model that runs no module.
        *_, last = modules = list(self._model.children())
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self._encode_begins))
            self._handles.append(module.register_forward_hook(self._encode_ends))
        self._handles.append(last.register_forward_hook(self._watch_embeddings))
        self._handles.append(self._loss.register_forward_pre_hook(self._loss_begins))
        self._handles.append(self._loss.register_forward_hook(self._loss_ends))
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._parameter_reached))

    def on_step_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends the tokenizing: the batch is there."""
        self._switch("rest")

    def on_pre_optimizer_step(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins the optimizer's part."""
        self._part = "optimizer"  # without a charge: since the last parameter's gradient, the Trainer clipped gradients

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends the step and adds its parts to the recording."""
        self._switch("rest")
        self.recording.steps.append(self._seconds)
        self._reset()

    def on_log(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begins the tokenizing of the next step."""
        self._switch("tokenize")  # the Trainer logs a step after its end, then fetches the next batch

    def on_train_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # -- the model's and the loss's -----------------------------------------------------------------------------------

    def _encode_begins(self, module: nn.Module, inputs: Any) -> None:
        self._outer = self._part  # the loss, or the backward of a gradient cache
        self._switch("encode")

    def _encode_ends(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._switch(self._outer)

    def _watch_embeddings(self, module: nn.Module, inputs: Any, output: dict[str, Tensor]) -> None:
        if output["sentence_embedding"].requires_grad:
            # All of the loss was recorded after the embeddings, so that backward comes to them when it is through.
            output["sentence_embedding"].register_hook(self._embeddings_reached)

    def _loss_begins(self, module: nn.Module, inputs: Any) -> None:
        self._switch("loss")

    def _loss_ends(self, module: nn.Module, inputs: Any, output: Tensor | Mapping[str, Tensor]) -> None:
        if isinstance(output, Mapping):
            self.recording.terms.append({name: term.item() for name, term in output.items()})
        terms = list(output.values()) if isinstance(output, Mapping) else [output]
        self.recording.losses.append(torch.stack(terms).sum().item())  # as the Trainer adds them
        self._switch("rest")
        for term in terms:
            if term.requires_grad:  # one that is 0 on this batch may not
                term.register_hook(self._backward_begins)

    def _backward_begins(self, gradient: Tensor) -> None:
        self._switch("loss backward")

    def _embeddings_reached(self, gradient: Tensor) -> None:
        self._switch("encoder backward")

    def _parameter_reached(self, parameter: Tensor) -> None:
        self._charge()
