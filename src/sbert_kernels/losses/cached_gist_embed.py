"""CachedGISTEmbedLoss: sentence-transformers' gradient cache with a fused loss stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import cached_gist_embed as stock
from torch import Tensor

from ._prefixes import WHOLE, Prefixes
from ._scale import backward_to_reps, learnable, plain_scale, with_scale_gradient
from ._serving import serves
from .gist_embed import changed_computation, guided_loss


class CachedGISTEmbedLoss(stock.CachedGISTEmbedLoss):
    """Stock's CachedGISTEmbedLoss (see there for the arguments) with a fused loss stage.

    The loss stage is one call over the whole batch, without chunks, and gathers across devices once.
    """

    def serves(self) -> bool:
        """Whether the fused operation computes the loss stage; see :func:`._serving.serves`."""
        new_options = {"temperature": "learnable"} if learnable(self.temperature) else None
        return serves(self, changed_computation(self, stock.CachedGISTEmbedLoss), new_options)

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        reps_guided: list[list[Tensor]],
        *,
        with_backward: bool = False,
        prefixes: Prefixes = WHOLE,
    ) -> Tensor:
        """The loss of the whole batch from its mini-batches of embeddings and of the guide's; see stock."""
        if prefixes is WHOLE and not self.serves():
            return super().calculate_loss(reps, reps_guided, with_backward=with_backward)
        if len(reps) != len(reps_guided):
            raise ValueError("reps and reps_guided must have the same length")
        columns = [torch.cat(column) for column in reps]
        guide_columns = [torch.cat(column) for column in reps_guided]
        loss = guided_loss(self, columns, guide_columns, stock, prefixes)
        return backward_to_reps(loss, reps, self.temperature) if with_backward else loss

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return with_scale_gradient(self, self.temperature, super().forward, sentence_features, labels)

    def get_config_dict(self) -> dict[str, Any]:
        return plain_scale(super().get_config_dict())
