"""The contrastive operation in C++: tiles that stay in the cache, every option, all Matryoshka prefixes in one pass.

Operands are float32 or bfloat16. Which products float32 operands get follows `torch.set_float32_matmul_precision`:

    "highest"  float32
    "high"     three bfloat16 products, about 16 bits of mantissa, where the machine has a matrix unit for them (AMX);
               float32 elsewhere, which is faster there and more exact
    "medium"   bfloat16, where the machine has instructions for it; float32 elsewhere

bfloat16 operands are multiplied as they are where the machine has instructions for it, float16 ones (and bfloat16 ones
elsewhere) in float32. Sums, softmax, own pairs and loss are float32 or better in any case.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from ... import extension, settings
from ...problems.contrastive import ContrastiveProblem, ContrastiveResult, Needs, Term
from ..blockwise.contrastive import UNSHIFTED_LOGIT

# Similarities are written once and read twice, by products that have hundreds of operations for each: where they lie
# costs little. Fewer rows would make the passes over the columns' gradients cost more.
TARGET_BLOCK_BYTES = 16 * settings.MIB
LARGEST_BLOCK_BYTES = 48 * settings.MIB
MIN_BLOCK_ROWS = 256


class Products(IntEnum):
    """How operands are multiplied; the numbers of csrc/cpu/problem.h."""

    FLOAT32 = 0
    BFLOAT16X3 = 1
    BFLOAT16 = 2


def unsupported(problem: ContrastiveProblem | None) -> str | None:
    """Why this backend cannot serve a problem (None: the most usual one) on the CPU, or None."""
    if problem is not None and problem.dtype == torch.float64:
        return "float64 is computed in torch ops"
    if problem is not None and problem.guided and problem.guide_queries.dtype == torch.float64:
        return "the guide is float64"
    return extension.load()


def contrastive(problem: ContrastiveProblem, needs: Needs) -> ContrastiveResult:
    """Loss and gradients of the contrastive operation."""
    documents = _concatenated(problem.documents)
    dtypes = {x.dtype for x in (problem.queries, documents, problem.all_queries) if x is not None}
    products = choose_products(dtypes)
    # What is not bfloat16 throughout is widened; narrower products convert as they pack.
    dtype = torch.bfloat16 if dtypes == {torch.bfloat16} and products == Products.BFLOAT16 else torch.float32

    def operand(vectors: Tensor | None, dtype: torch.dtype = dtype) -> Tensor | None:
        return None if vectors is None else vectors.detach().to(dtype).contiguous()

    scale, weights = problem.scale, problem.weights
    scale_is_tensor = isinstance(scale, Tensor)
    loss, *gradients = torch.ops.sbert_kernels.contrastive(
        operand(problem.queries),
        operand(documents),
        operand(problem.all_queries),
        scale.detach() if scale_is_tensor else None,
        None if weights is None else weights.detach().to(torch.float64).contiguous(),
        _ids(problem, problem.query_ids),
        _ids(problem, problem.document_ids),
        operand(problem.guide_queries, torch.float32),
        operand(_concatenated(problem.guide_documents), torch.float32) if problem.guided else None,
        1.0 if scale_is_tensor else float(scale),
        _described(problem),
        problem.dims,
        problem.dim_weights,
        problem.similarity == "cos",
        float(problem.hardness),
        problem.eps,
        float(problem.margin),
        problem.margin_strategy == "relative",
        problem.row_offset,
        products,
        UNSHIFTED_LOGIT,
        _block_bytes(problem),
        needs,
    )
    gradients = {
        name: gradient for name, gradient, wanted in zip(Needs._fields, gradients, needs, strict=True) if wanted
    }
    if needs.scale:
        gradients["scale"] = gradients["scale"].reshape(())
    return ContrastiveResult(loss, **gradients)


def choose_products(dtypes: set[torch.dtype]) -> Products:
    """The products for operands of these types, by torch's precision knob and the machine's instructions.

    Raises:
        ValueError: SBERT_KERNELS_MATMUL asks for products of GPUs, or that the machine has no instructions for.
    """
    asked_for = settings.get("matmul")
    if asked_for is not None:
        if asked_for not in ("float32", "bfloat16x3", "bfloat16"):
            raise ValueError(f"SBERT_KERNELS_MATMUL={asked_for!r} is for GPUs; the cpu backend has no such products.")
        products = Products[asked_for.upper()]
        reason = why_not(products)
        if reason is not None:
            raise ValueError(f"SBERT_KERNELS_MATMUL={asked_for!r} cannot be served: {reason}.")
        return products
    if dtypes == {torch.bfloat16}:
        return Products.BFLOAT16 if bfloat16_instructions() else Products.FLOAT32
    precision = torch.get_float32_matmul_precision()
    # float16 has more bits than bfloat16, and no knob of its own.
    if torch.float32 not in dtypes or precision == "highest":
        return Products.FLOAT32
    if precision == "medium":
        return Products.BFLOAT16 if bfloat16_instructions() else Products.FLOAT32
    return Products.BFLOAT16X3 if bfloat16_instructions() == "AMX" else Products.FLOAT32


def bfloat16_instructions() -> str | None:
    """The instructions that bfloat16 products run with here, "AMX" or "AVX512-bf16"; None where there are none.

    The compiled kernels answer, which must be loaded: what the processor has, less what the environment forbids.
    """
    return torch.ops.sbert_kernels.cpu_bfloat16_instructions() or None


def why_not(products: Products) -> str | None:
    """Why the machine cannot multiply in this way, or None."""
    if products == Products.FLOAT32 or bfloat16_instructions():
        return None
    return (
        "there are no instructions for bfloat16 products (AVX512-bf16 or AMX): the processor lacks them, or "
        "ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA or torch.backends.mkldnn.enabled forbids them"
    )


def _concatenated(parts: tuple[Tensor, ...]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else torch.float32
    return torch.cat([part.detach().to(dtype) for part in parts])


def _ids(problem: ContrastiveProblem, ids: Tensor | None) -> Tensor | None:
    return None if ids is None or problem.duplicates == "keep" else ids.contiguous()


def _block_bytes(problem: ContrastiveProblem) -> int:
    row_bytes = 4 * len(problem.dims) * sum(term.columns for term in problem.terms())
    wanted = max(TARGET_BLOCK_BYTES, min(LARGEST_BLOCK_BYTES, MIN_BLOCK_ROWS * row_bytes))
    return min(settings.block_bytes(), wanted)


def _described(problem: ContrastiveProblem) -> list[int]:
    """The terms in integers, as csrc/cpu/bindings.cpp reads them."""
    numbers: list[int] = []
    for group, terms in enumerate(problem.groups()):
        for term in terms:
            weighted = term.direction == "query_to_doc" and problem.hardness > 0
            own_negatives = _own_negative_pairs(problem, term) if weighted else []
            pairs = [] if term.positive is None else [(term.positive, True, False)]
            pairs += own_negatives
            excluded = () if term.positive is not None else term.excluded
            numbers += [
                term.rows_are_queries,
                term.columns_are_queries,
                term.columns,
                group,
                weighted and problem.hardness_mode != "hard_negatives",
                term.positive is not None and problem.duplicates == "positive",
                problem.own_column(term),
                len(pairs),
                *(number for pair in pairs for number in pair),
                len(excluded),
                *excluded,
            ]
    return [int(number) for number in numbers]


def _own_negative_pairs(problem: ContrastiveProblem, term: Term) -> list[tuple[int, bool, bool]]:
    """Own hard negatives, where they are the only documents with the hardness penalty, or the only ones without."""
    if problem.hardness_mode == "all_negatives":
        return []
    return [(start, False, problem.hardness_mode == "hard_negatives") for start in term.own_negatives]
