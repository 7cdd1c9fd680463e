"""Remembers the plans of calls before, ready to run, and says what a plan follows from."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields

from torch import Tensor

from .... import settings
from ....problems.contrastive import ContrastiveProblem, Needs
from ....problems.scale import Scale
from ....values import float32_matmul_precision
from ..launching import target_of
from .run import Program

MOST_PROGRAMS = 256
_FIELDS = [field.name for field in fields(ContrastiveProblem)]


class Programs(dict[Hashable, Program]):
    """Holds programs by what their plans follow from: a training has few shapes, and asks for them at every step."""

    def found_or_made(self, key: Hashable, make: Callable[[], Program]) -> Program:
        """Returns the program of a key; ``make`` makes it when it is first asked for."""
        program = self.get(key)
        if program is None:
            if len(self) >= MOST_PROGRAMS:
                self.clear()
            program = self[key] = make()
        return program


def key_of(problem: ContrastiveProblem, needs: Needs) -> Hashable:
    """Returns all that a plan follows from: shapes, strides and types of the tensors, options, settings, the device."""
    return (_described(problem, lambda x: (x.shape, x.stride(), x.dtype)), *_rules(problem, needs))


def kind_of(problem: ContrastiveProblem, needs: Needs) -> Hashable:
    """Returns what the fastest way depends on: the same, but rows count by their power of two.

    Only the number of tiles depends on them; widths count as they are, since kernels are compiled for each.
    """
    described = _described(problem, lambda x: (len(x).bit_length() if x.dim() else 0, x.shape[1:], x.dtype))
    return (described, *_rules(problem, needs))


def _described(problem: ContrastiveProblem, of_tensor: Callable[[Tensor], Hashable]) -> tuple[Hashable, ...]:
    """Returns every part of a problem, with the description of a tensor in the tensor's place."""
    parts: list[Hashable] = []
    for name in _FIELDS:
        value = getattr(problem, name)
        if isinstance(value, Tensor):
            parts.append(of_tensor(value))
        elif isinstance(value, tuple):
            parts.append(tuple([of_tensor(x) for x in value]))
        elif not isinstance(value, Scale):  # whose number changes from step to step, see `_rules`
            parts.append(value)
    return tuple(parts)


def _rules(problem: ContrastiveProblem, needs: Needs) -> tuple[Hashable, ...]:
    bounded = problem.bounded
    return (
        needs,
        bounded,
        bounded and problem.sums_may_vanish,
        problem.scale.on_device is None,
        problem.device,
        target_of(problem.device),
        settings.get("block_bytes"),
        settings.get("matmul"),
        settings.get("weights"),
        float32_matmul_precision("cuda"),
    )
