"""Values that a loss learns itself (a scale, a temperature, a weight), and the mean of their gradients over ranks.

sentence-transformers wraps the model alone for distributed training, never the loss, so nothing else averages the
gradients of what a loss learns. It is done once a step, right before the optimizer's step, in no backward pass: the
ranks may have batches of different data sets, and so of different losses, in one step. Every rank takes part for every
value, with zeros for a loss that it did not run, as data-parallel training counts the parameters of the model.
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


def average_over_ranks(values: Sequence[Tensor], ours: Sequence[bool]) -> None:
    """Replaces the gradients of values of one element by their means over all ranks, where any rank says it is ours.

    A rank without a gradient counts as 0. A value that no rank has a gradient of keeps none, so that an optimizer
    leaves it alone.

    Args:
        values: The same number of them on every rank, in the same order.
        ours: Whether a loss of ours that this rank knows of learns the value.
    """
    device = values[0].device
    if device.type == "cpu" and dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    missing = torch.zeros((), dtype=torch.float64, device=device)
    own = torch.stack([missing if v.grad is None else v.grad.detach().reshape(()).to(missing) for v in values])
    flags = torch.tensor([[v.grad is not None for v in values], list(ours)], dtype=torch.float64)
    # A blocking copy of the flags would wait for the GPU.
    packed = torch.cat([own[None], flags.to(device, non_blocking=True)])  # (3, values)
    dist.all_reduce(packed)
    means = torch.where(packed[2] > 0, packed[0] / dist.get_world_size(), own)
    wanted = [True] * len(values)
    if any(v.grad is None for v in values):  # on a GPU, reading waits
        wanted = (packed[1:] > 0).all(dim=0).tolist()
    for value, mean, exists in zip(values, means, wanted, strict=True):
        if value.grad is not None:
            value.grad.copy_(mean)
        elif exists:
            value.grad = mean.to(value).reshape(value.shape)


def _is_learned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_leaf and value.numel() == 1


def _is_sharded(value: Tensor) -> bool:
    """Whether FSDP holds this value: its gradient is a mean over the ranks already."""
    return getattr(value, "_fsdp_flattened", False) or hasattr(value, "device_mesh")


# Optimizers that another one steps, for a share of its values that may be this rank's alone: that one averages.
_inner: weakref.WeakSet[Optimizer] = weakref.WeakSet()


@torch.compiler.disable
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Averages what the losses of ours learn, where this optimizer is about to change it."""
    if not several_ranks() or settings.get("disable") or optimizer in _inner:
        return None
    _inner.update(value for value in vars(optimizer).values() if isinstance(value, Optimizer))
    known = {id(value) for loss in list(_losses) for value in loss.learned_values().values()} | set(_used)
    if not known:
        return None
    # In the optimizer's order, which is the same on every rank.
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
