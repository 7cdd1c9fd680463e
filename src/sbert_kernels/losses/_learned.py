"""Values that a loss learns itself (a scale, a temperature, a weight), and the mean of their gradients over ranks.

sentence-transformers wraps the model alone for distributed training, never the loss, so nothing else averages the
gradients of what a loss learns. It is done once a step, right before the optimizer's step, in no backward pass: the
ranks may have batches of different data sets, and so of different losses, in one step. Every rank takes part for every
value, with zeros for a loss that it did not run, as data-parallel training counts the parameters of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .. import settings
from ..ops._gather import several_ranks


class LearnsValues(nn.Module):
    """A loss that may hold values of its own that are learned; a base before that of stock."""

    def __new__(cls, *args: Any, **kwargs: Any) -> LearnsValues:
        # Here and not in __init__, which neither a copy nor a pickle calls.
        loss = super().__new__(cls)
        _losses.add(loss)
        return loss

    def learned_values(self) -> dict[str, Tensor]:
        """Returns the tensors of one element that this loss holds and that require a gradient, by their names."""
        held = {**self._parameters, **vars(self)}
        return {name: value for name, value in held.items() if _is_learned(value)}


# Every loss of ours that is alive in this process: a rank may never run a loss whose values it has to average.
_losses: weakref.WeakSet[LearnsValues] = weakref.WeakSet()
# What losses have computed with, by id: a loss that is made anew in each step is gone when the optimizer steps.
_used: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def note_use(value: Tensor) -> None:
    """Notes that a loss computes with this value, which its optimizer has to average over ranks if it is learned."""
    if _is_learned(value) and not torch.compiler.is_compiling():
        _used[id(value)] = value


def learned_values(loss: nn.Module) -> dict[str, Tensor]:
    """Returns what a loss and the losses inside it learn, by paths as ``scale``, ``cosine.scale``, ``weights.cosine``.

    The containers are left out of a path (``losses.cosine.scale`` is ``cosine.scale``) where it still is the only one.
    """
    found: dict[str, Tensor] = {}
    for path, module in loss.named_modules():
        if not isinstance(module, LearnsValues):
            continue
        for name, value in module.learned_values().items():
            whole = f"{path}.{name}" if path else name
            short = ".".join(part for part in whole.split(".") if part not in ("loss", "losses"))
            if all(value is not other for other in found.values()):
                found[whole if short in found else short] = value
    return found


def average_over_ranks(values: Sequence[Tensor]) -> None:
    """Replaces the gradient of each value by its mean over all ranks; every rank must give the same values.

    A rank without a gradient counts as 0. A value that no rank has a gradient of keeps none, so that an optimizer
    leaves it alone.
    """
    device = values[0].device
    if device.type == "cpu" and dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    missing = torch.zeros((), dtype=torch.float64, device=device)
    gradients = [missing if v.grad is None else v.grad.detach().reshape(()).to(missing) for v in values]
    known = torch.tensor([v.grad is not None for v in values], dtype=torch.float64, device=device)
    packed = torch.stack([torch.stack(gradients), known])  # (2, values)
    dist.all_reduce(packed)
    # Read only where it is not known here: on a GPU, reading waits.
    somewhere = [True] * len(values) if all(v.grad is not None for v in values) else (packed[1] > 0).tolist()
    means = packed[0] / dist.get_world_size()
    for value, mean, exists in zip(values, means, somewhere, strict=True):
        if exists:
            value.grad = mean.to(value).reshape(value.shape)


def _is_learned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_leaf and value.numel() == 1


# The optimizer whose step runs now. Within it, others may step a share of the values that each rank alone holds.
_stepping: Optimizer | None = None


@torch.compiler.disable
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Averages what the losses of ours learn, where this optimizer is about to change it."""
    global _stepping
    if not several_ranks() or settings.get("disable") or _stepping not in (None, optimizer):
        return
    _stepping = optimizer
    ours = {id(value) for loss in list(_losses) for value in loss.learned_values().values()} | set(_used)
    # In the optimizer's order, which is the same on every rank.
    learned = [value for group in optimizer.param_groups for value in group["params"] if id(value) in ours]
    if learned:
        average_over_ranks(learned)


@torch.compiler.disable
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _stepping
    if _stepping is optimizer:
        _stepping = None


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
