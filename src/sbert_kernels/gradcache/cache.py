"""GradCache: the gradient cache around a user's own loss function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..logs import described
from .engine import cached_loss
from .loss_stage import backward_to_embeddings
from .options import Options
from .packing import MiniBatch
from .padded import Column

Outputs = Tensor | tuple[Tensor, ...]


class GradCache:
    """Computes a user's loss of a large batch in the encoder memory of a mini-batch (GradCache)::

        cache = GradCache(model, loss_fn, mini_batch_size=32)
        for columns in batches:
            cache(columns).backward()
            optimizer.step()

    The batch is encoded twice, mini-batch by mini-batch: once to compute the loss of all its embeddings, and once in
    the backward pass. Use it for a training loop of one's own, with any encoder of torch, when the encoder's
    activations limit the batch.

    The gradients are those of ``loss_fn([encode(model, column) for column in columns])``, whatever the options, and
    parameters of the loss itself get theirs too. ``loss_fn`` may compare all rows of the batch. A gradient scaler,
    gradient accumulation and training on several ranks need no change. The rows of the encoder must not depend on each
    other or on their padding (otherwise see ``packing``).

    **Token embeddings** (late interaction) [n, tokens, D] are as wide as the longest text of their mini-batch. The
    loss gets those of a column as [B, T, D], where T is the widest; narrower ones are filled up with zeros. The mask
    says which of them are tokens: return it beside them, and it is filled up alike::

        def encode(bert, features):
            return bert(**features).last_hidden_state, features["attention_mask"]

        def loss_fn(embeddings):
            (queries, query_mask), (documents, document_mask) = embeddings  # [B, T, D] and [B, T] each

    Args:
        encoders: The module that encodes every column, or a sequence of modules, one for each column (a query tower and
            a document tower; the same module may stand there twice). Each may be wrapped for distributed training.
        loss_fn: ``loss_fn(embeddings, *args, **kwargs)`` returns a scalar. ``embeddings`` is a list of what ``encode``
            returns for each column, [B, ...], in the order of its rows.
        mini_batch_size, mini_batch_num_tokens: See :class:`~sbert_kernels.gradcache.options.Options`; or a sequence
            with one for each encoder, as in ``mini_batch_size=(32, 8)``.
        packing, unique_rows, activation_budget, show_progress_bar: See
            :class:`~sbert_kernels.gradcache.options.Options`.
        encode: ``encode(encoder, features)`` returns the embeddings [n, ...] of a mini-batch, or a tuple of several
            tensors with n rows each; the loss then gets a tuple too. The second dimension may differ between
            mini-batches, of every tensor of a tuple and of a tensor with three or more dimensions. By default it is
            ``encoder(features)``, or ``encoder(**features)`` if the encoder's ``forward`` has arguments of these names;
            if that returns a dictionary, its "sentence_embedding" is taken, as in sentence-transformers.

    Raises:
        ValueError, TypeError: An option is not as above.

    Source:
        Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv 2101.06983.
    """

    def __init__(
        self,
        encoders: nn.Module | Sequence[nn.Module],
        loss_fn: Callable[..., Tensor],
        *,
        mini_batch_size: int | Sequence[int] = 32,
        mini_batch_num_tokens: int | Sequence[int] | None = None,
        packing: str = "length",
        unique_rows: bool = False,
        activation_budget: int | str | None = None,
        show_progress_bar: bool = False,
        encode: Callable[[nn.Module, Any], Outputs] | None = None,
    ) -> None:
        several = not isinstance(encoders, nn.Module) and isinstance(encoders, Iterable)
        # Looked at before it is known that these are modules.
        modules: list[Any] = [encoders] if isinstance(encoders, nn.Module) or not several else list(encoders)
        if not modules or not all(isinstance(module, nn.Module) for module in modules):
            got = described(encoders)
            raise TypeError(f"encoders must be an nn.Module or a sequence of them, one a column, got {got}.")
        self.encoders: nn.Module | list[nn.Module] = encoders if isinstance(encoders, nn.Module) else modules
        self.loss_fn = loss_fn
        self.encode = encode or call
        count = len(modules) if several else None
        sizes = _one_each("mini_batch_size", mini_batch_size, count)
        tokens = _one_each("mini_batch_num_tokens", mini_batch_num_tokens, count)
        # One for each encoder. They differ only in the size of a mini-batch.
        self.options = [
            Options(size, most, packing, unique_rows, activation_budget, show_progress_bar)
            for size, most in zip(sizes, tokens, strict=True)
        ]

    def __call__(self, columns: Sequence[Column], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss () of a batch; its ``backward()`` encodes the batch once more.

        Args:
            columns: For each column one dictionary of features, or one tensor. The first dimension of every tensor is
                the rows; lists, tuples and arrays with as many entries have one for each row. Features with an
                ``attention_mask`` [rows, length] are packed by length. Nothing of them is changed.
            args, kwargs: Further arguments of the loss.

        Raises:
            TypeError: The columns are no sequence, or an encoder returns no tensor.
            ValueError: A column cannot be cut into rows, or the loss does not use it.
        """
        if isinstance(columns, (Mapping, Tensor)) or not isinstance(columns, Iterable):
            raise TypeError(
                f"the columns of a batch must be one sequence, got a {type(columns).__name__}: write "
                "cache([queries, documents]), or cache([queries]) for one column, and further arguments of the loss "
                "after it."
            )
        columns = list(columns)
        single = isinstance(self.encoders, nn.Module)
        encoders = [self.encoders] * len(columns) if isinstance(self.encoders, nn.Module) else self.encoders
        options = self.options * len(columns) if single else self.options
        if not columns or len(encoders) != len(columns):
            wanted = "at least one" if single else f"{len(encoders)}, one an encoder"
            raise ValueError(f"columns must be {wanted}, got {len(columns)}.")
        for position, column in enumerate(columns):
            _check_column(position, column)
        # By column: makes what the loss gets of the column's tensors.
        make: dict[int, Callable[[list[Tensor]], Outputs]] = {}

        def embed(mini_batch: MiniBatch, first: bool) -> list[Tensor]:
            positions = mini_batch.pool.columns
            encoder = encoders[positions[0]]
            tensors, make_output = _tensors(encoder, self.encode(encoder, mini_batch.features()))
            make.update(dict.fromkeys(positions, make_output))
            return tensors

        def stage(outputs: list[list[Tensor]]) -> Tensor:
            embeddings = [make[position](tensors) for position, tensors in enumerate(outputs)]
            loss = self.loss_fn(embeddings, *args, **kwargs)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"loss_fn must return a scalar, got {got}.")
            loss = loss.reshape(())
            every = [tensor for tensors in outputs for tensor in tensors]
            return backward_to_embeddings(loss, every) if torch.is_grad_enabled() else loss

        pad = [pad_token_id(encoder) for encoder in encoders]
        limits = [option.limits for option in options]
        return cached_loss(embed, encoders, columns, stage, self.options[0], pad, limits=limits)


