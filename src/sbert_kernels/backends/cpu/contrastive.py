"""The contrastive operation in C++: tiles that stay in the cache, every option, all Matryoshka prefixes in one pass.

Operands are float32 or bfloat16. How float32 operands are multiplied follows `torch.set_float32_matmul_precision`:

    "highest"  float32
    "high"     three bfloat16 matmuls, about 16 bits of mantissa, where the machine has a matrix unit for them (AMX);
               float32 elsewhere, which is faster there and more exact
    "medium"   bfloat16, where the machine has instructions for it; float32 elsewhere

bfloat16 operands are multiplied as they are where the machine has instructions for it, float16 ones (and bfloat16 ones
elsewhere) in float32. Under autocast all operands are multiplied as those of its type are. Sums, softmax, positives and
loss are float32 or better in any case.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from ... import native, settings
from ...problems.contrastive import LEAST_EXPONENT, ContrastiveProblem, ContrastiveResult, Needs
from ...values import float32_matmul_precision
from . import wire

# Similarities are written once and read twice, by products that have hundreds of operations for each: where they lie
# costs little. Fewer rows would make the passes over the columns' gradients cost more.
TARGET_BLOCK_BYTES = 16 * settings.MIB
LARGEST_BLOCK_BYTES = 48 * settings.MIB
MIN_BLOCK_ROWS = 256


class MatmulPrecision(IntEnum):
    """Says how operands are multiplied, in the numbers of csrc/cpu/contrastive/problem.h."""

    FLOAT32 = 0
    BFLOAT16X3 = 1
    BFLOAT16 = 2


def why_not(problem: ContrastiveProblem | None) -> str | None:
    """Returns why this backend cannot serve a problem (None: the most usual one) on the CPU, or None if it can."""
    if problem is not None and problem.dtype == torch.float64:
        return "float64 is computed in torch ops"
    if problem is not None and problem.guide_queries is not None and problem.guide_queries.dtype == torch.float64:
        return "the guide is float64"
    return native.cpu.load()


def contrastive(problem: ContrastiveProblem, needs: Needs) -> ContrastiveResult:
    """Returns loss and gradients of the contrastive operation."""
    documents = _concatenated(problem.documents)
    dtypes = {x.dtype for x in (problem.queries, documents, problem.all_queries) if x is not None}
    precision = choose_precision(dtypes, problem.autocast)
    # What is not bfloat16 throughout is widened; narrower matmuls convert as they pack.
    dtype = torch.bfloat16 if dtypes == {torch.bfloat16} and precision == MatmulPrecision.BFLOAT16 else torch.float32

    def operand(vectors: Tensor | None, dtype: torch.dtype = dtype) -> Tensor | None:
        return None if vectors is None else vectors.detach().to(dtype).contiguous()

    def ids(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.contiguous()

    weights = problem.weights
    loss, *gradients = torch.ops.sbert_kernels.contrastive(
        queries=operand(problem.queries),
        documents=operand(documents),
        all_queries=operand(problem.all_queries),
        weights=None if weights is None else weights.detach().to(torch.float64).contiguous(),
        query_ids=ids(problem.query_ids),
        document_ids=ids(problem.document_ids),
        guide_queries=operand(problem.guide_queries, torch.float32),
        guide_documents=operand(_concatenated(problem.guide_documents), torch.float32) if problem.guided else None,
        scale=problem.scale.read(),
        term_layout=wire.term_layout(),
        terms=wire.encoded(problem.terms()),
        dims=problem.dims,
        dim_weights=problem.dim_weights,
        cosine=problem.cosine,
        shift=problem.shift if problem.bounded else None,
        least_sum=math.exp(LEAST_EXPONENT) if problem.sums_may_vanish else 0.0,
        eps=problem.eps,
        guide_margins=problem.guide_margins,
        row_offset=problem.row_offset,
        precision=precision,
        block_bytes=_block_bytes(problem),
        needs=needs,
    )
    found = {name: gradient for name, gradient, wanted in zip(Needs._fields, gradients, needs, strict=True) if wanted}
    if needs.scale:
        found["scale"] = found["scale"].reshape(())
    return ContrastiveResult(loss, **found)


def choose_precision(dtypes: set[torch.dtype], autocast: torch.dtype | None = None) -> MatmulPrecision:
    """Returns how to multiply operands of these types with the machine's instructions.

    SBERT_KERNELS_MATMUL decides if it is set, then autocast, as if all operands were of its type, then the operands'
    types, and for float32 torch's precision knob.

    Raises:
        ValueError: SBERT_KERNELS_MATMUL asks for a precision of GPUs, or one without instructions here.
    """
    asked_for = settings.get("matmul")
    if asked_for is not None:
        if asked_for not in ("float32", "bfloat16x3", "bfloat16"):
            raise ValueError(f"SBERT_KERNELS_MATMUL={asked_for!r} is for GPUs; the cpu backend cannot multiply so.")
        precision = MatmulPrecision[asked_for.upper()]
        reason = why_not_precision(precision)
        if reason is not None:
            raise ValueError(f"SBERT_KERNELS_MATMUL={asked_for!r} cannot be served: {reason}.")
        return precision
    if autocast is not None:
        dtypes = {autocast}
    if dtypes == {torch.bfloat16}:
        return MatmulPrecision.BFLOAT16 if bfloat16_instructions() else MatmulPrecision.FLOAT32
    knob = float32_matmul_precision("cpu")
    # float16 has more bits than bfloat16, and no knob of its own.
    if torch.float32 not in dtypes or knob == "highest":
        return MatmulPrecision.FLOAT32
    if knob == "medium":
        return MatmulPrecision.BFLOAT16 if bfloat16_instructions() else MatmulPrecision.FLOAT32
    return MatmulPrecision.BFLOAT16X3 if bfloat16_instructions() == "AMX" else MatmulPrecision.FLOAT32


def bfloat16_instructions() -> str | None:
    """Returns the instructions that bfloat16 matmuls run with here, "AMX" or "AVX512-bf16"; None without any.

    The compiled kernels answer, which must be loaded: what the processor has, less what the environment forbids.
    """
    return torch.ops.sbert_kernels.cpu_bfloat16_instructions() or None


def why_not_precision(precision: MatmulPrecision) -> str | None:
    """Returns why the machine cannot multiply in this way, or None if it can."""
    if precision == MatmulPrecision.FLOAT32 or bfloat16_instructions():
        return None
    return (
        "there are no instructions for bfloat16 matmuls (AVX512-bf16 or AMX): the processor lacks them, or "
        "ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA or torch.backends.mkldnn.enabled forbids them"
    )


def _concatenated(parts: tuple[Tensor, ...]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else torch.float32
    return torch.cat([part.detach().to(dtype) for part in parts])


def _block_bytes(problem: ContrastiveProblem) -> int:
    row_bytes = 4 * len(problem.dims) * sum(term.columns for term in problem.terms())
    wanted = max(TARGET_BLOCK_BYTES, min(LARGEST_BLOCK_BYTES, MIN_BLOCK_ROWS * row_bytes))
    return min(settings.block_bytes(), wanted)
