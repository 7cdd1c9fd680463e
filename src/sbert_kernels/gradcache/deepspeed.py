"""Has DeepSpeed see one backward pass a step, while a gradient cache runs one a mini-batch.

DeepSpeed reduces a gradient as soon as a parameter gets it, in a hook of the parameter, and allows it once a step. So
the gradients of all mini-batches but the last are asked for (``torch.autograd.grad``), which runs no hook of a
parameter, and added up here. The last one takes the usual way, and what has been added up joins each gradient on its
way to its parameter. DeepSpeed's loss scale and its division for accumulated batches come with the gradient of the
loss, and so to all mini-batches; some versions divide at the engine's output, which is then done here, once.

The engine is known by its name, as DeepSpeed need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .loss_stage import leaves_of

ENGINE = "DeepSpeedEngine"

# What DeepSpeed leaves at the parameters that it trains: with ZeRO-3, and with ZeRO-1 and 2.
MARKS = ("ds_id", "_hp_mapping")


class Engine:
    """Holds one engine of DeepSpeed, the outermost module of an encoder or one inside of it.

    Raises:
        TypeError: The engine reduces gradients in a place that a gradient cache cannot go by.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        instead = "Train with ZeRO-1, 2 or 3 alone, with DistributedDataParallel or FSDP2, or without a gradient cache."
        if "PipelineEngine" in _names(engine):
            raise TypeError(f"a gradient cache cannot train a PipelineEngine, which runs its own loop. {instead}")
        if _called(engine, "is_deepcompile_enabled"):
            raise TypeError(
                "a gradient cache cannot train an engine with DeepCompile, which reduces gradients inside of the "
                f"compiled backward pass of each mini-batch. Leave deepcompile out of the configuration. {instead}"
            )
        if any(hasattr(parameter, "ds_z3_leaf_module") for parameter in engine.parameters()):
            raise TypeError(
                "a gradient cache cannot train leaf modules of ZeRO-3 (set_z3_leaf_modules), which reduce gradients in "
                f"the backward pass of each mini-batch. {instead}"
            )
        self.gathers_parameters = int(_called(engine, "zero_optimization_stage") or 0) >= 3

    def factor(self) -> float:
        """Returns what the engine multiplies gradients by at its output, in the backward pass that runs.

        Versions 0.18.3 to 0.19.5 divide there for accumulated batches, the others at the loss.

        Raises:
            RuntimeError: The backward pass is not the engine's own. After any other DeepSpeed does not finish the
                step, or divides once more. Versions before 0.18.3, which know no other, do not tell.
        """
        if not getattr(self._engine, "_running_engine_backward", True):
            raise RuntimeError(
                "the loss of a gradient cache whose encoder is a DeepSpeedEngine needs engine.backward(loss) "
                "(accelerator.backward(loss) calls it), got loss.backward()."
            )
        scaled = _called(self._engine, "_backward_prologue_per_tensor", torch.ones(()))
        return 1.0 if scaled is None else float(scaled)

    @contextmanager
    def unscaled(self) -> Iterator[None]:
        """Has the engine leave gradients at its output as they are, for a block of forward passes.

        Where it divides them (:meth:`factor`), it does so at each of several outputs: twice, if one is made of another,
        as in sentence-transformers.
        """
        with _replaced(self._engine, "_backward_prologue_per_tensor", lambda gradient: gradient):
            yield

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Has the engine take no backward pass in this block for the beginning of a step's."""
        with self.unscaled(), _replaced(self._engine, "_backward_prologue", lambda *_, **__: None):
            yield


class LocalGradients:
    """Adds up gradients of mini-batches on this rank, and hands them over with those of the last one."""

    def __init__(self) -> None:
        # By id: a leaf and its gradient.
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Forgets all gradients: those of a backward pass that an exception has ended."""
        self._sums.clear()

    def add(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Adds the gradients of every leaf that a backward pass of outputs [n, ...] reaches."""
        leaves = list({id(leaf): leaf for output in outputs for leaf in leaves_of(output)}.values())
        found = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is None:
                continue
            _, before = self._sums.get(id(leaf), (leaf, None))
            self._sums[id(leaf)] = leaf, gradient if before is None else before + gradient

    @contextmanager
    def handed_over(self) -> Iterator[None]:
        """Has the backward pass in this block add the sums to what it gives each leaf.

        Raises:
            RuntimeError: It has not reached a leaf that an earlier mini-batch has.
        """

        def join(key: int) -> Any:
            return lambda gradient: gradient + self._sums.pop(key)[1]

        handles = [leaf.register_hook(join(key)) for key, (leaf, _) in self._sums.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self._sums:
            count, (_, example) = len(self._sums), next(iter(self._sums.values()))
            self.clear()
            raise RuntimeError(
                "a gradient cache under DeepSpeed needs every mini-batch to use the same parameters, but the last one "
                f"did not use {count} of them, one of which has the shape {list(example.shape)}. Train with "
                "DistributedDataParallel(find_unused_parameters=True)."
            )


def engines_in(modules: Sequence[nn.Module]) -> list[Engine]:
    """Returns the engines among modules.

    Raises:
        TypeError: An engine cannot be trained with a gradient cache, or gradients are enabled and DeepSpeed trains
            parameters of the modules, but its engine is not among them.
    """
    engines = [Engine(module) for module in modules if ENGINE in _names(module)]
    if not engines and torch.is_grad_enabled():
        for parameter in (parameter for module in modules for parameter in module.parameters(recurse=False)):
            hooked = getattr(parameter, "_post_accumulate_grad_hooks", None)
            if hooked and any(hasattr(parameter, mark) for mark in MARKS):
                raise TypeError(
                    "DeepSpeed trains parameters of this encoder, but the gradient cache was given the module under "
                    "the engine: give it what deepspeed.initialize() or accelerator.prepare() has returned, as in "
                    "GradCache(engine, ...) or loss.model = engine."
                )
    return engines


def _names(module: nn.Module) -> list[str]:
    """Returns the names of a module's class and of those that it inherits from."""
    return [cls.__name__ for cls in type(module).__mro__]


def _called(engine: Any, name: str, *args: Any) -> Any:
    """Returns what a method of an engine says, or None in a version that has none of that name."""
    method = getattr(engine, name, None)
    return method(*args) if callable(method) else None


@contextmanager
def _replaced(engine: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replaces a method of one engine for a block."""
    before = engine.__dict__.get(name)
    setattr(engine, name, method)
    try:
        yield
    finally:
        if before is None:
            delattr(engine, name)
        else:
            setattr(engine, name, before)
