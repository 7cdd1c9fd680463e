"""A scale (the inverse of the temperature) that is learned with the model, as CLIP does.

Adam moves a number by about its learning rate a step. A scale of 20 needs a higher one than the model's weights.
"""

import torch
from common import arguments, pairs, static_model
from sentence_transformers import SentenceTransformerTrainer

from sbert_kernels.losses import MultipleNegativesRankingLoss

model = static_model()
scale = torch.nn.Parameter(torch.tensor(20.0))
loss = MultipleNegativesRankingLoss(model, scale=scale)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments(
        batch_size=1024,
        steps=20,
        learning_rate=0.02,
        learning_rate_mapping={"scale$": 0.2},  # parameters whose name ends in "scale"
    ),
    train_dataset=pairs(4096),
    loss=loss,
)
trainer.train()
# The log shows it in each line, checkpoints keep it, and the model card names it.
print(f"the scale went from 20 to {scale.item():.2f}")
