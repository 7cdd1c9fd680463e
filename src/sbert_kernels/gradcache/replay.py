"""Records what a forward pass depends on besides its inputs and its parameters, so that it can be repeated.

The gradients that a cache holds belong to the embeddings of the first pass, so the second pass must draw the same
dropout masks and compute in the same precision. The backward pass may be called from anywhere: outside of autocast, on
a thread of autograd, after an evaluation that has put the model into another mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class RandomState:
    """Holds the state that the random generators of the CPU and of some devices had when it was made."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = [(device, _device_state(device)) for device in devices]

    def restore(self) -> None:
        """Puts the generators back into this state."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            _set_device_state(device, state)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts the generators into this state for a block; after it they go on from where they were before."""
        outside = RandomState([device for device, _ in self._devices])
        self.restore()
        try:
            yield
        finally:
            outside.restore()


class Surroundings:
    """Holds autocast, deterministic algorithms and the modules' training modes, as they were when it was made.

    Args:
        encoders: The modules that will run.
        devices: The devices that they run on, without the CPU.
    """

    def __init__(self, encoders: Iterable[nn.Module], devices: Sequence[torch.device]) -> None:
        kinds = ["cpu", *sorted({device.type for device in devices})]
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ]
        self._deterministic = _deterministic()
        self._modes = [(module, module.training) for encoder in encoders for module in encoder.modules()]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores deterministic algorithms and training modes for a block, a whole pass."""
        with _deterministic_as(self._deterministic), _in_modes(self._modes):
            yield

    @contextmanager
    def autocasting(self) -> Iterator[None]:
        """Restores autocast for a block of forward passes; it would cast the products of a backward pass as well."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                # Without its cache of weights that were cast: those of a pass without gradients would be taken in the
                # passes with gradients of the same block, and the weights would get no gradient.
                stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
            yield


def devices_of(encoders: Iterable[nn.Module], tensors: Iterable[Tensor]) -> list[torch.device]:
    """Returns the devices, without the CPU, whose random generators the encoders may draw from."""
    found = {tensor.device for tensor in tensors}
    found |= {parameter.device for encoder in encoders for parameter in encoder.parameters()}
    return sorted((device for device in found if device.type not in ("cpu", "meta")), key=str)


def _device_state(device: torch.device) -> Tensor:
    module = torch.get_device_module(device)
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)


def _set_device_state(device: torch.device, state: Tensor) -> None:
    module = torch.get_device_module(device)
    if device.type == "mps":
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


def _deterministic() -> tuple[bool, bool]:
    """Returns whether torch uses deterministic algorithms, and whether it only warns where there are none."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@contextmanager
def _deterministic_as(wanted: tuple[bool, bool]) -> Iterator[None]:
    """Has torch use deterministic algorithms for a block as :func:`_deterministic` has returned it."""
    outside = _deterministic()
    if outside == wanted:
        yield
        return
    torch.use_deterministic_algorithms(wanted[0], warn_only=wanted[1])
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(outside[0], warn_only=outside[1])


@contextmanager
def _in_modes(modes: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Has modules in training mode (True) or not for a block."""
    changed = [(module, module.training) for module, training in modes if module.training != training]
    for module, training in changed:
        module.training = not training
    try:
        yield
    finally:
        for module, training in changed:
            module.training = training
