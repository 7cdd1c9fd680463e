"""Has the gradients of an encoder that is trained on several ranks summed over the ranks once a step.

A gradient cache runs many backward passes a step, and each of them would sum. Here all but the last accumulate, and the
last one sums what has accumulated. The wrapper that sums may be the encoder itself or any module inside of it:
DistributedDataParallel, FSDP, or the engine of DeepSpeed (:mod:`deepspeed`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .deepspeed import LocalGradients, engines_in


class GradientSync:
    """Holds what sums the gradients of one encoder over the ranks, and switches it on and off.

    Raises:
        TypeError: DeepSpeed trains the encoder in a way that a gradient cache cannot (:func:`engines_in`).
    """

    def __init__(self, encoder: nn.Module) -> None:
        modules = list(encoder.modules())
        self.replicated = [module for module in modules if isinstance(module, nn.parallel.DistributedDataParallel)]
        self.sharded: list[_Sharded | _FlatSharded] = _sharded(modules)
        self.engines = engines_in(modules)
        self.wrapped = bool(self.replicated or self.sharded or self.engines)
        self._local = LocalGradients()
        self._accumulates = False

    @property
    def in_step(self) -> bool:
        """Returns True if ranks gather the parameters together for each mini-batch.

        All must run as many then, and no graph may wait: its parameters are not there meanwhile.
        """
        return bool(self.sharded) or any(engine.gathers_parameters for engine in self.engines)

    @property
    def due(self) -> bool:
        """Returns True if the gradients are to be summed in this step: not so under a user's ``no_sync()``."""
        return (
            bool(self.engines)
            or any(wrapper.require_backward_grad_sync for wrapper in self.replicated)
            or any(flags.reduces for flags in self.sharded)
        )

    @property
    def counts_all_parameters(self) -> bool:
        """Returns True if the backward pass that sums must reach every parameter that the step has used."""
        return bool(self.engines) or any(
            wrapper.static_graph or not wrapper.find_unused_parameters for wrapper in self.replicated
        )

    @property
    def to_learn(self) -> list[nn.parallel.DistributedDataParallel]:
        """Returns the wrappers that learn a static graph from their first backward pass and have not run it yet."""
        return [w for w in self.replicated if w.static_graph and not w._static_graph_delay_allreduce_enqueued]

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Has the first backward pass of a static graph run in this block: it must sum, also under ``no_sync()``."""
        outside = [(wrapper, wrapper.require_backward_grad_sync) for wrapper in self.to_learn]
        for wrapper, _ in outside:
            wrapper.require_backward_grad_sync = True
        try:
            yield
        finally:
            for wrapper, sums in outside:
                wrapper.require_backward_grad_sync = sums

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Has forward and backward passes in this block add up gradients without summing them over the ranks."""
        with ExitStack() as stack:
            for wrapper in self.replicated:
                stack.enter_context(wrapper.no_sync())
            for flags in self.sharded:
                stack.enter_context(flags.accumulating())
            for engine in self.engines:
                stack.enter_context(engine.accumulating())
            self._accumulates = True
            try:
                yield
            finally:
                self._accumulates = False

    @contextmanager
    def second_pass(self) -> Iterator[float]:
        """Prepares a second pass, which runs in this block, and yields what its gradients are to be multiplied by.

        Raises:
            RuntimeError: The backward pass that runs is not one in which DeepSpeed takes a step.
        """
        self._local.clear()  # what an interrupted one has left
        factors = [engine.factor() for engine in self.engines]
        with ExitStack() as stack:
            for engine in self.engines:
                stack.enter_context(engine.unscaled())
            yield math.prod(factors)

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Propagates the gradients of outputs, both [n, ...], to the parameters of the encoder."""
        if not self.engines:
            torch.autograd.backward(outputs, gradients)
        elif self._accumulates:
            self._local.add(outputs, gradients)
        else:
            with self._local.handed_over():
                torch.autograd.backward(outputs, gradients)


class _Sharded:
    """Switches the summing of one module under FSDP2 (``fully_shard``)."""

    def __init__(self, module: Any) -> None:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # an older torch has one group for each module, or none
            groups = [state._fsdp_param_group]
        self._groups = [group for group in groups if group is not None]

    @property
    def reduces(self) -> bool:
        """Returns True if backward passes sum now."""
        return any(group.reduce_grads for group in self._groups)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Has passes in this block add up gradients without summing them over the ranks."""
        outside = [(group, group.reduce_grads, group.all_reduce_grads) for group in self._groups]
        for group in self._groups:
            group.reduce_grads = group.all_reduce_grads = False
        try:
            yield
        finally:
            for group, reduces, all_reduces in outside:
                group.reduce_grads, group.all_reduce_grads = reduces, all_reduces


class _FlatSharded:
    """Switches the summing of one module under FSDP1 (``FullyShardedDataParallel``)."""

    def __init__(self, module: Any) -> None:
        self._module = module

    @property
    def reduces(self) -> bool:
        """Returns True if backward passes sum now."""
        return self._module._sync_gradients

    def accumulating(self) -> AbstractContextManager[None]:
        """Has passes in this block add up gradients without summing them over the ranks."""
        return self._module.no_sync()


def _sharded(modules: Sequence[nn.Module]) -> list[_Sharded | _FlatSharded]:
    """Returns the switches of those modules that FSDP shards."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    # With FSDP1 the outermost modules switch those inside of them too.
    flat = [module for module in modules if isinstance(module, FullyShardedDataParallel)]
    inside = {inner for outer in flat for inner in outer.modules() if inner is not outer}
    return [
        *(_Sharded(module) for module in modules if isinstance(module, FSDPModule)),
        *(_FlatSharded(module) for module in flat if module not in inside),
    ]


def most_of_all_ranks(counts: Sequence[int], device: torch.device) -> list[int]:
    """Returns the largest of each count over the ranks.

    In every forward pass of a sharded encoder all ranks gather its parameters together, so all must run as many.
    """
    most = torch.tensor(counts, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.tolist()
