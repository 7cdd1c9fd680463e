"""A training script of sentence-transformers with one line more: its loss becomes the fused one."""

import sbert_kernels

sbert_kernels.patch()  # before the script imports a loss

# --- from here on, the script as it was ---
from common import arguments, pairs, static_model
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

model = static_model()
loss = MultipleNegativesRankingLoss(model)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments(batch_size=1024, steps=20, learning_rate=0.05),
    train_dataset=pairs(4096),
    loss=loss,
)
trainer.train()
# --- the end of the script ---

print("the loss is the fused one:", sbert_kernels.is_patched(loss))
