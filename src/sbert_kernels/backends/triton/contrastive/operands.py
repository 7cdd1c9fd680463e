"""The vectors of a call as the kernels read them, and the gradients that are summed up for them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launching import cdiv, launch
from ..layout import with_unit_stride
from . import tiles
from .norms import norms_backward, norms_forward
from .plan import OperandPlan, joined_dtype


class Operand:
    """Holds a set of vectors, the inverse norms of their prefixes, and the gradient of their dot products."""

    def __init__(self, parts: tuple[Tensor, ...], plan: OperandPlan, dims: tuple[int, ...]) -> None:
        vectors = parts[0].detach()
        if len(parts) > 1:
            vectors = torch.cat([part.detach().to(joined_dtype(parts)) for part in parts])
        self.norms: Tensor | None = None  # (rows, 1): what the vectors were divided by
        if plan.unit_length:
            norms = torch.linalg.vector_norm(vectors[:, : dims[-1]].float(), dim=1, keepdim=True)
            self.norms = torch.where(norms == 0, 1.0, norms)
            vectors = vectors.float() / self.norms
        self.values = with_unit_stride(vectors.to(plan.dtype))  # (rows, D)
        self.rows, self.need, self.dims = plan.rows, plan.need, dims
        shape = (len(dims), plan.rows)
        device = self.values.device
        self.inverse_norms = torch.empty(shape, dtype=torch.float32, device=device) if plan.cosine else None
        self.radial = torch.zeros(shape, dtype=torch.float32, device=device) if plan.radial else None
        self.gradient: Tensor | None = None  # (rows, d) fp32
        self.row_coefficient: Tensor | None = None  # (rows,): the gradient is still to be multiplied by it

    def accumulator(self) -> Tensor:
        """Returns the gradient so far, (rows, d) fp32, to add to."""
        if self.gradient is None:
            self.gradient = torch.zeros(self.rows, self.dims[-1], dtype=torch.float32, device=self.values.device)
        if self.row_coefficient is not None:
            self.gradient *= self.row_coefficient[:, None]
            self.row_coefficient = None
        return self.gradient

    def add_radial(self, part: Tensor, begin: int) -> None:
        """Adds radial parts of the rows from ``begin`` on, (splits, K, n)."""
        if self.radial is not None:
            self.radial[:, begin : begin + part.shape[2]] += part.sum(0)


def launch_norms_forward(
    documents: Operand, queries: Operand, offset: int, eps: float, positive: Tensor, zero_norm_gives_zero: bool
) -> None:
    """Computes the norms of documents and queries, and ``positive`` (K, N), that of query i and document offset + i."""
    launch(
        norms_forward,
        (cdiv(documents.rows, tiles.NORMS["BLOCK_ROWS"]),),
        config=tiles.NORMS,
        documents=documents.values,
        documents_stride=documents.values.stride(0),
        queries=queries.values,
        queries_stride=queries.values.stride(0),
        m=documents.rows,
        n=queries.rows,
        offset=offset,
        eps=eps,
        document_inverse_norms=documents.inverse_norms,
        query_inverse_norms=queries.inverse_norms,
        positive=positive,
        DIMS=documents.dims,
        ZERO_NORM_GIVES_ZERO=zero_norm_gives_zero,
    )


def finished_gradient(
    operand: Operand,
    partner: Operand | None,
    *,
    partner_begin: int = 0,
    offset: int = 0,
    d_positive: Tensor | None,
    positive: Tensor | None,
    eps: float,
    factor: float,
    factor_tensor: Tensor | None,
    width: int,
) -> Tensor:
    """Returns the gradient of an operand, (rows, width) fp32, with positive pairs, norms and common factor put in.

    Args:
        operand: The vectors.
        partner: Those of the other side of the positive pairs; None if the gradient has no positive pairs.
        partner_begin: The partner of pair 0.
        offset: The operand's vector of pair 0.
        d_positive: Gradient of the similarity of each pair, (K, N).
        positive: The similarity of each pair, (K, N).
        eps: The least norm.
        factor: Multiplies the gradient, together with ``factor_tensor``, (), if there is one.
        factor_tensor: See ``factor``.
        width: Of the embeddings; what lies beyond the longest prefix is 0.
    """
    coefficient, operand.row_coefficient = operand.row_coefficient, None
    gradient = operand.accumulator()
    partners = partner_inverse_norms = None
    if partner is not None:
        partners = partner.values[partner_begin:]
        if partner.inverse_norms is not None:
            partner_inverse_norms = partner.inverse_norms[:, partner_begin:]
    launch(
        norms_backward,
        (cdiv(operand.rows, tiles.NORMS["BLOCK_ROWS"]),),
        config=tiles.NORMS,
        gradient=gradient,
        gradient_stride=gradient.stride(0),
        row_coefficient=coefficient,
        x=operand.values,
        x_stride=operand.values.stride(0),
        inverse_norms=operand.inverse_norms,
        partners=partners,
        partners_stride=stride(partners),
        partner_inverse_norms=partner_inverse_norms,
        partner_inverse_norms_stride=stride(partner_inverse_norms),
        d_positive=None if partner is None else d_positive,
        positive=None if partner is None else positive,
        radial=operand.radial,
        rows=operand.rows,
        n=0 if d_positive is None else d_positive.shape[1],
        offset=offset,
        eps=eps,
        factor=factor,
        factor_tensor=factor_tensor,
        DIMS=operand.dims,
    )
    if operand.norms is not None:
        gradient /= operand.norms
    return gradient if gradient.shape[1] == width else torch.nn.functional.pad(gradient, (0, width - gradient.shape[1]))


def stride(tensor: Tensor | None) -> int:
    """Returns how far a tensor's rows are apart; 0 for None."""
    return 0 if tensor is None else tensor.stride(0)


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool, lift: int) -> None:
    """Adds 2^-lift a @ b to ``out`` (m, n) fp32 by the vendor's library; ``first``: it is written instead.

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
