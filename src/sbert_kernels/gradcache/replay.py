"""What a forward pass depends on besides its inputs and its parameters, taken down so that it can be run once more.

The gradients of a cache belong to the embeddings of the first pass: the second has to draw the same dropout masks, in
the same precision. :class:`Surroundings` puts both passes into those of the first, whatever the backward pass is called
from (outside autocast, on a thread of autograd's, after an evaluation that has switched the model).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class RandomState:
    """The state of the generators of the CPU and of some devices, now."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = [(device, _device_state(device)) for device in devices]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            _set_device_state(device, state)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """This state for a block; afterwards the generators go on from where they were before it."""
        outside = RandomState([device for device, _ in self._devices])
        self.restore()
        try:
            yield
        finally:
            outside.restore()


class Surroundings:
    """Autocast, deterministic algorithms, and which modules are in training mode, now.

    Args:
        encoders: The modules that will run.
        devices: Where they run, the CPU aside.
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
        """Determinism and modes, for a whole pass."""
        with _deterministic_as(self._deterministic), _in_modes(self._modes):
            yield

    @contextmanager
    def autocasting(self) -> Iterator[None]:
        """Autocast, for forward passes alone: the products of a backward pass would be cast by it, too."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                # Without its cache: weights that are cast in a pass without gradients would be found there, and get
                # none, by the passes with gradients in the same block.
                stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
            yield


def devices_of(encoders: Iterable[nn.Module], tensors: Iterable[Tensor]) -> list[torch.device]:
    """The devices, the CPU aside, whose generators the encoders may draw from."""
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
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@contextmanager
def _deterministic_as(wanted: tuple[bool, bool]) -> Iterator[None]:
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
    changed = [(module, module.training) for module, training in modes if module.training != training]
    for module, training in changed:
        module.training = not training
    try:
        yield
    finally:
        for module, training in changed:
            module.training = training
