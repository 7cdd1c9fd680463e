"""MatryoshkaLoss: embeddings whose first 32, 64, ... numbers are embeddings, too.

All widths are computed in one call: a narrow similarity is a partial sum of the widest one.
"""

from common import arguments, pairs, static_model
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.util import cos_sim

from sbert_kernels.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

DIMENSIONS = [512, 256, 128, 64, 32]

model = static_model(DIMENSIONS[0])
data = pairs(4096)
loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), DIMENSIONS)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments(batch_size=1024, steps=20, learning_rate=0.05),
    train_dataset=data,
    loss=loss,
)
trainer.train()

some = data[:64]
for width in DIMENSIONS:
    anchors = model.encode(some["anchor"], truncate_dim=width)
    positives = model.encode(some["positive"], truncate_dim=width)
    found = (cos_sim(anchors, positives).argmax(dim=1).numpy() == range(len(anchors))).mean()
    print(f"{width:4} dimensions: {found:.0%} of the anchors find their positive first")
