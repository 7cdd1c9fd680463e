"""Two processes that compare with each other's texts: gather_across_devices=True.

    torchrun --nproc-per-node 2 examples/two_processes.py

Each process embeds its own half of the batch; the embeddings travel, so that every row has the negatives of both.
"""

import torch.distributed as dist
from common import arguments, pairs, static_model
from sentence_transformers import SentenceTransformerTrainer

from sbert_kernels.losses import MultipleNegativesRankingLoss

model = static_model()
loss = MultipleNegativesRankingLoss(model, gather_across_devices=True)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments(batch_size=512, steps=10, learning_rate=0.05, ddp_backend="gloo"),
    train_dataset=pairs(4096),
    loss=loss,
)
trainer.train()
if dist.get_rank() == 0:
    rows = trainer.args.per_device_train_batch_size
    print(f"{dist.get_world_size()} processes, {rows} rows each, {dist.get_world_size() * rows} candidates a row")
dist.destroy_process_group()
