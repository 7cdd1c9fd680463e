"""Holds every use of what sentence-transformers does not document, and of what differs between its versions.

All other modules of this package import from sentence-transformers only what its packages export, such as
``SentenceTransformer``, ``util.cos_sim`` and the classes of ``sentence_transformer.losses``. Whatever else is needed is
imported here, is described in :data:`NAMES`, and is taken from here. tests/test_stock.py holds both rules.

To support a new version of sentence-transformers, read :data:`NAMES` beside its source, then run tests/test_stock.py
and tests/losses with it. Which versions are taken at all is decided in :mod:`sbert_kernels.versions`.

This module stands beside ``losses`` and not inside of it, because ``gradcache``, on which ``losses`` builds, needs it
too.
"""

from __future__ import annotations

from . import versions  # noqa: F401  first: it says which sentence-transformers is wanted

# isort: split
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sentence_transformers.base.losses import (
    CachedLossMixin,
    column_merging_disabled,
    has_static_embedding_input,
    uses_gradient_cache,
)
from sentence_transformers.base.losses.gradcache import _create_minibatch, _get_batch_size, _minibatch_ranges
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.trainer import BaseTrainer
from sentence_transformers.sentence_transformer.losses import (
    cached_gist_embed,
    cached_multiple_negatives_ranking,
    gist_embed,
    matryoshka,
    multiple_negatives_ranking,
)
from torch import Tensor, nn

__all__ = [
    "NAMES",
    "BaseModel",
    "BaseTrainer",
    "CachedLossMixin",
    "Name",
    "after_prepare_loss",
    "cached_gist_embed",
    "cached_multiple_negatives_ranking",
    "column_merging_disabled",
    "cut_rows",
    "delegated_options",
    "deprecation_of",
    "described_data_sets",
    "gist_embed",
    "has_static_embedding_input",
    "matryoshka",
    "mini_batch_ranges",
    "multiple_negatives_ranking",
    "row_count",
    "summed_components",
    "uses_gradient_cache",
    "widened",
]


class Name(NamedTuple):
    """Describes one undocumented name of sentence-transformers.

    Attributes:
        name: The name, with its path below ``sentence_transformers``.
        since: The first supported version that has it, and what has changed in it since.
        use: What it is, and what this package uses it for.
    """

    name: str
    since: str
    use: str


_LOSSES = "sentence_transformer.losses"
_GRADCACHE = "base.losses.gradcache"
_TRAINER = "base.trainer.BaseTrainer"

NAMES = (
    # Modules. A script or a test may replace what they hold, so it is looked up in them at every call.
    Name(
        f"{_LOSSES}.multiple_negatives_ranking",
        "6.0",
        "The module of MultipleNegativesRankingLoss. The drop-ins call its embed_columns, all_gather_with_grad and "
        "get_rank.",
    ),
    Name(
        f"{_LOSSES}.cached_multiple_negatives_ranking",
        "6.0",
        "The module of CachedMultipleNegativesRankingLoss. The drop-in calls its all_gather_with_grad and get_rank.",
    ),
    Name(
        f"{_LOSSES}.gist_embed",
        "6.0",
        "The module of GISTEmbedLoss. The drop-in calls its embed_columns, all_gather_with_grad and get_rank.",
    ),
    Name(
        f"{_LOSSES}.cached_gist_embed",
        "6.0",
        "The module of CachedGISTEmbedLoss. The drop-in calls its all_gather_with_grad and get_rank.",
    ),
    Name(
        f"{_LOSSES}.matryoshka.CachedLossDecorator",
        "6.0",
        "What MatryoshkaLoss puts around calculate_loss of a loss with a gradient cache. Ours computes all prefixes in "
        "one call.",
    ),
    Name(
        f"{_LOSSES}.multiple_negatives_ranking.embed_columns",
        "6.0",
        "Embeds the columns of a batch, in one forward pass where they are alike. The drop-ins embed with it.",
    ),
    Name(
        f"{_LOSSES}.cached_multiple_negatives_ranking.CachedMultipleNegativesRankingLoss._delegated_to_wrapped_loss",
        "6.0",
        "The attributes that are assigned to the inner loss instead. The drop-in adds its own options.",
    ),
    Name(
        f"{_LOSSES}.multiple_negatives_symmetric_ranking.MultipleNegativesSymmetricRankingLoss.__deprecated__",
        "6.0",
        "The text of its deprecation, which its drop-in repeats. So does that of the cached one.",
    ),
    # The gradient cache.
    Name(
        "base.losses.CachedLossMixin",
        "6.0",
        "The base of all losses with a gradient cache. The new Cached losses have it too, so that wrappers know them.",
    ),
    Name(
        "base.losses.uses_gradient_cache",
        "6.0",
        "Returns True for a loss with a gradient cache. A WeightedLoss refuses one, as it keeps one cache for all.",
    ),
    Name(
        "base.losses.has_static_embedding_input",
        "6.0; since 6.2 it also looks inside of a model compiled by torch",
        "Returns True if a model embeds with a StaticEmbedding, whose inputs no gradient cache can cut.",
    ),
    Name(
        f"{_GRADCACHE}._get_batch_size",
        "6.0",
        "Returns the number of rows of a column of features. The gradient cache counts with it.",
    ),
    Name(
        f"{_GRADCACHE}._minibatch_ranges",
        "6.0",
        "Returns the ranges of rows of the mini-batches. The gradient cache uses it for rows in the order they come.",
    ),
    Name(
        f"{_GRADCACHE}._create_minibatch",
        "6.0; since 6.2 it cuts images that are counted by sample, and leaves out those of rows without any",
        "Cuts a range of rows out of a column, flattened inputs and images too. The gradient cache uses it likewise.",
    ),
    # Models and Trainers.
    Name(
        "base.losses.column_merging_disabled",
        "6.0",
        "Makes embed_columns embed each column alone. A WeightedLoss hands embeddings to a loss under it.",
    ),
    Name("base.model.BaseModel", "6.0", "The base of all models. A WeightedLoss finds the encoders of a loss by it."),
    Name(
        f"{_TRAINER}.prepare_loss",
        "6.0",
        "Is called by a Trainer for each loss that it is given. From then on the values that the loss learns are kept.",
    ),
    Name(
        f"{_TRAINER}.track_loss_components",
        "6.0",
        "Adds the terms of a loss to the Trainer's accum_loss_components, which the first batch on every rank has to "
        "hold alike: see summed_components.",
    ),
)