def call(encoder: nn.Module, features: Any) -> Any:
    """Returns what an encoder gives for features, which go by name if its ``forward`` has arguments of these names."""
    if isinstance(features, Mapping) and _takes_by_name(encoder, features):
        return encoder(**features)
    return encoder(features)


def pad_token_id(encoder: nn.Module) -> int | None:
    """Returns the token id that an encoder's tokenizer or configuration names for padding, or None."""
    encoder = unwrapped(encoder)
    for owner in ("tokenizer", "config"):
        found = getattr(getattr(encoder, owner, None), "pad_token_id", None)
        if isinstance(found, int):
            return found
    return None


def unwrapped(encoder: Any) -> Any:
    """Returns an encoder without the wrappers of distributed training and ``torch.compile`` around it."""
    for wrapper in ("_orig_mod", "module", "_orig_mod"):
        encoder = getattr(encoder, wrapper, encoder)
    return encoder


def _takes_by_name(encoder: Any, features: Mapping[str, Any]) -> bool:
    """Returns True if an encoder has an argument for each feature, as the models of transformers have.

    The models of sentence-transformers take one dictionary instead.
    """
    signature = inspect.signature(encoder.forward)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        # A wrapper of torch or of peft hands on whatever it is given.
        inside = (getattr(encoder, name, None) for name in ("_orig_mod", "module", "base_model", "model"))
        inner = next((module for module in inside if isinstance(module, nn.Module) and module is not encoder), None)
        return inner is not None and _takes_by_name(inner, features)
    try:
        signature.bind(**features)
    except TypeError:
        return False
    return not signature.parameters.keys().isdisjoint(features)


def _tensors(encoder: nn.Module, output: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Outputs]]:
    """Returns the tensors of an encoder's output, and a function that makes of such tensors what the loss gets.

    Raises:
        TypeError: The output is neither a tensor nor a tuple of tensors.
    """
    name = type(unwrapped(encoder)).__name__
    if isinstance(output, Mapping):
        if "sentence_embedding" not in output:
            example = "last_hidden_state[:, 0]" if "last_hidden_state" in output else next(iter(output), "name")
            raise TypeError(
                f"give GradCache encode=lambda encoder, features: encoder(**features).{example}, or a masked mean, or "
                f"a tuple of several tensors: {name} returned {list(output)} ({type(output).__name__}), and nothing "
                "says which of them is the embedding."
            )
        output = output["sentence_embedding"]
    if isinstance(output, Tensor):
        return [output], lambda tensors: tensors[0]
    if isinstance(output, (tuple, list)) and output and all(isinstance(entry, Tensor) for entry in output):
        return list(output), getattr(type(output), "_make", tuple)
    got = type(output).__name__
    if isinstance(output, (tuple, list)):
        got = f"a {got} of {[type(entry).__name__ for entry in output]}"
    raise TypeError(
        f"an encoder must return a tensor, a tuple of tensors, or a dictionary with 'sentence_embedding'; {name} gave "
        f"{got}. Take from it what the loss needs: GradCache(..., encode=lambda encoder, features: ...)."
    )


def _one_each(name: str, value: Any, encoders: int | None) -> list[Any]:
    """Returns a list of an option for each encoder, given one value or a sequence.

    Args:
        name: The name of the option, for errors.
        value: What the user has given.
        encoders: The number of encoders; None if one module encodes every column.

    Raises:
        ValueError: There is not one value for each encoder.
    """
    if not isinstance(value, (tuple, list)):
        return [value] * (encoders or 1)
    if encoders is None:
        raise ValueError(
            f"{name}={value!r} has one for each of several encoders, but one module embeds every column: give a "
            "number, or the encoders as a sequence, as in [model, model]."
        )
    if len(value) != encoders:
        raise ValueError(f"{name} must be a number, or {encoders} of them, one an encoder; got {value!r}.")
    return list(value)


def _check_column(position: int, column: Any) -> None:
    """Raises TypeError or ValueError unless a column is a tensor with rows, or a dictionary that holds one."""
    if isinstance(column, Tensor):
        if not column.ndim:
            raise ValueError(f"columns[{position}] must have rows, got a tensor without dimensions.")
        return
    if not isinstance(column, Mapping):
        raise TypeError(
            f"columns[{position}] must be a dictionary of features or a tensor, got {type(column).__name__}."
        )
    if not any(isinstance(value, Tensor) and value.ndim for value in column.values()):
        raise ValueError(f"columns[{position}] holds no tensor with rows, only {sorted(column)}.")
