"""The vectors of a call as the kernels take them, the gradients that pile up for them, and how they are multiplied."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import settings
from ...logs import log_once
from . import edges, tuning
from .launching import INTERPRETED, Target, launch

logger = logging.getLogger(__name__)

# How float32 operands are multiplied, by SBERT_KERNELS_MATMUL or torch.set_float32_matmul_precision().
_BY_PRECISION = {"highest": "float32", "high": "tf32", "medium": "bfloat16"}
_INPUT_PRECISION = {"float32": "ieee", "tf32": "tf32", "tf32x3": "tf32x3", "bfloat16x3": "bf16x3", "bfloat16": "ieee"}
_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# fp16 weights are written times 2^LIFT: at most 1, they would sink below its least number early.
FP16_LIFT = 12


@dataclass(frozen=True)
class Products:
    """The number format of the operands and how they are multiplied."""

    name: str  # "float32", "tf32", "tf32x3", "bfloat16x3", "bfloat16" or "float16"
    dtype: torch.dtype  # of the operands in memory that the vendor's products read, and of the weights
    fma: bool  # not by tensor cores

    @property
    def lift(self) -> int:
        return FP16_LIFT if self.dtype == torch.float16 else 0

    @property
    def split(self) -> bool:
        """Whether a product of float32 is three of parts of them."""
        return self.name in ("tf32x3", "bfloat16x3")

    @property
    def kind(self) -> str:
        """The rate that they run at, in the words of the cost model."""
        if self.fma:
            return "fp32"
        return "half" if self.dtype != torch.float32 else "tf32"

    def constants(self) -> dict[str, Any]:
        """The constexpr of a sweep."""
        return {
            "PRECISION": _INPUT_PRECISION.get(self.name, "ieee"),
            "OPERAND": _TL[self.dtype],
            "WIDEN": INTERPRETED and self.dtype == torch.bfloat16,
        }


def choose_products(dtypes: set[torch.dtype], target: Target, prefixes: int = 1) -> Products:
    """The products for embeddings of these types: half precision as it is where all of it is alike, else float32."""
    tensor_cores = not (target.backend == "cuda" and target.arch < 80)  # that Triton would use
    # Weights over the small norms of short prefixes leave fp16's range; tf32 has as many digits, and a wider range.
    if len(dtypes) == 1 and torch.float32 not in dtypes and not (dtypes == {torch.float16} and prefixes > 1):
        dtype = next(iter(dtypes))
        if dtype == torch.float16 or tensor_cores:
            return Products(str(dtype).removeprefix("torch."), dtype, fma=not tensor_cores)
        return Products("float32", torch.float32, fma=True)  # sm_75 has no bfloat16 products
    asked_for = settings.get("matmul")
    name = asked_for or _BY_PRECISION[torch.get_float32_matmul_precision()]
    if dtypes == {torch.float16}:
        name = "tf32"
    wanted = name
    if target.backend == "hip" and name in ("tf32", "tf32x3"):
        name = "bfloat16x3"  # gfx942 has no tf32 products of Triton's
    if not tensor_cores:
        name = "float32"
    if name != wanted == asked_for:
        log_once(
            logger,
            f"SBERT_KERNELS_MATMUL={asked_for!r}: this GPU has no such products, so that {name} takes its place.",
        )
    if name == "bfloat16":
        return Products(name, torch.bfloat16, fma=False)
    return Products(name, torch.float32, fma=name == "float32" and target.backend != "hip")


class Operand:
    """A set of vectors, the inverse norms of their prefixes, and their gradient before the norm."""

    def __init__(self, parts: tuple[Tensor, ...], need: bool, cosine: bool, products: Products, dims: tuple[int, ...]):
        vectors = parts[0].detach() if len(parts) == 1 else concatenated(parts)
        self.rescaled: Tensor | None = None  # (rows, 1): what fp16 vectors were divided by
        if products.dtype == torch.float16 and cosine:
            # Unit vectors: norms as factors of the weights could leave fp16's range.
            norms = torch.linalg.vector_norm(vectors[:, : dims[-1]].float(), dim=1, keepdim=True)
            self.rescaled = torch.where(norms == 0, 1.0, norms)
            vectors = (vectors.float() / self.rescaled).half()
        if vectors.dtype not in (products.dtype, torch.float32) or (
            vectors.dtype == torch.float32 and products.dtype == torch.bfloat16
        ):
            vectors = vectors.to(products.dtype)
        self.values = with_unit_stride(vectors)  # (rows, D)
        self.need, self.dims = need, dims
        shape = (len(dims), len(self.values))
        self.factors = self.values.new_empty(shape, dtype=torch.float32) if cosine else None
        self.gradient: Tensor | None = None  # (rows, d) fp32
        self.row_coefficient: Tensor | None = None  # (rows,), still to be multiplied in
        self.along: Tensor | None = None  # (K, rows): gradient . x of each prefix, where finish() can't know it
        if need and len(dims) > 1 and cosine:
            self.along = torch.zeros(shape, dtype=torch.float32, device=self.values.device)

    @property
    def rows(self) -> int:
        return len(self.values)

    def add(self, part: Tensor, begin: int, coefficient: Tensor | None = None) -> None:
        """A gradient of the rows from ``begin`` on, (n, d), to be multiplied by a coefficient of each row."""
        if self.gradient is None and len(part) == self.rows:
            self.gradient, self.row_coefficient = part, coefficient
            return
        mine = self.accumulator()[begin : begin + len(part)]
        if coefficient is None:
            mine += part
        else:
            mine.addcmul_(part, coefficient[:, None])

    def accumulator(self) -> Tensor:
        """(rows, d) fp32, with everything so far in it."""
        if self.gradient is None:
            self.gradient = torch.zeros(self.rows, self.dims[-1], dtype=torch.float32, device=self.values.device)
        if self.row_coefficient is not None:
            self.gradient *= self.row_coefficient[:, None]
            self.row_coefficient = None
        return self.gradient

    def add_along(self, part: Tensor, begin: int) -> None:
        """(parts, K, n) sums of gradient . x of the rows from ``begin`` on."""
        if self.along is not None:
            self.along[:, begin : begin + part.shape[2]] += part.sum(0)


def concatenated(parts: tuple[Tensor, ...]) -> Tensor:
    dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else torch.float32
    return torch.cat([part.detach().to(dtype) for part in parts])


def with_unit_stride(vectors: Tensor) -> Tensor:
    return vectors if vectors.stride(1) == 1 else vectors.contiguous()


def prepare(
    documents: Operand, queries: Operand | None, offset: int, eps: float, own: Tensor | None, absent_is_zero: bool
) -> None:
    """Norms of documents and queries, and the similarities ``own`` (K, N) of query i and document ``offset + i``."""
    y = None if queries is None else queries.values
    launch(
        edges.prepare,
        (triton.cdiv(documents.rows, tuning.EDGES["BLOCK_ROWS"]),),
        documents.values,
        documents.values.stride(0),
        y,
        0 if y is None else y.stride(0),
        documents.rows,
        0 if queries is None else queries.rows,
        offset,
        eps,
        documents.factors,
        None if queries is None else queries.factors,
        own,
        config=tuning.EDGES,
        DIMS=documents.dims,
        ABSENT_IS_ZERO=absent_is_zero,
    )


def finish(
    operand: Operand,
    partner: Operand | None,
    partner_begin: int,
    offset: int,
    pull: Tensor | None,
    own: Tensor | None,
    eps: float,
    factor: float,
    factor_tensor: Tensor | None,
    width: int,
) -> Tensor:
    """The gradient of an operand, (rows, width) fp32: own pairs, norm and common factor put in."""
    coefficient, operand.row_coefficient = operand.row_coefficient, None
    gradient = operand.accumulator()
    x, partners, partner_factors = operand.values, None, None
    if partner is not None:
        partners = partner.values[partner_begin:]
        partner_factors = None if partner.factors is None else partner.factors[:, partner_begin:]
    launch(
        edges.finish,
        (triton.cdiv(operand.rows, tuning.EDGES["BLOCK_ROWS"]),),
        gradient,
        gradient.stride(0),
        coefficient,
        x,
        x.stride(0),
        operand.factors,
        partners,
        0 if partners is None else partners.stride(0),
        partner_factors,
        0 if partner_factors is None else partner_factors.stride(0),
        None if partner is None else pull,
        None if partner is None else own,
        operand.along,
        operand.rows,
        0 if pull is None else pull.shape[1],
        offset,
        eps,
        factor,
        factor_tensor,
        config=tuning.EDGES,
        DIMS=operand.dims,
    )
    if operand.rescaled is not None:
        gradient /= operand.rescaled
    return gradient if gradient.shape[1] == width else torch.nn.functional.pad(gradient, (0, width - gradient.shape[1]))


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool, lift: int) -> None:
    """out (m, n) fp32 += 2^-lift a @ b by the vendor's library; ``first``: there is nothing in it yet.

    [m, k] @ [k, n] -> [m, n]
    """
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=0 if first else 1, out=out)
        return
    if (out.device.type == "cuda" and torch.version.hip is None) or out.device.type == "meta":
        if first and lift == 0 and out.is_contiguous():
            torch.mm(a, b, out_dtype=torch.float32, out=out)
            return
        found = torch.mm(a, b, out_dtype=torch.float32)
    else:  # the interpreter's CPU, and ROCm, whose products would round their sums to half precision
        found = torch.mm(a.float(), b.float())
    if first:
        out.zero_()
    out.add_(found, alpha=2.0**-lift)
