"""The contrastive operation in Triton kernels, from a problem to its loss and gradients.

    plan.py, planner.py                   what is decided about a call; deciding it, in one pass
    programs.py                           the plans of calls before
    memory.py, cost_model.py              where its tensors lie; what it costs
    run.py, call.py, softmax.py           execute what was decided: all of it, what is done once, a chunk of rows
    operands.py                           the vectors and their gradients
    precision.py, tiles.py                number formats of the products; tile sizes of the kernels
    multiply.py                           matrix products: the vendor's, or a plain kernel
    epilogue.py, sweep.py, weigh.py       the kernels: from dot products to weights, with or without the product
    redo.py, softmax_statistics.py, rows.py, norms.py, arguments.py; statistics.py starts the second of them

`planner` says how a call is computed.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from .... import settings
from ....problems.contrastive import ContrastiveProblem, ContrastiveResult, Needs
from .. import autotune
from ..launching import target_of
from . import tiles
from .planner import make_plan
from .programs import Programs, key_of, kind_of
from .run import Program

_programs = Programs()


def why_not(problem: ContrastiveProblem | None) -> str | None:
    """Returns why these kernels cannot serve a problem (None: the most usual one) where Triton runs, or None."""
    if problem is not None and problem.dtype == torch.float64:
        return "float64 is computed in torch ops"
    if problem is not None and problem.guide_queries is not None and problem.guide_queries.dtype == torch.float64:
        return "the guide is float64"
    return None


def contrastive(problem: ContrastiveProblem, needs: Needs) -> ContrastiveResult:
    """Returns loss and gradients of the contrastive operation."""
    key = key_of(problem, needs)
    way: tuple[str | None, int] = (None, 0)
    if settings.get("autotune"):
        asked_for = settings.get("weights")
        names = ("weigh",) if problem.guided else (asked_for,) if asked_for else settings.WEIGHTS
        ways = [(name, variant) for name in names for variant in tiles.VARIANTS]
        kind = kind_of(problem, needs)
        way = autotune.fastest(
            kind, ways, lambda way: _program(problem, needs, key, *way).run(problem), problem.device, usual=way
        )
    return _program(problem, needs, key, *way).run(problem)


def _program(problem: ContrastiveProblem, needs: Needs, key: Hashable, way: str | None, variant: int) -> Program:
    """Returns the plan of a call, ready to run; made when it is first asked for."""
    return _programs.found_or_made(
        (key, way, variant), lambda: Program(make_plan(problem, needs, target_of(problem.device), way, variant))
    )
