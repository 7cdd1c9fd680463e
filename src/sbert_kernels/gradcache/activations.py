"""How many bytes of activations a forward pass keeps for its backward pass, and how many may be kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

AUTO_SHARE = 0.5


class ActivationBudget:
    """Bytes that the graphs of mini-batches may hold until the backward pass.

    Args:
        total: Bytes.
        encoders: Whose parameters and buffers are no activations.
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
        """Whether a mini-batch of so many padded tokens is expected to fit; longer texts must come before shorter ones,
        whose attention takes less a token."""
        return self._left > tokens * self._per_token

    def new_pool(self) -> None:
        """Other texts, maybe another encoder: nothing is known of what they take."""
        self._per_token = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the bytes that are saved for backward in this block."""
        self._counted = {}

        def count(tensor: Tensor) -> Tensor:
            if _has_storage(tensor) and _storage(tensor) not in self._foreign:
                self._counted[_storage(tensor)] = tensor.untyped_storage().nbytes()
            # Not the tensor itself: an output that its own node saves (of tanh, of softmax) would hold the graph that
            # holds it, for ever, as the garbage collector does not see this cycle.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(count, _as_it_is):
            yield

    def keeps(self, tokens: float) -> bool:
        """Charge what was counted for so many padded tokens; False if it is too much, and has to be let go."""
        taken = sum(self._counted.values())
        self._counted = {}
        self._per_token = max(self._per_token, taken / max(tokens, 1))
        if taken > self._left:
            return False
        self._left -= taken
        return True


def budget_bytes(budget: int | str | None, devices: Sequence[torch.device]) -> int:
    """The bytes that an ``activation_budget`` stands for now; "auto" is half of what the GPU has free.

    Raises:
        ValueError: "auto" where the encoders are on no GPU.
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
    # Sparse tensors have none, and wrappers such as distributed tensors hold theirs inside.
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
