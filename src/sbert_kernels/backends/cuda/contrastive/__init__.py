"""The contrastive operation with weights by the CUDA library, from a problem to its loss and gradients.

    planner.py       what is decided otherwise than for Triton's kernels; the plan of a symmetric loss
    softmax.py       launches of the library's operator, in the place of Triton's sweep
    two_sided.py     both directions of a symmetric loss from one matrix of weights
    run.py           which of these a plan takes

All else is that of `backends/triton/contrastive`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .... import settings
from ....problems.contrastive import ContrastiveProblem, ContrastiveResult, Needs
from ...triton import contrastive as triton
from ...triton.contrastive.planner import precision_of
from ...triton.contrastive.precision import MatmulPrecision
from ...triton.contrastive.programs import Programs, key_of
from ...triton.launching import target_of
from .planner import make_plan
from .run import CudaProgram

_programs = Programs()

# The kernels address vectors and weights as the hardware's copies of tiles do.
ALIGNMENT = 16  # bytes: of the first number of all rows
MULTIPLE = 8  # of numbers: the width, and how far rows are apart
LARGEST = 2**31 - 2**15  # rows or columns


def why_not(problem: ContrastiveProblem | None) -> str | None:
    """Returns why these kernels cannot serve a problem (None: the most usual one) where they run, or None."""
    reason = triton.why_not(problem)
    if reason is not None or problem is None:
        return reason
    if settings.get("weights") == "weigh":
        return "SBERT_KERNELS_WEIGHTS='weigh' asks for a way that only the Triton kernels have"
    reason = _why_not_options(problem)
    if reason is None:
        precision = precision_of(problem, target_of(problem.device))
        reason = _why_not_products(problem, precision) or _why_not_layout(problem, precision.dtype)
    return reason


def _why_not_options(problem: ContrastiveProblem) -> str | None:
    if problem.guided:
        return "guide_queries are given"
    if not problem.cosine:
        return "similarity='dot' does not bound the logits"
    if problem.scale.tensor is not None:
        return "scale is a tensor, whose gradient they do not compute"
    if not problem.bounded:
        return "scale or hardness_strength allows logits above 101, which take each row's maximum"
    if len(problem.dims) > 1:
        return "matryoshka_dims are several"
    if any(term.duplicates == "positive" for term in problem.terms()):
        return "duplicates='positive'"
    return None


def _why_not_products(problem: ContrastiveProblem, precision: MatmulPrecision) -> str | None:
    if precision.dtype == torch.float32:
        return f"the products are those of {precision.name}, and the CUDA kernels multiply bfloat16 and float16"
    if precision.dtype == torch.float16 and problem.sums_may_vanish:
        return "float16 products with logits above 53 take each row's maximum"
    return None


def _why_not_layout(problem: ContrastiveProblem, dtype: torch.dtype) -> str | None:
    if problem.dims[0] % MULTIPLE or problem.queries.shape[1] % MULTIPLE:
        return f"the width of the embeddings is no multiple of {MULTIPLE}"
    if max(problem.document_rows, len(problem.query_columns)) >= LARGEST:
        return f"there are {LARGEST} embeddings or more"
    if dtype == torch.float16:
        return None  # the plan makes vectors of unit length
    parts = [problem.queries]
    parts += problem.documents if len(problem.documents) == 1 else ()  # several are concatenated
    parts += () if problem.all_queries is None else (problem.all_queries,)
    if any(x.dtype == dtype and not _is_aligned(x) for x in parts):
        return f"rows of the embeddings do not begin at multiples of {ALIGNMENT} bytes"
    return None


def _is_aligned(x: Tensor) -> bool:
    """Returns True if the kernels can read vectors where they are, or they are copied as their entries lie apart."""
    stride, step = x.stride()
    if step != 1:
        return True
    apart = len(x) == 1 or (stride % MULTIPLE == 0 and stride >= x.shape[1])  # one row is apart from none
    return apart and x.data_ptr() % ALIGNMENT == 0


def contrastive(problem: ContrastiveProblem, needs: Needs) -> ContrastiveResult:
    """Returns loss and gradients of the contrastive operation."""
    program = _programs.found_or_made(
        key_of(problem, needs), lambda: CudaProgram(make_plan(problem, needs, target_of(problem.device)))
    )
    return program.run(problem)
