"""Propagates the gradient of a loss back to the embeddings and no further, between the two passes of a cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..values import without_autocast


def backward_to_embeddings(loss: Tensor, embeddings: Sequence[Tensor]) -> Tensor:
    """Propagates the gradient of a loss back to its embeddings, and returns the loss detached from them.

    An embedding that is a leaf has its gradient in ``.grad`` afterwards; from any other it goes on into the caller's
    graph. The loss that is returned still carries the gradients of everything else in it that is learned (a scale, a
    weight). These are not accumulated here, because what multiplies the loss later is not known yet.

    Args:
        loss: ().
        embeddings: The embeddings, [n, ...] each.
    """
    wanted = [embedding for embedding in embeddings if embedding.requires_grad]
    ids = {id(embedding) for embedding in wanted}
    others = [leaf for leaf in leaves_of(loss, {rep.grad_fn for rep in wanted}) if id(leaf) not in ids]
    if not wanted and not others:
        loss.backward()  # raises torch's own error
    # The caller's autocast is meant for forward passes; here it would cast products that the loss computed in float32.
    with without_autocast(loss.device):
        gradients = torch.autograd.grad(loss, [*wanted, *others], allow_unused=True)
    found = [(rep, gradient) for rep, gradient in zip(wanted, gradients, strict=False) if gradient is not None]
    if found:
        torch.autograd.backward([rep for rep, _ in found], [gradient for _, gradient in found])
    loss = loss.detach()
    for leaf, gradient in zip(others, gradients[len(wanted) :], strict=True):
        if gradient is not None:
            loss = loss + ((leaf - leaf.detach()) * gradient).sum()
    return loss


def leaves_of(loss: Tensor, ends: Collection[Node | None] = ()) -> list[Tensor]:
    """Returns the leaves that a backward pass of a loss would reach, not going through the nodes ``ends``."""
    leaves: dict[int, Tensor] = {}
    seen = set(ends)
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = leaf
        nodes += [before for before, _ in node.next_functions]
    return list(leaves.values())
