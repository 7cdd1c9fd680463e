"""How well a model finds the text that belongs to a query, among held-out texts: ST's own retrieval evaluator."""

from __future__ import annotations

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from sbert_kernels.demo.data import Split

METRICS = ("mrr@10", "recall@1", "recall@10")


def evaluate(model: SentenceTransformer, split: Split) -> dict[str, float]:
    """``METRICS`` of cosine retrieval of the held-out queries' own texts among those texts and the distractors."""
    texts = [text for _, text in split.queries] + split.distractors
    evaluator = InformationRetrievalEvaluator(
        queries={str(i): query for i, (query, _) in enumerate(split.queries)},
        corpus={str(i): text for i, text in enumerate(texts)},
        relevant_docs={str(i): {str(i)} for i in range(len(split.queries))},
        main_score_function="cosine",
    )
    scores = evaluator(model)
    return {metric: scores[f"cosine_{metric}"] for metric in METRICS}
