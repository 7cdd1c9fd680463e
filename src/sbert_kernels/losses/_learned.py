"""Finds the values that losses learn themselves (scales, weights), and averages their gradients over ranks.

sentence-transformers wraps only the model for distributed training, never the loss, so nothing else averages the
gradients of what a loss learns. It is done once a step, right before the optimizer's step, and not in a backward pass:
in one step the ranks may have batches of different data sets, and so run different losses. Every rank takes part for
every value, and a loss that it did not run counts as a gradient of zero, as it does for the parameters of the model.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .. import settings
from ..ops._gather import several_ranks


class LearnsValues(nn.Module):
    """Is a base of every loss that may hold values that are learned. It stands before stock's class among the bases."""

    def __new__(cls, *args: Any, **kwargs: Any) -> LearnsValues:
        # Not in __init__, which a copy or a pickle does not call.
        loss = super().__new__(cls)
        _losses.add(loss)
        return loss

    def learned_values(self) -> dict[str, Tensor]:
        """Returns the tensors of one element that this loss holds and that require a gradient, by their names."""
        held = {**self._parameters, **vars(self)}
        return {name: value for name, value in held.items() if _is_learned(value)}


# Every loss of ours in this process, because a rank also averages values of losses that it never runs.
_losses: weakref.WeakSet[LearnsValues] = weakref.WeakSet()
# The values that losses have computed with, by id: a loss made anew at each step is gone when the optimizer steps.
_used: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def note_use(value: Tensor) -> None:
    """Notes that a loss computes with this value. If it is learned, its gradients are averaged over the ranks."""
    if _is_learned(value) and not torch.compiler.is_compiling():
        _used[id(value)] = value


def learned_values(loss: nn.Module) -> dict[str, Tensor]:
    """Returns the values that a loss and the losses inside it learn, by their paths, each value once.

    A path is ``scale``, ``cosine.scale``, ``weights.cosine``, ...: the names of containers are left out
    (``losses.cosine.scale`` becomes ``cosine.scale``) unless two paths would then be the same.
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


def average_over_ranks(values: Sequence[Tensor], ours: Sequence[bool]) -> None:
    """Replaces the gradients of values by their means over all ranks.

    A rank without a gradient counts as 0. A value without a gradient on any rank keeps none, so that an optimizer does
    not touch it.

    Args:
        values: Tensors of one element, the same number of them on every rank, in the same order.
        ours: True for a value that a loss of this package learns, as far as this rank knows. The gradients of a value
            that is not ours on any rank stay as they are.
    """
    device = values[0].device
    if device.type == "cpu" and dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    missing = torch.zeros((), dtype=torch.float64, device=device)
    gradients = torch.stack([missing if v.grad is None else v.grad.detach().reshape(()).to(missing) for v in values])
    flags = torch.tensor([[v.grad is not None for v in values], list(ours)], dtype=torch.float64)
    # The copy must not wait for the GPU.
    packed = torch.cat([gradients[None], flags.to(device, non_blocking=True)])  # (3, values)
    dist.all_reduce(packed)
    means = torch.where(packed[2] > 0, packed[0] / dist.get_world_size(), gradients)
    wanted = [True] * len(values)
    if any(v.grad is None for v in values):  # only then, as reading waits for a GPU
        wanted = (packed[1:] > 0).all(dim=0).tolist()
    for value, mean, exists in zip(values, means, wanted, strict=True):
        if value.grad is not None:
            value.grad.copy_(mean)
        elif exists:
            value.grad = mean.to(value).reshape(value.shape)


def _is_learned(value: Any) -> bool:
    """Returns True for a tensor of one element that an optimizer could step."""
    return isinstance(value, Tensor) and value.requires_grad and value.is_leaf and value.numel() == 1


def _is_sharded(value: Tensor) -> bool:
    """Returns True if FSDP holds this value, whose gradient is then a mean over the ranks already."""
    return getattr(value, "_fsdp_flattened", False) or hasattr(value, "device_mesh")


# Optimizers that another optimizer steps. That one averages: an inner one may hold values of this rank alone.
_inner: weakref.WeakSet[Optimizer] = weakref.WeakSet()


@torch.compiler.disable
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Averages the gradients of what our losses learn, before an optimizer steps it; a hook of torch.optim."""
    if not several_ranks() or settings.get("disable") or optimizer in _inner:
        return None
    _inner.update(value for value in vars(optimizer).values() if isinstance(value, Optimizer))
    known = {id(value) for loss in list(_losses) for value in loss.learned_values().values()} | set(_used)
    if not known:
        return None
    # The optimizer's order is the same on every rank.
    held = [value for group in optimizer.param_groups for value in group["params"]]
    held = [value for value in held if _is_learned(value) and not _is_sharded(value)]
    ours = [id(value) in known for value in held]
    if not any(ours):
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        average_over_ranks(held, ours)
        return None

    @functools.wraps(closure)
    def averaged() -> Any:
        result = closure()
        average_over_ranks(held, ours)
        return result

    return (optimizer,), kwargs | {"closure": averaged}


register_optimizer_step_pre_hook(_before_step)
