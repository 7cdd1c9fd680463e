"""The vectors of a call as the kernels read them, and the gradients that are summed up for them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launching import Prepared, cdiv
from ..layout import with_unit_stride
from . import tiles
from .arguments import Side
from .norms import norms_backward, norms_forward
from .plan import OperandPlan, Plan, joined_dtype


class Operand:
    """Holds a set of vectors, the inverse norms of their prefixes, and the gradient of their dot products."""

    def __init__(
        self, parts: tuple[Tensor, ...], plan: OperandPlan, dims: tuple[int, ...], inverse_norms: Tensor | None
    ) -> None:
        vectors = parts[0].detach()
        if len(parts) > 1:
            dtype = joined_dtype(parts)
            vectors = torch.cat([part.detach() if part.dtype == dtype else part.detach().to(dtype) for part in parts])
        self.norms: Tensor | None = None  # (rows, 1): what the vectors were divided by
        if plan.unit_length:
            norms = torch.linalg.vector_norm(vectors[:, : dims[-1]].float(), dim=1, keepdim=True)
            self.norms = torch.where(norms == 0, 1.0, norms)
            vectors = vectors.float() / self.norms
        if vectors.dtype != plan.dtype:
            vectors = vectors.to(plan.dtype)
        self.vectors = with_unit_stride(vectors)  # (rows, D)
        self.stride = self.vectors.stride(0)
        self.plan, self.rows, self.need, self.dims = plan, plan.rows, plan.need, dims
        self.inverse_norms = inverse_norms  # (K, rows) fp32, written by `Norms`; None: dot products
        device = self.vectors.device
        self.radial = torch.zeros((len(dims), plan.rows), device=device) if plan.radial else None
        self.gradient: Tensor | None = None  # (rows, d) fp32
        if plan.need:
            create = torch.zeros if plan.zeroed else torch.empty
            self.gradient = create((plan.rows, dims[-1]), dtype=torch.float32, device=device)
        # (rows,): with the inverse norm, what the gradient is still to be multiplied by; if `plan.rows_alone`.
        self.row_coefficient: Tensor | None = None

    def side(self, begin: int, end: int) -> Side:
        """Returns some of the vectors as the kernels take them."""
        if begin == 0 and end == self.rows:
            return Side(self.vectors, self.stride, self.inverse_norms, self.rows)
        norms = None if self.inverse_norms is None else self.inverse_norms[:, begin:end]
        return Side(self.vectors[begin:end], self.stride, norms, self.rows)

    def summed(self) -> Tensor:
        """Returns the gradient so far, (rows, d) fp32."""
        assert self.gradient is not None  # the plan says that it is needed
        return self.gradient

    def add_radial(self, part: Tensor, begin: int) -> None:
        """Adds radial parts of the rows from ``begin`` on, (splits, K, n)."""
        if self.radial is not None:
            self.radial[:, begin : begin + part.shape[2]] += part.sum(0)


class Norms:
    """Knows the launch that reads queries and documents once, for their norms and the positive pairs' similarities."""

    def __init__(
        self,
        plan: Plan,
        documents: OperandPlan,
        queries: OperandPlan,
        offset: int,
        dims: tuple[int, ...],
        zero_norm_gives_zero: bool,
    ) -> None:
        config = tiles.rows_config(plan.target)
        self.start = Prepared(
            norms_forward,
            (cdiv(documents.rows, config["BLOCK_ROWS"]),),
            config=config,
            m=documents.rows,
            n=queries.rows,
            offset=offset,
            eps=plan.eps,
            DIMS=dims,
            ZERO_NORM_GIVES_ZERO=zero_norm_gives_zero,
        )

    def __call__(self, documents: Operand, queries: Operand, positive: Tensor) -> None:
        """Computes the norms, and ``positive`` (K, N), the similarity of query i and document offset + i."""
        self.start(
            documents=documents.vectors,
            documents_stride=documents.stride,
            queries=queries.vectors,
            queries_stride=queries.stride,
            document_inverse_norms=documents.inverse_norms,
            query_inverse_norms=queries.inverse_norms,
            positive=positive,
        )


class Finish:
    """Knows the launch that finishes the gradient of an operand: positive pairs, norms and common factors.

    Args:
        plan: The call's.
        operand: The operand's.
        partner: Name of the operand on the other side of the positive pairs; None if the gradient has none.
        partner_begin: The partner of pair 0.
        offset: The operand's vector of pair 0.
    """

    def __init__(self, plan: Plan, operand: OperandPlan, partner: str | None, partner_begin: int, offset: int) -> None:
        self.partner, self.partner_begin, self.width = partner, partner_begin, plan.width
        self.paired = partner is not None and "d_positive" in plan.d_positives
        config = tiles.rows_config(plan.target)
        self.start = Prepared(
            norms_backward,
            (cdiv(operand.rows, config["BLOCK_ROWS"]),),
            config=config,
            gradient_stride=plan.dims[-1],
            rows=operand.rows,
            n=plan.n if self.paired else 0,
            offset=offset,
            eps=plan.eps,
            LIFT=plan.gradient_lift,
            DIMS=plan.dims,
        )

    def __call__(
        self,
        operands: dict[str, Operand],
        name: str,
        d_positive: Tensor | None,
        positive: Tensor,
        factor: float,
        factor_tensor: Tensor | None,
    ) -> Tensor:
        """Returns the gradient of an operand, (rows, width) fp32.

        Args:
            operands: All vectors.
            name: Of the operand.
            d_positive: Gradient of the similarity of each pair, (K, N).
            positive: The similarity of each pair, (K, N).
            factor: Multiplies the gradient, together with ``factor_tensor``, (), if there is one.
            factor_tensor: See ``factor``.
        """
        operand = operands[name]
        gradient = operand.summed()
        partners = None
        if self.paired and self.partner is not None:
            partner = operands[self.partner]
            partners = partner.side(self.partner_begin, partner.rows)
        self.start(
            gradient=gradient,
            row_coefficient=operand.row_coefficient,
            x=operand.vectors,
            x_stride=operand.stride,
            inverse_norms=operand.inverse_norms,
            partners=None if partners is None else partners.vectors,
            partners_stride=0 if partners is None else partners.stride,
            partner_inverse_norms=None if partners is None else partners.inverse_norms,
            partner_inverse_norms_stride=0 if partners is None else partners.norms_stride,
            d_positive=None if partners is None else d_positive,
            positive=None if partners is None else positive,
            radial=operand.radial,
            factor=factor,
            factor_tensor=factor_tensor,
        )
        if operand.norms is not None:
            gradient /= operand.norms
        beyond = self.width - gradient.shape[1]  # entries beyond the longest prefix
        return torch.nn.functional.pad(gradient, (0, beyond)) if beyond else gradient
