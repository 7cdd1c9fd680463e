"""In-batch negatives: each query is to find its own text, which held-out retrieval judges."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from sentence_transformers import SentenceTransformer
from torch import nn

from sbert_kernels.demo.data import Pairs, split_pairs
from sbert_kernels.demo.evaluation import Retrieval
from sbert_kernels.demo.objectives.base import SIDES, Data, Objective

MINI_BATCH_SIZE = 32  # of the cached loss


class MnrObjective(Objective):
    """MultipleNegativesRankingLoss; the cached one for a model with an encoder."""

    comparison = "the stock loss and with ours"

    def prepare(self, pairs: Pairs) -> Data:
        split = split_pairs(pairs.pairs, self.options.seed, self.defaults.held_out, self.defaults.distractors)
        self.require_rows(len(split.train), pairs)
        queries = len(split.queries)
        texts = queries + len(split.distractors)
        line = (
            f"{len(split.train):,} to train on; {queries:,} held-out queries, each to find its text among {texts:,} "
            "held-out texts"
        )
        return Data(
            rows=split.train,
            evaluation=Retrieval(split.queries, split.distractors),
            lines=(line,),
            facts={"train": len(split.train), "held_out_queries": queries, "held_out_texts": texts},
        )

    def loss(self, model: SentenceTransformer, side: str) -> nn.Module:
        mini_batch_size = None if self.options.model == "static" else MINI_BATCH_SIZE
        dims = self.options.matryoshka_dims(model.get_embedding_dimension())
        return build_loss(model, SIDES[side], dims, mini_batch_size)


def build_loss(
    model: SentenceTransformer, module: str, matryoshka_dims: Sequence[int] = (), mini_batch_size: int | None = None
) -> nn.Module:
    """MultipleNegativesRankingLoss from a module of ``SIDES``.

    The cached one if there is a mini-batch size, and within MatryoshkaLoss if there are dimensions for it.
    """
    losses = importlib.import_module(module)
    if mini_batch_size is None:
        loss = losses.MultipleNegativesRankingLoss(model)
    else:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size)
    return losses.MatryoshkaLoss(model, loss, list(matryoshka_dims)) if matryoshka_dims else loss
