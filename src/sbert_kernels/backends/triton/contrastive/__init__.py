"""The contrastive operation in Triton kernels, from a problem to its loss and gradients.

    plan.py, planner.py                   what is decided about a call; deciding it, in one pass
    memory.py, cost_model.py              where its tensors lie; what it costs
    run.py, call.py, softmax.py           execute what was decided: all of it, what is done once, a chunk of rows
    operands.py                           the vectors and their gradients
    precision.py, tiles.py                number formats of the products; tile sizes of the kernels
    multiply.py                           matrix products: the vendor's, or a plain kernel
    epilogue.py, sweep.py, weigh.py       the kernels: from dot products to weights, with or without the product
    redo.py, softmax_statistics.py, rows.py, norms.py, arguments.py

`planner` says how a call is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields

import torch
from torch import Tensor

from .... import settings
from ....problems.contrastive import ContrastiveProblem, ContrastiveResult, Needs
from ....problems.scale import Scale
from ....values import float32_matmul_precision
from .. import autotune
from ..launching import target_of
from . import tiles
from .planner import make_plan
from .run import Program

# The plans of calls before, ready to run: a training has few shapes, and asks for them at every step.
_programs: dict[Hashable, Program] = {}
MOST_PROGRAMS = 256
_FIELDS = [field.name for field in fields(ContrastiveProblem)]


def why_not(problem: ContrastiveProblem | None) -> str | None:
    """Returns why these kernels cannot serve a problem (None: the most usual one) where Triton runs, or None."""
    if problem is not None and problem.dtype == torch.float64:
        return "float64 is computed in torch ops"
    if problem is not None and problem.guide_queries is not None and problem.guide_queries.dtype == torch.float64:
        return "the guide is float64"
    return None


def contrastive(problem: ContrastiveProblem, needs: Needs) -> ContrastiveResult:
    """Returns loss and gradients of the contrastive operation."""
    key = _key(problem, needs)
    way: tuple[str | None, int] = (None, 0)
    if settings.get("autotune"):
        asked_for = settings.get("weights")
        names = ("weigh",) if problem.guided else (asked_for,) if asked_for else settings.WEIGHTS
        ways = [(name, variant) for name in names for variant in tiles.VARIANTS]
        kind = _kind(problem, needs)
        way = autotune.fastest(
            kind, ways, lambda way: _program(problem, needs, key, *way).run(problem), problem.device, usual=way
        )
    return _program(problem, needs, key, *way).run(problem)


def _program(problem: ContrastiveProblem, needs: Needs, key: Hashable, way: str | None, variant: int) -> Program:
    """Returns the plan of a call, ready to run; made when it is first asked for."""
    full_key = (key, way, variant)
    program = _programs.get(full_key)
    if program is None:
        program = Program(make_plan(problem, needs, target_of(problem.device), way, variant))
        _programs[full_key] = program
        if len(_programs) > MOST_PROGRAMS:
            _programs.clear()
    return program


def _key(problem: ContrastiveProblem, needs: Needs) -> Hashable:
    """Returns all that a plan follows from: shapes, strides and types of the tensors, options, settings, the device."""
    return (_described(problem, lambda x: (x.shape, x.stride(), x.dtype)), *_rules(problem, needs))


def _kind(problem: ContrastiveProblem, needs: Needs) -> Hashable:
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
