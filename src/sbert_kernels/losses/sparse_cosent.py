"""SparseCoSENTLoss and SparseAnglELoss, for inside a SpladeLoss or CSRLoss, on the fused ranking operation."""

from __future__ import annotations

from sentence_transformers.sparse_encoder.losses import sparse_angle, sparse_cosent

from .cosent import CoSENTLoss


class SparseCoSENTLoss(sparse_cosent.SparseCoSENTLoss, CoSENTLoss):
    """Stock's SparseCoSENTLoss, as :class:`CoSENTLoss` computes it.

    Args:
        model: The sparse encoder, whose ``similarity_fn_name`` becomes "cosine".
        scale, similarity_fct: See :class:`CoSENTLoss`.
    """


class SparseAnglELoss(sparse_angle.SparseAnglELoss, SparseCoSENTLoss):
    """Stock's SparseAnglELoss, as :class:`CoSENTLoss` computes it.

    Args:
        model: The sparse encoder, whose ``similarity_fn_name`` becomes "cosine".
        scale: See :class:`CoSENTLoss`.
    """
