"""Counts the bytes of activations that a forward pass keeps for its backward pass, against the bytes allowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

AUTO_SHARE = 0.5


class ActivationBudget:
    """Holds the number of bytes that the graphs of mini-batches may still keep until the backward pass.

    Args:
        total: Bytes for the whole step.
        encoders: The encoders; their parameters and buffers do not count as activations.
    """

    def __init__(self, total: int, encoders: Sequence[nn.Module]) -> None:
        self._left = total
        self._per_token = 0.0
        self._foreign = {
            _storage(tensor)
            for encoder in encoders
            for tensor in (*encoder.parameters(), *encoder.buffers())
            if _has_storage(tensor)
        }
        self._counted: dict[int, int] = {}

    def fits(self, tokens: float) -> bool:
        """Returns True if the graph of a mini-batch of so many padded tokens is expected to fit.

        The guess is the largest number of bytes a token so far. So longer texts must come first: their attention takes
        more bytes a token.
        """
        return self._left > tokens * self._per_token

    def new_pool(self) -> None:
        """Forgets the bytes a token: the next mini-batches are of other texts, maybe of another encoder."""
        self._per_token = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the bytes that are saved for the backward pass in this block."""
        self._counted = {}

        def count(tensor: Tensor) -> Tensor:
            if _has_storage(tensor) and _storage(tensor) not in self._foreign:
                self._counted[_storage(tensor)] = tensor.untyped_storage().nbytes()
            # Not the tensor itself: tanh and softmax save their own output, which would hold the graph that holds it.
            # The garbage collector does not see this cycle, so the memory would never be freed.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(count, _as_it_is):
            yield

    def keeps(self, tokens: float) -> bool:
        """Takes what was counted off the budget; returns False, and takes nothing, if it is too much to be kept.

        Args:
            tokens: The padded tokens of the mini-batch that was counted.
        """
        taken = sum(self._counted.values())
        self._counted = {}
        self._per_token = max(self._per_token, taken / max(tokens, 1))
        if taken > self._left:
            return False
        self._left -= taken
        return True


def budget_bytes(budget: int | str | None, devices: Sequence[torch.device]) -> int:
    """Returns the bytes that the option ``activation_budget`` stands for now; "auto" is half of a GPU's free memory.

    Raises:
        ValueError: It is "auto", and the encoders are on no GPU.
    """
    if budget is None:
        return 0
    if not isinstance(budget, str):
        return budget
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        raise ValueError("activation_budget='auto' is for encoders on a CUDA device; give a number of bytes.")
    free = [
        torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
        for gpu in gpus
    ]
    return int(AUTO_SHARE * min(free))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _has_storage(tensor: Tensor) -> bool:
    # A sparse tensor has none, and a wrapper such as a distributed tensor has it inside.
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
