"""SparseCoSENTLoss and SparseAnglELoss, for inside a SpladeLoss or CSRLoss, on the fused ranking operation."""

from __future__ import annotations

from sentence_transformers.sparse_encoder.losses import SparseAnglELoss as StockSparseAnglELoss
from sentence_transformers.sparse_encoder.losses import SparseCoSENTLoss as StockSparseCoSENTLoss

from .cosent import CoSENTLoss


class SparseCoSENTLoss(StockSparseCoSENTLoss, CoSENTLoss):
    """Is :class:`CoSENTLoss` for sparse encoders; it goes into a ``SpladeLoss`` or a ``CSRLoss``.

    Inputs:
        +------------------------+---------------------------------------------+
        | Texts                  | Labels                                      |
        +========================+=============================================+
        | (text_A, text_B) pairs | a number for each pair, larger for more     |
        |                        | similar texts                               |
        +------------------------+---------------------------------------------+

    Args:
        model: The sparse encoder, whose ``similarity_fn_name`` becomes "cosine".
        scale, similarity_fct: See :class:`CoSENTLoss`.

    Example:
        ::

            model = SparseEncoder("distilbert/distilbert-base-uncased")
            loss = SpladeLoss(model, losses.SparseCoSENTLoss(model), document_regularizer_weight=5e-5)
    """


class SparseAnglELoss(StockSparseAnglELoss, SparseCoSENTLoss):
    """Is :class:`AnglELoss` on pairs, for sparse encoders; it goes into a ``SpladeLoss`` or a ``CSRLoss``.

    Inputs:
        +------------------------+---------------------------------------------+
        | Texts                  | Labels                                      |
        +========================+=============================================+
        | (text_A, text_B) pairs | a number for each pair, larger for more     |
        |                        | similar texts                               |
        +------------------------+---------------------------------------------+

    Args:
        model: The sparse encoder, whose ``similarity_fn_name`` becomes "cosine".
        scale: See :class:`CoSENTLoss`.

    Example:
        ::

            loss = SpladeLoss(model, losses.SparseAnglELoss(model), document_regularizer_weight=5e-5)
    """
