"""Two processes that compare with each other's texts: a gradient cache and gather_across_devices=True.

    torchrun --nproc-per-node 2 examples/two_processes.py
    accelerate launch --num_processes 2 --use_deepspeed --zero_stage 2 examples/two_processes.py

Each process embeds its own half of the batch; the embeddings travel, so that every row has the negatives of both. The
gradients of all mini-batches are summed over the processes once a step, under DistributedDataParallel (the first line)
and DeepSpeed (the second).
"""

import torch.distributed as dist
from common import arguments, minilm, pairs, size
from sentence_transformers import SentenceTransformerTrainer

from sbert_kernels.losses import CachedMultipleNegativesRankingLoss

model = minilm()
loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=size(32, 4), gather_across_devices=True)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments(batch_size=128, steps=2, learning_rate=2e-5, ddp_backend="gloo"),
    train_dataset=pairs(2048),
    loss=loss,
)
trainer.train()
if dist.get_rank() == 0:
    rows = trainer.args.per_device_train_batch_size
    print(f"{dist.get_world_size()} processes, {rows} rows each, {dist.get_world_size() * rows} candidates a row")
dist.destroy_process_group()
