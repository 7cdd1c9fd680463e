"""A loss computed from embeddings that exist already, whether or not it has a method for that."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

from sentence_transformers.base.losses.merged_forward import column_merging_disabled
from sentence_transformers.base.model import BaseModel
from torch import Tensor, nn


def parameters_of(loss: nn.Module) -> list[str] | None:
    """The names that its ``compute_loss_from_embeddings`` must be given, and "labels" if it may; None without one."""
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
    """Whether a loss has ``compute_loss_from_embeddings(embeddings, labels)``."""
    parameters = parameters_of(loss)
    return parameters is not None and len(parameters) == 2 and parameters[1] == "labels"


def encoders_of(loss: nn.Module, model: nn.Module) -> list[str]:
    """The attributes of a loss that hold the model, or any other of sentence-transformers that encodes texts."""
    return [name for name, child in loss._modules.items() if child is model or isinstance(child, BaseModel)]


def loss_from_embeddings(loss: nn.Module, model: nn.Module, embeddings: list[Tensor], labels: Any) -> Any:
    """What a loss gives for one column of embeddings [B, D] for each input, and the labels.

    A loss without ``compute_loss_from_embeddings(embeddings, labels)`` runs its ``forward``, in which its model hands
    out these embeddings.

    Args:
        model: The model that the loss would have encoded the columns with.

    Raises:
        ValueError: ``forward`` reads more of the columns than their embeddings.
    """
    if takes_labels(loss):
        return loss.compute_loss_from_embeddings(list(embeddings), labels)
    name = type(loss).__name__
    (encoder,) = encoders_of(loss, model)
    kept = loss._modules[encoder]
    loss._modules[encoder] = _standing_in(kept, name)
    try:
        # Columns that are merged are put together from their features.
        with column_merging_disabled():
            return loss([_Column(embedding, name) for embedding in embeddings], labels)
    finally:
        loss._modules[encoder] = kept


def cut_like(labels: Any, embeddings: Tensor, model: nn.Module) -> Any:
    """Labels that are whole embeddings, as wide as embeddings that MatryoshkaLoss has cut; any others as they are.

    It cuts the labels itself from sentence-transformers 6.2 on, but not those that a gradient cache has kept.
    """
    width = embeddings.shape[-1]
    whole = getattr(model, "get_embedding_dimension", lambda: None)()
    if isinstance(labels, Tensor) and labels.dim() in (2, 3) and labels.shape[-1] == whole and width < whole:
        return labels[..., :width]
    return labels


class _Column(dict[str, Tensor]):
    """The features of a column, of which there is the embedding [B, D] alone."""

    def __init__(self, embedding: Tensor, loss: str) -> None:
        super().__init__(sentence_embedding=embedding)
        self.loss = loss

    def __missing__(self, key: str) -> Tensor:
        raise ValueError(f"{self.loss} reads {key!r} of the texts, but a WeightedLoss has their embeddings only.")

    def get(self, key: str, default: Any = None) -> Tensor:
        return self[key]


def _standing_in(model: nn.Module, loss: str) -> nn.Module:
    """A module that hands out the embeddings of columns that have them, and in everything else is the model."""

    def forward(features: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if not isinstance(features, _Column):
            raise ValueError(f"{loss} encodes texts of its own making, but a WeightedLoss has embeddings only.")
        return dict(features)

    module = model.__new__(type(model))
    # Its hooks and its compiled form belong to the encoder, which does not run.
    own = {"forward": forward, "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    vars(module).update(vars(model) | own | {"_compiled_call_impl": None})
    return module
