"""Computes a loss from embeddings that exist already, whether or not the loss has a method for that."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from .. import _stock


def parameters_of(loss: nn.Module) -> list[str] | None:
    """Returns the names of the arguments that a loss's ``compute_loss_from_embeddings`` needs.

    "labels" is among them if it has that argument at all. Returns None for a loss without such a method.
    """
    method = getattr(loss, "compute_loss_from_embeddings", None)
    if method is None:
        return None
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        parameter.name
        for parameter in inspect.signature(method).parameters.values()
        if parameter.name == "labels" or (parameter.default is parameter.empty and parameter.kind not in variable)
    ]


def takes_labels(loss: nn.Module) -> bool:
    """Returns True if a loss has ``compute_loss_from_embeddings(embeddings, labels)``."""
    parameters = parameters_of(loss)
    return parameters is not None and len(parameters) == 2 and parameters[1] == "labels"


def encoders_of(loss: nn.Module, model: nn.Module) -> list[str]:
    """Returns the names of a loss's attributes that hold the model, or any other model of sentence-transformers."""
    return [name for name, child in loss._modules.items() if child is model or isinstance(child, _stock.BaseModel)]


def loss_from_embeddings(loss: nn.Module, model: nn.Module, embeddings: list[Tensor], labels: Any) -> Any:
    """Returns what a loss gives for embeddings and labels.

    A loss without ``compute_loss_from_embeddings(embeddings, labels)`` runs its ``forward``, in which a stand-in for
    its model hands out these embeddings.

    Args:
        loss: The loss.
        model: The model that the loss would have encoded the columns with.
        embeddings: [B, D] for each column of the batch.
        labels: The labels, as the loss takes them.

    Raises:
        ValueError: ``forward`` reads more of the columns than their embeddings.
    """
    if takes_labels(loss):
        from_embeddings: Any = loss.compute_loss_from_embeddings
        return from_embeddings(list(embeddings), labels)
    name = type(loss).__name__
    (encoder,) = encoders_of(loss, model)
    kept = loss._modules[encoder]
    assert kept is not None  # encoders_of has looked at it
    loss._modules[encoder] = _standing_in(kept, name)
    try:
        # To merge columns, stock would read their features, and here are embeddings only.
        with _stock.column_merging_disabled():
            return loss([_Column(embedding, name) for embedding in embeddings], labels)
    finally:
        loss._modules[encoder] = kept


def cut_like(labels: Any, embeddings: Tensor, model: nn.Module) -> Any:
    """Returns labels that are embeddings, cut to the width of the given embeddings; any other labels as they are.

    MatryoshkaLoss cuts the embeddings. It does not cut labels in a gradient cache, nor labels [B, columns, D] before
    sentence-transformers 6.2.

    Args:
        labels: Labels of any kind. Those of shape [B, D] or [B, columns, D], D the width of the model's embeddings,
            count as embeddings.
        embeddings: [B, d], d <= D.
        model: The model.
    """
    width = embeddings.shape[-1]
    whole = getattr(model, "get_embedding_dimension", lambda: None)()
    if isinstance(labels, Tensor) and labels.dim() in (2, 3) and labels.shape[-1] == whole and width < whole:
        return labels[..., :width]
    return labels


class _Column(dict[str, Tensor]):
    """Stands for the features of a column of which only the embeddings [B, D] are known."""

    def __init__(self, embedding: Tensor, loss: str) -> None:
        super().__init__(sentence_embedding=embedding)
        self.loss = loss

    def __missing__(self, key: str) -> Tensor:
        raise ValueError(f"{self.loss} reads {key!r} of the texts, but a WeightedLoss has their embeddings only.")

    def get(self, key: str, default: Any = None) -> Tensor:
        return self[key]


def _standing_in(model: nn.Module, loss: str) -> nn.Module:
    """Returns a copy of a model whose forward pass hands out the embeddings that a :class:`_Column` holds."""

    def forward(features: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if not isinstance(features, _Column):
            raise ValueError(f"{loss} encodes texts of its own making, but a WeightedLoss has embeddings only.")
        return dict(features)

    module = model.__new__(type(model))
    # The model's hooks and its compiled form are not for this forward pass.
    replaced = {"forward": forward, "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    vars(module).update(vars(model) | replaced | {"_compiled_call_impl": None})
    return module
