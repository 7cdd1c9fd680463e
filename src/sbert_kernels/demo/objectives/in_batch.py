"""In-batch negatives: each query is to find its own text, which held-out retrieval judges."""

from __future__ import annotations

from sentence_transformers import SentenceTransformer
from torch import nn

from sbert_kernels.demo.data import split_pairs
from sbert_kernels.demo.evaluation import Retrieval
from sbert_kernels.demo.objectives.base import Data, Objective
from sbert_kernels.workloads.losses import in_batch_loss
from sbert_kernels.workloads.models import dim_of
from sbert_kernels.workloads.recipes import SIDES
from sbert_kernels.workloads.texts import Pairs

MINI_BATCH_SIZE = 32  # of the cached loss


class InBatchObjective(Objective):
    """Trains with MultipleNegativesRankingLoss, within MatryoshkaLoss unless the loss is "mnr".

    A model with an encoder gets the cached one.
    """

    comparison = "the stock loss and with ours"

    def prepare(self, pairs: Pairs) -> Data:
        """Holds queries and distractors out, and returns the other pairs as rows."""
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
        """Returns the loss of one of ``SIDES``."""
        mini_batch_size = None if self.options.model == "static" else MINI_BATCH_SIZE
        dims = self.options.trained_dims(dim_of(model))
        return in_batch_loss(model, SIDES[side], dims, mini_batch_size)
