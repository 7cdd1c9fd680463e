"""WeightedLoss: the weighted sum of several losses, from one encoding of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss
from sentence_transformers.sentence_transformer.losses import multiple_negatives_ranking as stock
from torch import Tensor, nn

from ..gradcache.options import Options
from ..gradcache.stage import backward_to_embeddings
from ..logs import described
from ..values import dry
from ._cached import GradientCached, check_splits
from ._components import ADDED, Components
from ._drop_in import keep_ours
from ._from_embeddings import cut_like, loss_from_embeddings
from ._learned import LearnsValues
from ._scale import as_scale, learnable
from ._weighted_checks import check_loss, check_name, check_weight


class WeightedLoss(GradientCached, CachedLossMixin, LearnsValues):
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
        losses: ``{name: (loss, weight)}``, at least one. A loss is one of this package, of sentence-transformers or
            of your own that needs the embeddings and the labels only; a dictionary that it returns counts as its sum.
            A weight is a finite number, or a tensor of one element: an ``nn.Parameter`` is learned, and its gradient
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
            embeddings and the labels (a guide, a gradient cache of its own, ...). That a loss reads the tokens shows
            at its first batch.
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
            raise ValueError(
                f"losses must be a dictionary {{name: (loss, weight)}} of at least one, got {described(losses)}."
            )
        for entry, value in losses.items():
            check_name(entry)
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                raise TypeError(f"losses[{entry!r}] must be (loss, weight), got {described(value)}.")
            check_loss(entry, value[0], model, name)
            check_weight(entry, value[1])
        self.uses_gradient_cache = mini_batch_size is not None or mini_batch_num_tokens is not None
        if self.uses_gradient_cache:
            check_splits(name, model, "leave mini_batch_size and mini_batch_num_tokens out")
        self.model = model
        self.losses = nn.ModuleDict({entry: loss for entry, (loss, _) in losses.items()})
        keep_ours(self.losses.values())
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

    def learned_values(self) -> dict[str, Tensor]:
        weights = {f"weights.{name}": weight for name, weight in self.weights.items() if learnable(weight)}
        return super().learned_values() | weights

    def __reduce_ex__(self, protocol: int) -> Any:
        keep_ours(self.losses.values())  # those that were put in later, too
        return super().__reduce_ex__(protocol)

    def component_names(self) -> list[str]:
        """Returns the names of the terms, which are the same ones in the same order for every batch.

        The Trainer gathers the terms over the ranks one after the other, and the ranks may have batches of different
        formats in one step.
        """
        return list(self.losses)

    def components(self, embeddings: list[Tensor], labels: Tensor | None) -> Mapping[str, Any]:
        """Returns the values by name, not weighted yet, from one column of embeddings [B, D] for each of the inputs.

        A subclass may compute several at once here, or leave out those that this batch has no use for, which are 0.
        """
        values = {}
        for name, loss in self.losses.items():
            try:
                values[name] = loss_from_embeddings(loss, self.model, embeddings, labels)
            except Exception as error:
                if hasattr(error, "add_note"):  # from Python 3.11 on
                    error.add_note(f"Raised by losses[{name!r}], a {type(loss).__name__}.")
                raise
        return values

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Components:
        labels = cut_like(labels, embeddings[0], self.model)
        values = {name: _value(name, value) for name, value in self.components(embeddings, labels).items()}
        absent = torch.zeros_like(next(iter(values.values())))
        return Components(
            {
                name: self._weight(name) * values[name] if name in values else absent.clone()
                for name in self.component_names()
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
            check_weight(name, weight)
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


def component_names(loss: Any) -> list[str]:
    """Returns the names of the terms that a loss gives, with those that a wrapper around it adds; [] of a scalar."""
    if isinstance(loss, WeightedLoss):
        return loss.component_names()
    names = component_names(loss.loss) if hasattr(loss, "loss") else []
    adds = isinstance(loss, AdaptiveLayerLoss) and loss.kl_temperature > 0
    return [*names, ADDED] if names and adds else names


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
