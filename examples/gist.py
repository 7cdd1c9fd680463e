"""GISTEmbedLoss: a guide decides which in-batch negatives are none.

The guide embeds the same texts. What it finds more similar to the anchor than the anchor's own positive is no negative.
"""

from common import arguments, minilm, pairs
from sentence_transformers import SentenceTransformerTrainer

from sbert_kernels.losses import GISTEmbedLoss

model = minilm()
guide = minilm()  # the model before the training; a larger model is the better guide
loss = GISTEmbedLoss(
    model,
    guide,
    temperature=0.05,
    margin_strategy="relative",
    margin=0.05,  # excluded is also what is up to 5% less similar than the positive
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments(batch_size=64, steps=5, learning_rate=2e-5),
    train_dataset=pairs(2048),
    loss=loss,
)
trainer.train()
print("loss of the last step:", round(trainer.state.log_history[-2]["loss"], 3))
