"""MultipleNegativesRankingLoss on triplets: each anchor has a hard negative of its own, which a model has mined.

A hard negative is a text that looks like the positive and is none. ``duplicates="mask"`` leaves out in-batch negatives
whose text is the anchor's positive: with mined negatives the same text often stands in a batch twice.
"""

from common import arguments, minilm, pairs
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.util import mine_hard_negatives

from sbert_kernels.losses import MultipleNegativesRankingLoss

model = minilm()
triplets = mine_hard_negatives(
    pairs(512),
    model,
    range_min=1,  # the nearest text of all may be a second right answer
    range_max=10,
    num_negatives=1,
    sampling_strategy="top",
    output_format="triplet",
    verbose=False,
)
loss = MultipleNegativesRankingLoss(
    model,
    duplicates="mask",
    hardness_mode="hard_negatives",  # the more similar a hard negative is, the more it weighs
    hardness_strength=5.0,
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments(batch_size=32, steps=10, learning_rate=2e-5),
    train_dataset=triplets,
    loss=loss,
)
trainer.train()
print("columns:", triplets.column_names, "loss of the last step:", round(trainer.state.log_history[-2]["loss"], 3))
