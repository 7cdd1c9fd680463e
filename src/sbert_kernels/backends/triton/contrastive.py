"""The contrastive operation in Triton kernels; two strategies, one kernel with matrix products (`sweep`).

    tiled     similarities never leave the chip: a sweep of the rows sums up their statistics and gradients, one of the
              columns computes the similarities anew for theirs. No memory beyond operands, gradients and statistics.
    chunked   for a chunk of rows, a sweep writes the softmax weights (not the logits) in the operands' type; both
              gradients are the vendor's matrix products with them. Three products where tiled has four or more.

`cost_model` says which is faster; SBERT_KERNELS_STRATEGY overrides it. Where cosine bounds the logits, exp(z) is in
fp32's range and its row sums are divided out after the product. Else a sweep finds each row's logsumexp first, and the
weights are probabilities. The own pair never goes through a weight: its entry is excluded, its part of loss and
gradient added row-wise in fp32 (`softmax`, `edges`).

Norms are factors of the weights: embeddings are never copied, but for products in another type than theirs. All the
gradients are of the dot products, times the norms' factors, until `edges.finish` takes away what lies along the vector.

Nothing waits for the device: no value is read back, shapes alone decide, so that a CUDA graph can hold the call.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from ... import settings
from ...logs import log_once
from ...problems.contrastive import ContrastiveProblem, ContrastiveResult, Needs
from . import cost_model, tuning
from .call import Call
from .launching import Target, target_of
from .traits import bounded, chunk_rows, crowded, products_of

logger = logging.getLogger(__name__)


def why_not(problem: ContrastiveProblem | None) -> str | None:
    """Why these kernels cannot serve a problem (None: the most usual one) where Triton runs, or None."""
    if problem is not None and problem.dtype == torch.float64:
        return "float64 is computed in torch ops"
    if problem is not None and problem.guided and problem.guide_queries.dtype == torch.float64:
        return "the guide is float64"
    return None


def contrastive(problem: ContrastiveProblem, needs: Needs) -> ContrastiveResult:
    """Loss and gradients of the contrastive operation."""
    way = (choose_strategy(problem, needs), 0)
    if settings.get("autotune"):
        ways = [(strategy, variant) for strategy in strategies(problem, needs) for variant in tuning.VARIANTS]
        kind, device = _kind(problem, needs), problem.device
        way = tuning.fastest(kind, ways, lambda way: _computed(problem, needs, *way), device, usual=way)
    return _computed(problem, needs, *way)


def _computed(problem: ContrastiveProblem, needs: Needs, strategy: str, variant: int) -> ContrastiveResult:
    if strategy == "chunked" or len(problem.dims) == 1 or not any(needs[:3]):
        return Call(problem, needs, strategy, variant).run()
    # Weights of one prefix are not those of another: without their matrix each prefix is a call of its own.
    parts = [
        Call(
            replace(problem, spec=replace(problem.spec, dims=(dim,), dim_weights=(weight,))), needs, strategy, variant
        ).run()
        for dim, weight in zip(problem.dims, problem.dim_weights, strict=True)
    ]
    return ContrastiveResult(
        *(None if part[0] is None else sum(part[1:], part[0]) for part in zip(*parts, strict=True))
    )


def _kind(problem: ContrastiveProblem, needs: Needs) -> tuple[Any, ...]:
    """What the fastest way depends on: the GPU, the number format, the options that change a kernel's code, and sizes.

    Rows count by their power of two, as only the number of tiles depends on them; widths as they are, since kernels are
    compiled for each.
    """
    rows = (len(problem.queries).bit_length(), sum(term.columns for term in problem.terms()).bit_length())
    options = (
        problem.cosine,
        tuple(
            (
                term.rows_are_queries,
                term.columns_are_queries,
                term.softmax,
                term.duplicates,
                term.hard_everywhere,
                len(term.hardness_exceptions),
            )
            for term in problem.terms()
        ),
    )
    target = target_of(problem.device)
    return (
        target,
        strategies(problem, needs),
        products_of(problem, target).name,
        problem.dims,
        rows,
        *options,
        bounded(problem),
        problem.guided,
        *needs,
    )


def predicted_seconds(problem: ContrastiveProblem, needs: Needs, target: Target) -> dict[str, float]:
    """What the cost model expects of each strategy."""
    products = products_of(problem, target)
    card = cost_model.card_of(target)
    seconds = {}
    for strategy in settings.STRATEGIES:
        seconds[strategy] = sum(
            cost_model.accounting(
                len(problem.queries),
                term.columns,
                problem.dims,
                products.dtype.itemsize,
                strategy,
                bounded=bounded(problem)
                and products.lift == 0
                and all(term.duplicates != "positive" for term in problem.terms()),
                gradients=any(needs[:3]),
                fma=products.fma,
                crowded=crowded(problem, products),
                chunk_rows=chunk_rows(problem, products, len(problem.queries)),
            ).seconds(card, products.kind)
            for term in problem.terms()
        )
    return seconds


def strategies(problem: ContrastiveProblem, needs: Needs) -> tuple[str, ...]:
    """Those that may be taken: the one asked for, else those that multiply as asked for."""
    if not any(needs[:3]):
        return ("tiled",)
    target = target_of(problem.device)
    products = products_of(problem, target)
    asked_for = settings.get("strategy")
    # The vendor's products of float32 follow torch's precision, and no other; those of ROCm's half precision round
    # their sums to it.
    vendor = "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    same = products.name == vendor if products.dtype == torch.float32 else target.backend != "hip"
    if asked_for == "chunked" and not same:
        instead = vendor if products.dtype == torch.float32 else "float32"
        log_once(
            logger, f"strategy='chunked' multiplies gradients by torch's products, in {instead}, not {products.name}."
        )
    return settings.STRATEGIES if asked_for is None and same else (asked_for or "tiled",)


def choose_strategy(problem: ContrastiveProblem, needs: Needs) -> str:
    """The strategy asked for, or the one that should be faster."""
    allowed = strategies(problem, needs)
    if len(allowed) == 1:
        return allowed[0]
    seconds = predicted_seconds(problem, needs, target_of(problem.device))
    return min(allowed, key=seconds.__getitem__)
