"""WeightedLoss: the weighted sum of several losses, from one encoding of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, SupportsIndex

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss
from torch import Tensor, nn

from .._stock import CachedLossMixin
from .._stock import multiple_negatives_ranking as stock_module
from ..gradcache.loss_stage import backward_to_embeddings
from ..gradcache.options import Options
from ..logs import described
from ..values import dry
from ._components import ADDED, Components
from ._drop_in import keep_ours
from ._from_embeddings import cut_like, loss_from_embeddings
from ._gradient_cache import GradientCached, check_splits
from ._learned import LearnsValues
from ._scale import as_scale, learnable
from ._weighted_checks import check_loss, check_name, check_weight


class WeightedLoss(GradientCached, CachedLossMixin, LearnsValues):
    """Is the weighted sum of several losses, from one encoding of the batch.

    Use it to train with two objectives at once: a ranking loss with a regulariser, say, or scores and in-batch
    negatives of the same data. Every loss gets the same embeddings and the same labels, so a second loss costs next to
    nothing. The result is a dictionary of the weighted terms: the Trainer sums them, and logs each under its name.
    sentence-transformers has no such loss.

    Inputs:
        +---------------------------------------------+---------------------------------------------+
        | Texts                                       | Labels                                      |
        +=============================================+=============================================+
        | any columns that all of the losses take     | any labels that all of the losses take      |
        +---------------------------------------------+---------------------------------------------+

    Args:
        model: The model that all the losses were built with.
        losses: ``{name: (loss, weight)}``, at least one. A loss is one of this package, of sentence-transformers or
            of your own that needs only the embeddings and the labels; a dictionary that it returns counts as its sum.
            A weight is a finite number, or a tensor of one element: an ``nn.Parameter`` is learned, and its gradient
            averaged over the ranks.
        mini_batch_size: None encodes the batch in one piece. A number encodes it through the gradient cache of the
            Cached losses, as there: one cache, and two passes over the encoder, for all the losses. The terms may then
            be multiplied by one common factor only, as the sum is; different factors raise in the backward pass.
        mini_batch_num_tokens: The same, in mini-batches of at most so many tokens.
        packing, unique_rows, activation_budget, show_progress_bar: Options of that cache; see
            :class:`~sbert_kernels.gradcache.options.Options`.

    Raises:
        TypeError, ValueError: A name, a weight or a mini-batch is not as above, or a loss needs more than the
            embeddings and the labels (a guide, a gradient cache of its own, ...). A loss that reads the tokens raises
            at its first batch.

    Recommendations:
        - MatryoshkaLoss, AdaptiveLayerLoss and Matryoshka2dLoss go around a WeightedLoss, not into it.
        - Look at the terms in the first lines of the log before you choose the weights.

    Example:
        ::

            loss = losses.WeightedLoss(model, {
                "ranking": (losses.MultipleNegativesRankingLoss(model), 1.0),
                "spread": (losses.GlobalOrthogonalRegularizationLoss(model), 0.1),
            })
            loss = losses.MatryoshkaLoss(model, loss, [512, 128])
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
        """Returns the weighted terms of a batch; the Trainer sums them.

        Args:
            sentence_features: The features of each column of texts.
            labels: The labels, as the losses take them.
        """
        sentence_features = list(sentence_features)
        with self.ids_of(sentence_features):
            if not self.uses_gradient_cache:
                embeddings = stock_module.embed_columns(self.model, sentence_features)
                return self.compute_loss_from_embeddings(embeddings, labels)
            found: list[Components] = []

            def stage(columns: list[Tensor], **backward: bool) -> Tensor:
                found.append(self.calculate_loss([[column] for column in columns], labels, **backward))
                return found[0].total()

            total = self.run_cached(sentence_features, stage)
            return found[0].driven_by(total)

    def learned_values(self) -> dict[str, Tensor]:
        """Returns the values that are learned, by name: the weights that require a gradient."""
        weights = {f"weights.{name}": weight for name, weight in self.weights.items() if learnable(weight)}
        return super().learned_values() | weights

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        keep_ours(self.losses.values())  # also those that were put in after __init__
        return super().__reduce_ex__(protocol)

    def component_names(self) -> list[str]:
        """Returns the names of the terms, the same names in the same order for every batch.

        The Trainer needs that: it gathers the terms over the ranks one after the other, and in one step the ranks may
        have batches of different formats.
        """
        return list(self.losses)

    def components(self, embeddings: list[Tensor], labels: Tensor | None) -> Mapping[str, Any]:
        """Returns the values of the losses by name, not weighted yet.

        A subclass may compute several at once here. It may leave out a loss that this batch has no data for; its term
        is then 0.

        Args:
            embeddings: [B, D] for each column of texts.
            labels: The labels of the batch.
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
        """Returns the weighted terms from the embeddings [B, D] of each column, and the labels."""
        labels = cut_like(labels, embeddings[0], self.model)
        values = {name: _value(name, value) for name, value in self.components(embeddings, labels).items()}
        absent = torch.zeros_like(next(iter(values.values())))
        return Components(
            {
                name: self._weight(name) * values[name] if name in values else absent.clone()
                for name in self.component_names()
            }
        )

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Any:
        """Returns the weighted terms of the whole batch, as :class:`Components`, from its mini-batches of embeddings.

        Args:
            reps: For each column, the embeddings [n, D] of each mini-batch.
            labels: The labels of the batch.
            with_backward: True leaves the gradient of the sum of the terms in ``.grad`` of every mini-batch, and
                detaches the terms from them. The first term still carries the gradients of learned weights and scales.
        """
        components = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if not with_backward:
            return components
        embeddings = [part for column in reps for part in column]
        return components.detached(backward_to_embeddings(components.total(), embeddings))

    @contextmanager
    def ids_of(self, sentence_features: Sequence[dict[str, Tensor]]) -> Iterator[None]:
        """Keeps the ids of a batch's texts for a block that computes its loss, for the losses that compare texts."""
        with ExitStack() as stack:
            for loss in self.losses.values():
                ids_of: Any = getattr(loss, "ids_of", None)
                if ids_of is not None:
                    stack.enter_context(ids_of(sentence_features))
            yield

    def _weight(self, name: str) -> float | Tensor:
        """Returns a weight as it is now, checked, since a user may have assigned to it."""
        weight = self.weights[name]
        if not isinstance(weight, Tensor):
            check_weight(name, weight)
        return as_scale(weight)

    def get_config_dict(self) -> dict[str, Any]:
        """Returns the configuration for the model card: each loss with its weight, and the options of the cache."""
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
        """Returns the citations of the losses, each once.

        Raises:
            AttributeError: No loss has one, so that ``hasattr`` is False, as the model card expects.
        """
        citations = [str(loss.citation) for loss in self.losses.values() if hasattr(loss, "citation")]
        if not citations:
            raise AttributeError(f"no loss of this {type(self).__name__} has a citation.")
        return "".join(dict.fromkeys(citations))


def component_names(loss: Any) -> list[str]:
    """Returns the names of the terms that a loss gives, with that of a wrapper around it; [] if it gives a scalar."""
    if isinstance(loss, WeightedLoss):
        return loss.component_names()
    names = component_names(loss.loss) if hasattr(loss, "loss") else []
    adds = isinstance(loss, AdaptiveLayerLoss) and loss.kl_temperature > 0
    return [*names, ADDED] if names and adds else names


def _value(name: str, value: Any) -> Tensor:
    """Returns the value of the loss of that name, a scalar or a dictionary of scalars, as one 0-d tensor."""
    if isinstance(value, Mapping):
        value = sum(value.values())
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"losses[{name!r}] must give a scalar, or a dictionary of scalars; got {shape}.")
    return value.reshape(())


def _stored(weight: float | Tensor) -> float | nn.Parameter:
    """Returns a weight as a ParameterDict holds it: a tensor that is no parameter as one that is not learned."""
    if not isinstance(weight, Tensor) or isinstance(weight, nn.Parameter):
        return weight
    return nn.Parameter(weight, requires_grad=False)


def _plain(value: Any) -> Any:
    """Returns a value in a form that a model card can write as JSON."""
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