def widened(value: Any) -> Any:
    """Returns a value as it is, for an argument of stock that takes more than its annotation says.

    Those are labels that are None, a scale that is a tensor, and options that are strings of any origin.
    """
    return value


def row_count(column: Mapping[str, Any]) -> int:
    """Returns the number of rows of a column of features, padded or flattened."""
    return _get_batch_size(dict(column))


def mini_batch_ranges(column: Mapping[str, Any], rows: int | None, tokens: int | None) -> list[tuple[int, int]]:
    """Returns (begin, end) of each of stock's mini-batches of a column.

    Args:
        column: The features.
        rows: The rows of a mini-batch; may be None if ``tokens`` is given.
        tokens: The most tokens of a mini-batch, padding not counted, or None.
    """
    return _minibatch_ranges(dict(column), rows or 0, tokens)


def cut_rows(column: Mapping[str, Any], begin: int, end: int) -> dict[str, Any]:
    """Returns the features of the rows ``begin`` to ``end`` of a column, as stock cuts them: views, not copies."""
    features = _create_minibatch(dict(column), begin, end)
    # Before 6.2 rows without an image were given images of no patches, which encoders do not expect.
    for key in ("image_grid_thw", "pixel_values", "video_grid_thw", "pixel_values_videos"):
        if isinstance(features.get(key), Tensor) and not len(features[key]):
            del features[key]
    return features


def delegated_options(loss_class: type[nn.Module]) -> tuple[str, ...]:
    """Returns the names of the attributes that a loss with an inner loss assigns to that one."""
    return tuple(vars(loss_class)["_delegated_to_wrapped_loss"])


def deprecation_of(loss_class: type[nn.Module]) -> str:
    """Returns the text with which a class of stock's is deprecated."""
    return str(vars(loss_class)["__deprecated__"])


def after_prepare_loss(follow: Callable[[BaseTrainer, nn.Module], None]) -> None:
    """Has ``follow(trainer, loss)`` called whenever a Trainer, of any kind, has taken in a loss.

    Trainers call ``self.prepare_loss``, and hand out no event for it, so the method of their common base is wrapped.
    """
    prepare = BaseTrainer.prepare_loss

    @functools.wraps(prepare)
    def prepare_loss(self: BaseTrainer, loss: Any, model: Any) -> nn.Module:
        prepared = prepare(self, loss, model)
        follow(self, prepared)
        return prepared

    setattr(BaseTrainer, "prepare_loss", prepare_loss)  # noqa: B010  a type checker takes no method for assignable


def summed_components(trainer: BaseTrainer) -> dict[str, Tensor]:
    """Returns the sums that a Trainer keeps of the terms of its training losses, by name, to be changed in place."""
    return trainer.accum_loss_components["train"]


def described_data_sets(trainer: BaseTrainer) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Yields the training and the evaluation data of a Trainer, each with what the model card says of its data sets."""
    data: Any = trainer.model.model_card_data
    yield trainer.train_dataset, data.train_datasets
    yield trainer.eval_dataset, data.eval_datasets
