"""A batch of 256 pairs in the memory of 32: CachedMultipleNegativesRankingLoss.

The batch goes through the encoder in mini-batches, twice. Rows are packed by their length, so that little of a
mini-batch is padding.
"""

from common import arguments, minilm, pairs, size
from sentence_transformers import SentenceTransformerTrainer

from sbert_kernels.losses import CachedMultipleNegativesRankingLoss

model = minilm()
loss = CachedMultipleNegativesRankingLoss(
    model,
    mini_batch_size=size(32, 4),
    show_progress_bar=True,  # one bar over the tokens of both passes
    # activation_budget="auto",  # on a GPU: keep as much of the first pass as fits, and embed only the rest twice
    # unique_rows=True,  # embed a text that stands in the batch several times only once
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments(batch_size=256, steps=2, learning_rate=2e-5),
    train_dataset=pairs(2048),
    loss=loss,
)
trainer.train()
print("loss of each step:", [round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry])
