"""A loop of your own: GradCache around contrastive_loss, without the Trainer.

GradCache embeds the batch in mini-batches; the gradients are those of the whole batch.
"""

import torch
from common import minilm, pairs, size

from sbert_kernels import GradCache, contrastive_loss

model = minilm()
data = pairs(2048)
batch_size = size(128, 16)
log_scale = torch.nn.Parameter(torch.tensor(20.0).log())  # learned, and positive whatever happens to it
optimizer = torch.optim.AdamW(
    [{"params": model.parameters(), "lr": 2e-5}, {"params": [log_scale], "lr": 1e-2, "weight_decay": 0.0}]
)


def loss_of(embeddings: list[torch.Tensor]) -> torch.Tensor:
    """Returns the loss of a whole batch: one tensor [B, D] of embeddings for each column."""
    queries, documents = embeddings
    return contrastive_loss(queries, documents, scale=log_scale.exp(), directions=("query_to_doc", "doc_to_query"))


cache = GradCache(model, loss_of, mini_batch_size=size(16, 4))
model.train()
for step in range(size(3, 2)):
    rows = data[step * batch_size : (step + 1) * batch_size]
    loss = cache([model.preprocess(rows["anchor"]), model.preprocess(rows["positive"])])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}, scale {log_scale.exp().item():.2f}")
