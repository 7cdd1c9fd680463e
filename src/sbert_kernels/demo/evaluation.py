"""Scores of a model on held-out texts, by the evaluators of sentence-transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)

from sbert_kernels.workloads.models import dim_of
from sbert_kernels.workloads.texts import Pair, Row


class Evaluation(ABC):
    """Scores a model by ``metrics``, from cosines of its embeddings."""

    metrics: tuple[str, ...]
    label: str  # of what is held out
    title: str  # of the panel that shows the scores

    def __call__(self, model: SentenceTransformer, matryoshka_dims: Sequence[int] = ()) -> dict[str, float]:
        """Returns the scores, and the first metric of embeddings cut to each smaller one of ``matryoshka_dims``."""
        dim = dim_of(model)
        scores = dict(zip(self.metrics, self._scores(model, dim), strict=True))
        for smaller in matryoshka_dims:
            if smaller < dim:
                scores[f"{self.metrics[0]}, {smaller} dims"], *_ = self._scores(model, smaller)
        return scores

    @abstractmethod
    def _scores(self, model: SentenceTransformer, dim: int) -> list[float]:
        """Returns the scores by ``metrics`` of embeddings that are cut to ``dim``."""


class Retrieval(Evaluation):
    """Scores how well queries find their own text among those of all queries and the distractors."""

    metrics = ("mrr@10", "recall@1", "recall@10")
    label = "held-out queries"

    def __init__(self, queries: Sequence[Pair], distractors: Sequence[str]) -> None:
        self.queries = queries
        self.texts = [text for _, text in queries] + list(distractors)
        self.title = f"Held-out retrieval: {len(queries):,} queries, {len(self.texts):,} texts"

    def _scores(self, model: SentenceTransformer, dim: int) -> list[float]:
        evaluator = InformationRetrievalEvaluator(
            queries={str(i): query for i, (query, _) in enumerate(self.queries)},
            corpus={str(i): text for i, text in enumerate(self.texts)},
            relevant_docs={str(i): {str(i)} for i in range(len(self.queries))},
            main_score_function="cosine",
            truncate_dim=dim,
        )
        scores = evaluator(model)
        return [scores[f"cosine_{metric}"] for metric in self.metrics]


class Correlation(Evaluation):
    """Scores how well the cosines of pairs follow the pairs' own scores."""

    metrics = ("spearman", "pearson")
    label = "held-out scores"

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.title = f"Correlation with held-out scores: {len(rows):,} pairs"

    def _scores(self, model: SentenceTransformer, dim: int) -> list[float]:
        first, second, scores = map(list, zip(*self.rows, strict=True))
        evaluator = EmbeddingSimilarityEvaluator(first, second, scores, main_similarity="cosine", truncate_dim=dim)
        found = evaluator(model)
        return [float(found[f"{metric}_cosine"]) for metric in self.metrics]
