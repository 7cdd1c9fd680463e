"""SparseCoSENTLoss and SparseAnglELoss, for inside a SpladeLoss or CSRLoss, on the fused ranking operation."""

from __future__ import annotations

from sentence_transformers.sparse_encoder.losses import sparse_angle, sparse_cosent

from .cosent import CoSENTLoss


class SparseCoSENTLoss(sparse_cosent.SparseCoSENTLoss, CoSENTLoss):
    """Stock's SparseCoSENTLoss (see there for the arguments), as :class:`CoSENTLoss` computes it."""


class SparseAnglELoss(sparse_angle.SparseAnglELoss, SparseCoSENTLoss):
    """Stock's SparseAnglELoss (see there for the arguments), as :class:`CoSENTLoss` computes it."""
