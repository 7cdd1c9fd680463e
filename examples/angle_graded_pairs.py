"""AnglEObjective on pairs with scores: cosine, angle and in-batch negatives from one encoding of the batch.

The scores are those of a teacher here, the cosine of all-MiniLM-L6-v2; with data such as STS they are people's.
"""

from common import arguments, minilm, size, static_model, text_pairs
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.util import pairwise_cos_sim

from sbert_kernels.losses import AnglEObjective

summaries, bodies = (list(column) for column in zip(*text_pairs(size(256, 16)), strict=True))
first = summaries * 2
second = bodies + bodies[1:] + bodies[:1]  # each summary with its own text, and with another one
teacher = minilm()
scores = pairwise_cos_sim(teacher.encode(first), teacher.encode(second))

model = static_model()
loss = AnglEObjective(
    model,
    cosine_weight=1.0,
    ibn_weight=1.0,
    angle_weight=1.0,
    positive_threshold=0.5,  # pairs with a higher score count as paraphrases in the in-batch term
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments(batch_size=256, steps=20, learning_rate=0.02),
    train_dataset=Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores.tolist()}),
    loss=loss,
)
trainer.train()
print({name: value for name, value in trainer.state.log_history[-2].items() if name in ("cosine", "in_batch", "angle")})
