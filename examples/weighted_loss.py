"""WeightedLoss: several losses of one batch, which is encoded once. Written one after the other, each encodes anew.

Any loss that works on embeddings and labels can be a part, also one of sentence-transformers or of your own.
"""

from common import arguments, minilm, pairs, size
from sentence_transformers import SentenceTransformerTrainer

from sbert_kernels.losses import GlobalOrthogonalRegularizationLoss, MultipleNegativesRankingLoss, WeightedLoss

model = minilm()
loss = WeightedLoss(
    model,
    {
        "ranking": (MultipleNegativesRankingLoss(model), 1.0),
        "spread": (GlobalOrthogonalRegularizationLoss(model), 0.1),  # stock's own: spreads the embeddings out
    },
    mini_batch_size=size(16, 4),  # one gradient cache for both; leave it out to encode the batch in one piece
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments(batch_size=64, steps=5, learning_rate=2e-5),
    train_dataset=pairs(2048),
    loss=loss,
)
trainer.train()
# Each part is in the log under its name, already multiplied by its weight.
print({name: value for name, value in trainer.state.log_history[-2].items() if name in ("loss", "ranking", "spread")})
