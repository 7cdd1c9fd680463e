"""Chooses one of the two strategies: the one asked for, or the one that the cost model expects to be faster.

tiled     similarities never leave the chip: no memory that grows with N M, but four or more matrix products
chunked   the softmax weights of a chunk of rows are written, for the vendor's products: three matrix products
"""

from __future__ import annotations

import logging

import torch

from .... import settings
from ....logs import log_once
from ....problems.contrastive import ContrastiveProblem, Needs
from ..launching import target_of
from ..targets import Target
from . import cost_model
from .plan import chunk_rows, has_high_register_pressure, precision_of

logger = logging.getLogger(__name__)


def predicted_seconds(problem: ContrastiveProblem, needs: Needs, target: Target) -> dict[str, float]:
    """Returns the seconds that the cost model expects of each strategy."""
    precision = precision_of(problem, target)
    n, terms = len(problem.queries), problem.terms()
    duplicates_are_positive = any(term.duplicates == "positive" for term in terms)
    bounded = problem.unshifted and precision.lift == 0 and not duplicates_are_positive
    return {
        strategy: sum(
            cost_model.accounting(
                n,
                term.columns,
                problem.dims,
                precision.dtype.itemsize,
                strategy,
                bounded=bounded,
                gradients=needs.vectors,
                fma=precision.fma,
                high_register_pressure=has_high_register_pressure(terms, precision),
                chunk_rows=chunk_rows(n, terms, len(problem.dims), precision),
            ).seconds(target.gpu, precision.rate)
            for term in terms
        )
        for strategy in settings.STRATEGIES
    }


def strategies(problem: ContrastiveProblem, needs: Needs) -> tuple[str, ...]:
    """Returns the strategies that may be taken: the one asked for, else those that multiply in the right precision."""
    if not needs.vectors:
        return ("tiled",)
    target = target_of(problem.device)
    precision = precision_of(problem, target)
    asked_for = settings.get("strategy")
    # The vendor's products of float32 follow torch's precision, and no other; those of ROCm's half precision round
    # their sums to it.
    vendor = "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    same = precision.name == vendor if precision.dtype == torch.float32 else target.backend != "hip"
    if asked_for == "chunked" and not same:
        instead = vendor if precision.dtype == torch.float32 else "float32"
        log_once(
            logger, f"strategy='chunked' multiplies gradients by torch's products, in {instead}, not {precision.name}."
        )
    return settings.STRATEGIES if asked_for is None and same else (asked_for or "tiled",)


def choose_strategy(problem: ContrastiveProblem, needs: Needs) -> str:
    """Returns the strategy asked for, or the one that should be faster."""
    allowed = strategies(problem, needs)
    if len(allowed) == 1:
        return allowed[0]
    seconds = predicted_seconds(problem, needs, target_of(problem.device))
    return min(allowed, key=seconds.__getitem__)
