"""The loss between the two passes: back-propagated to the embeddings, and no further."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..values import without_autocast


def backward_to_embeddings(loss: Tensor, embeddings: Sequence[Tensor]) -> Tensor:
    """Back-propagate a loss up to its embeddings; return it detached from them.

    Embeddings that are leaves find their gradient in ``.grad``; to others it goes on into the caller's graph. The loss
    returned still carries the gradients of whatever else it was made of that is learnable (a scale, a weight), which
    must not be accumulated here: what multiplies the loss is not known yet.
    """
    wanted = [embedding for embedding in embeddings if embedding.requires_grad]
    ids = {id(embedding) for embedding in wanted}
    own = [leaf for leaf in leaves_of(loss, {rep.grad_fn for rep in wanted}) if id(leaf) not in ids]
    if not wanted and not own:
        loss.backward()  # torch says what is missing
    # The caller's autocast is for forward passes: here it would cast products that the loss has computed in fp32.
    with without_autocast(loss.device):
        gradients = torch.autograd.grad(loss, [*wanted, *own], allow_unused=True)
    found = [(rep, gradient) for rep, gradient in zip(wanted, gradients, strict=False) if gradient is not None]
    if found:
        torch.autograd.backward(*map(list, zip(*found, strict=True)))
    loss = loss.detach()
    for leaf, gradient in zip(own, gradients[len(wanted) :], strict=True):
        if gradient is not None:
            loss = loss + ((leaf - leaf.detach()) * gradient).sum()
    return loss


def leaves_of(loss: Tensor, ends: Collection[Node | None] = ()) -> list[Tensor]:
    """The leaves that a backward pass of a loss would reach, not going through the nodes ``ends``."""
    leaves: dict[int, Tensor] = {}
    seen = {None, *ends}
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = leaf
        nodes += [before for before, _ in node.next_functions]
    return list(leaves.values())
