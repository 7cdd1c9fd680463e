"""The contrastive operation in Triton kernels, from a problem to its loss and gradients.

    plan.py, run.py                            decides all about a call in one pass; executes what was decided
    precision.py, tiles.py                     number formats of the products; tile sizes of the kernels
    operands.py                                the vectors and their gradients
    sweep.py, softmax_statistics.py, norms.py  the kernels
    strategy.py, cost_model.py, tiled.py       the choice of a strategy; the strategy that has no plan

`plan` says how the chunked strategy works.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from .... import settings
from ....problems.contrastive import ContrastiveProblem, ContrastiveResult, Needs
from .. import autotune
from ..launching import target_of
from . import tiles
from .plan import make_plan, precision_of
from .run import run
from .strategy import choose_strategy, strategies
from .tiled import tiled


def why_not(problem: ContrastiveProblem | None) -> str | None:
    """Returns why these kernels cannot serve a problem (None: the most usual one) where Triton runs, or None."""
    if problem is not None and problem.dtype == torch.float64:
        return "float64 is computed in torch ops"
    if problem is not None and problem.guide_queries is not None and problem.guide_queries.dtype == torch.float64:
        return "the guide is float64"
    return None


def contrastive(problem: ContrastiveProblem, needs: Needs) -> ContrastiveResult:
    """Returns loss and gradients of the contrastive operation."""
    way = (choose_strategy(problem, needs), 0)
    if settings.get("autotune"):
        ways = [(strategy, variant) for strategy in strategies(problem, needs) for variant in tiles.VARIANTS]
        kind, device = _kind(problem, needs), problem.device
        way = autotune.fastest(kind, ways, lambda way: _computed(problem, needs, *way), device, usual=way)
    return _computed(problem, needs, *way)


def _computed(problem: ContrastiveProblem, needs: Needs, strategy: str, variant: int) -> ContrastiveResult:
    target = target_of(problem.device)
    if strategy == "tiled" and needs.vectors:
        return tiled(problem, needs, target, variant)
    return run(make_plan(problem, needs, target, variant), problem)


def _kind(problem: ContrastiveProblem, needs: Needs) -> Hashable:
    """Returns what the fastest way depends on: the GPU, the precision, what changes a kernel's code, and sizes.

    Rows count by their power of two, as only the number of tiles depends on them; widths as they are, since kernels are
    compiled for each.
    """
    target, terms = target_of(problem.device), problem.terms()
    rows = (len(problem.queries).bit_length(), sum(term.columns for term in terms).bit_length())
    rules = tuple(
        (
            term.rows_are_queries,
            term.columns_are_queries,
            term.softmax,
            term.hardness > 0,
            term.hard_everywhere,
            len(term.hardness_exceptions),
            term.duplicates,
        )
        for term in terms
    )
    return (
        target,
        strategies(problem, needs),
        precision_of(problem, target).name,
        problem.dims,
        rows,
        rules,
        problem.cosine,
        problem.unshifted,
        problem.guided,
        *needs,
    )
