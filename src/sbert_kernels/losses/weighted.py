"""WeightedLoss: the weighted sum of several losses, from one encoding of the batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import (
    CachedLossMixin,
    has_static_embedding_input,
    uses_gradient_cache,
)
from sentence_transformers.base.model import BaseModel
from sentence_transformers.sentence_transformer.losses import multiple_negatives_ranking as stock
from torch import Tensor, nn

from ..gradcache.options import Options
from ..gradcache.stage import backward_to_embeddings
from ..values import dry
from ._cached import GradientCached
from ._components import ADDED, Components
from ._scale import as_scale, learnable

# What the Trainer itself logs or counts beside the terms of a loss.
TAKEN = frozenset({"loss", "steps", "epoch", "grad_norm", "learning_rate", ADDED})


class WeightedLoss(GradientCached, CachedLossMixin, nn.Module):
    """The weighted sum of several losses, from one encoding of the batch.

    Each loss gets the same embeddings and the same labels. The result is a dictionary of the weighted terms: the
    Trainer sums them, and logs each under its name. MatryoshkaLoss, AdaptiveLayerLoss and Matryoshka2dLoss go around::

        loss = WeightedLoss(model, {
            "ranking": (MultipleNegativesRankingLoss(model), 1.0),
            "spread": (GlobalOrthogonalRegularizationLoss(model), 0.1),
        })
        loss = MatryoshkaLoss(model, loss, [512, 128])

    Args:
        model: The model that all the losses were built with.
        losses: ``{name: (loss, weight)}``, at least one. A loss is one of this package or of sentence-transformers that
            has ``compute_loss_from_embeddings(embeddings, labels)``; a dictionary that it returns counts as its sum. A
            weight is a finite number, or a tensor of one element: an ``nn.Parameter`` is learned, and its gradient
            averaged over the ranks.
        mini_batch_size: The batch is encoded in mini-batches of so many rows, by the gradient cache of the Cached
            losses: one cache, and two passes over the encoder, for all the losses. None encodes it in one piece. The
            terms must then be multiplied by one common factor, as the sum is; anything else raises in the backward
            pass.
        mini_batch_num_tokens: The same, in mini-batches of at most so many tokens.
        packing, unique_rows, activation_budget, show_progress_bar: Of that cache; see
            :class:`~sbert_kernels.gradcache.options.Options`.

    Raises:
        TypeError, ValueError: A name, a weight or a mini-batch that cannot be, or a loss that needs more than the
            embeddings and the labels (a guide, a gradient cache of its own, ...).
    """

    def __init__(
        self,
        model: SentenceTransformer,
        losses: Mapping[str, tuple[nn.Module, float | Tensor]],
        *,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        packing: str = "length",
        unique_rows: bool = False,
        activation_budget: int | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(losses, Mapping) or not losses:
            raise ValueError(f"losses must be a dictionary {{name: (loss, weight)}} of at least one, got {losses!r}.")
        for entry, value in losses.items():
            _check_name(entry)
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                raise TypeError(f"losses[{entry!r}] must be (loss, weight), got {value!r}.")
            _check_loss(entry, value[0], model, name)
            _check_weight(entry, value[1])
        self.uses_gradient_cache = mini_batch_size is not None or mini_batch_num_tokens is not None
        if self.uses_gradient_cache and has_static_embedding_input(model):
            raise ValueError(
                f"{name} cannot split the inputs of a model with a StaticEmbedding into mini-batches: leave "
                "mini_batch_size and mini_batch_num_tokens out."
            )
        self.model = model
        self.losses = nn.ModuleDict({entry: loss for entry, (loss, _) in losses.items()})
        # Moves and saves tensors, and leaves numbers what they are.
        self.weights = nn.ParameterDict({entry: _stored(weight) for entry, (_, weight) in losses.items()})
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar
        if self.uses_gradient_cache:
            self._set_cache_options(packing, unique_rows, activation_budget)
        elif given := Options(packing=packing, unique_rows=unique_rows, activation_budget=activation_budget).changed():
            raise ValueError(f"{name} without mini_batch_size has no gradient cache for {given} to apply to.")

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Components:
        sentence_features = list(sentence_features)
        with self.ids_of(sentence_features):
            if not self.uses_gradient_cache:
                embeddings = stock.embed_columns(self.model, sentence_features)
                return self.compute_loss_from_embeddings(embeddings, labels)
            found: list[Components] = []

            def stage(columns: list[Tensor], **backward: bool) -> Tensor:
                found.append(self.calculate_loss([[column] for column in columns], labels, **backward))
                return found[0].total()

            total = self.run_cached(sentence_features, stage)
            return found[0].driven_by(total)

    def components(self, embeddings: list[Tensor], labels: Tensor | None) -> Mapping[str, Any]:
        """The values by name, not weighted yet, from one column of embeddings [B, D] for each of the inputs.

        A subclass may compute several at once here, or leave out those that this batch has no use for.
        """
        return {name: loss.compute_loss_from_embeddings(list(embeddings), labels) for name, loss in self.losses.items()}

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Components:
        return Components(
            {
                name: self._weight(name) * _value(name, value)
                for name, value in self.components(embeddings, labels).items()
            }
        )

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Components:
        """The weighted terms of the whole batch from its mini-batches of embeddings; see the Cached losses of stock.

        With ``with_backward``, every mini-batch has the gradient of their sum in ``.grad`` afterwards, and the terms
        returned are detached from all of them; the first still carries the gradients of whatever else is learnable.
        """
        components = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if not with_backward:
            return components
        embeddings = [part for column in reps for part in column]
        return components.detached(backward_to_embeddings(components.total(), embeddings))

    @contextmanager
    def ids_of(self, sentence_features: Sequence[dict[str, Tensor]]) -> Iterator[None]:
        """Let the losses that compare texts see those of a batch, while its loss is computed."""
        with ExitStack() as stack:
            for loss in self.losses.values():
                if hasattr(loss, "ids_of"):
                    stack.enter_context(loss.ids_of(sentence_features))
            yield

    def _weight(self, name: str) -> float | Tensor:
        weight = self.weights[name]
        if not isinstance(weight, Tensor):
            _check_weight(name, weight)
        return as_scale(weight)

    def get_config_dict(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "losses": {
                name: {"class": type(loss).__name__, "weight": _plain(self.weights[name])}
                | _plain(getattr(loss, "get_config_dict", dict)())
                for name, loss in self.losses.items()
            }
        }
        for name in ("mini_batch_size", "mini_batch_num_tokens"):
            if getattr(self, name) is not None:
                config[name] = getattr(self, name)
        return config | (self.cache_options().changed() if self.uses_gradient_cache else {})

    @property
    def citation(self) -> str:
        """Those of the losses, each once; no attribute at all if none has one."""
        citations = [loss.citation for loss in self.losses.values() if hasattr(loss, "citation")]
        if not citations:
            raise AttributeError(f"no loss of this {type(self).__name__} has a citation.")
        return "".join(dict.fromkeys(citations))


def _value(name: str, value: Any) -> Tensor:
    """The value of a loss as a 0-d tensor."""
    if isinstance(value, Mapping):
        value = sum(value.values())
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"losses[{name!r}] must give a scalar, or a dictionary of scalars; got {shape}.")
    return value.reshape(())


def _stored(weight: float | Tensor) -> float | nn.Parameter:
    if not isinstance(weight, Tensor) or isinstance(weight, nn.Parameter):
        return weight
    return nn.Parameter(weight, requires_grad=False)


def _plain(value: Any) -> Any:
    """What a model card can write as JSON."""
    if isinstance(value, Tensor):
        if dry(value):
            return None
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, nn.Module):
        return type(value).__name__
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"losses must be named by strings that are not empty and hold no '.', got {name!r}.")
    if name in TAKEN or hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name):
        raise ValueError(f"losses cannot have the name {name!r}, which has a meaning to the Trainer or to torch.")


def _check_weight(name: str, weight: Any) -> None:
    if isinstance(weight, Tensor) and weight.numel() == 1:
        if learnable(weight) and not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"the weight of losses[{name!r}] is a tensor that requires a gradient but no nn.Parameter, so that no "
                "optimizer would find it: give nn.Parameter(weight)."
            )
        if dry(weight):
            return
        weight = weight.item()
    if not isinstance(weight, Real):
        raise TypeError(
            f"the weight of losses[{name!r}] must be a number or a tensor of one element, got "
            f"{list(weight.shape) if isinstance(weight, Tensor) else repr(weight)}."
        )
    if not math.isfinite(weight):
        raise ValueError(f"the weight of losses[{name!r}] must be finite, got {weight}.")


def _check_loss(name: str, loss: Any, model: nn.Module, owner: str) -> None:
    """A loss that needs the embeddings and the labels, and nothing else."""
    if not isinstance(loss, nn.Module):
        raise TypeError(f"losses[{name!r}] must be (loss, weight) with a loss that is an nn.Module, got {loss!r}.")
    what = f"losses[{name!r}] is a {type(loss).__name__}"
    if getattr(loss, "model", model) is not model:
        raise ValueError(f"{what} of another model: build it with the model that {owner} gets.")
    if uses_gradient_cache(loss):
        raise ValueError(
            f"{what}, which keeps a gradient cache of its own: give the loss without Cached in its name, and "
            f"mini_batch_size= to {owner}, which keeps one for all."
        )
    others = [key for key, child in loss._modules.items() if key != "model" and isinstance(child, BaseModel)]
    if others:
        raise ValueError(
            f"{what}, which asks a second model ({others[0]}) about the texts; {owner} has embeddings only."
        )
    method = getattr(loss, "compute_loss_from_embeddings", None)
    if method is None:
        if any(getattr(child, "model", None) is model for child in loss.children()):
            raise ValueError(f"{what}, which wraps another loss: put it around the {owner} instead.")
        raise ValueError(
            f"{what}, which has no compute_loss_from_embeddings(embeddings, labels): it needs more than embeddings."
        )
    parameters = list(inspect.signature(method).parameters.values())
    required = [
        p.name for p in parameters[2:] if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(parameters) < 2 or parameters[1].name != "labels" or required:
        raise ValueError(
            f"{what}, whose compute_loss_from_embeddings takes ({', '.join(p.name for p in parameters)}); wanted are "
            "(embeddings, labels)."
        )
