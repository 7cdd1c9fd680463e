"""How well a model finds the text that belongs to a query, among held-out texts: ST's own retrieval evaluator."""

from __future__ import annotations

from collections.abc import Sequence

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from sbert_kernels.demo.data import Split

METRICS = ("mrr@10", "recall@1", "recall@10")


def evaluate(model: SentenceTransformer, split: Split, matryoshka_dims: Sequence[int] = ()) -> dict[str, float]:
    """``METRICS`` of cosine retrieval of the held-out queries' own texts among those texts and the distractors.

    For each of ``matryoshka_dims`` below the model's, the first metric of embeddings cut to it, too.
    """
    dim = model.get_embedding_dimension()
    scores = dict(zip(METRICS, _retrieve(model, split, dim), strict=True))
    for smaller in matryoshka_dims:
        if smaller < dim:
            scores[f"{METRICS[0]}, {smaller} dims"], *_ = _retrieve(model, split, smaller)
    return scores


def _retrieve(model: SentenceTransformer, split: Split, dim: int) -> list[float]:
    texts = [text for _, text in split.queries] + split.distractors
    evaluator = InformationRetrievalEvaluator(
        queries={str(i): query for i, (query, _) in enumerate(split.queries)},
        corpus={str(i): text for i, text in enumerate(texts)},
        relevant_docs={str(i): {str(i)} for i in range(len(split.queries))},
        main_score_function="cosine",
        truncate_dim=dim,
    )
    scores = evaluator(model)
    return [scores[f"cosine_{metric}"] for metric in METRICS]
