"""When the gradients of an encoder that is trained on several ranks are summed over them: once a step.

A gradient cache runs many backward passes a step, and each would sum. All but the last run without; what wraps the
encoder then sums what has accumulated. The wrapper may be the encoder itself or stand anywhere inside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# Engines that partition gradients while a backward pass runs, once a step.
REFUSED = ("DeepSpeedEngine",)


class GradientSync:
    """How the gradients of one encoder travel.

    Raises:
        TypeError: the encoder is wrapped by something that cannot run several backward passes a step.
    """

    def __init__(self, encoder: nn.Module) -> None:
        modules = list(encoder.modules())
        for module in modules:
            name = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in REFUSED), None)
            if name is not None:
                raise TypeError(
                    f"a gradient cache cannot train a {name}, which reduces gradients in every backward pass: a cache "
                    "runs one a mini-batch. Train with DistributedDataParallel or FSDP, or without a gradient cache."
                )
        self.replicated = [module for module in modules if isinstance(module, nn.parallel.DistributedDataParallel)]
        self.sharded: list[_Sharded | _FlatSharded] = _sharded(modules)
        self.wrapped = bool(self.replicated or self.sharded)

    @property
    def due(self) -> bool:
        """Whether the step is to be summed now; not so within an outer ``no_sync()``."""
        return any(wrapper.require_backward_grad_sync for wrapper in self.replicated) or any(
            flags.reduces for flags in self.sharded
        )

    @property
    def counts_all_parameters(self) -> bool:
        """Whether the backward pass that sums has to reach every parameter that the step has used."""
        return any(wrapper.static_graph or not wrapper.find_unused_parameters for wrapper in self.replicated)

    @property
    def to_learn(self) -> list[nn.parallel.DistributedDataParallel]:
        """Those that learn a static graph from their first backward pass, and have seen none."""
        return [w for w in self.replicated if w.static_graph and not w._static_graph_delay_allreduce_enqueued]

    @contextmanager
    def learning(self) -> Iterator[None]:
        """The backward pass in this block is the first of a static graph: it has to sum, in ``no_sync()`` too."""
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
        """Forward and backward passes in this block leave their gradients where they are."""
        with ExitStack() as stack:
            for wrapper in self.replicated:
                stack.enter_context(wrapper.no_sync())
            for flags in self.sharded:
                stack.enter_context(flags.accumulating())
            yield


class _Sharded:
    """The switches of one module under FSDP2 (``fully_shard``)."""

    def __init__(self, module: Any) -> None:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # of an older torch: one a module, or none
            groups = [state._fsdp_param_group]
        self._groups = [group for group in groups if group is not None]

    @property
    def reduces(self) -> bool:
        return any(group.reduce_grads for group in self._groups)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        outside = [(group, group.reduce_grads, group.all_reduce_grads) for group in self._groups]
        for group in self._groups:
            group.reduce_grads = group.all_reduce_grads = False
        try:
            yield
        finally:
            for group, reduces, all_reduces in outside:
                group.reduce_grads, group.all_reduce_grads = reduces, all_reduces


class _FlatSharded:
    """The same of a module under FSDP1 (``FullyShardedDataParallel``)."""

    def __init__(self, module: Any) -> None:
        self._module = module

    @property
    def reduces(self) -> bool:
        return self._module._sync_gradients

    def accumulating(self) -> AbstractContextManager[None]:
        return self._module.no_sync()


def _sharded(modules: Sequence[nn.Module]) -> list[_Sharded | _FlatSharded]:
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    # Of FSDP1 the outermost modules, which speak for those inside them.
    flat = [module for module in modules if isinstance(module, FullyShardedDataParallel)]
    inside = {inner for outer in flat for inner in outer.modules() if inner is not outer}
    return [
        *(_Sharded(module) for module in modules if isinstance(module, FSDPModule)),
        *(_FlatSharded(module) for module in flat if module not in inside),
    ]


def most_of_all_ranks(counts: Sequence[int], device: torch.device) -> list[int]:
    """The largest of each count over the ranks: sharded encoders gather parameters in every forward pass, together."""
    most = torch.tensor(counts, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.tolist()
