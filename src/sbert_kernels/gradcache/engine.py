"""Runs the gradient cache (Gao et al. 2021, arXiv 2101.06983): a loss of a whole batch in the memory of a mini-batch.

1. Encode the batch mini-batch by mini-batch, without graphs.
2. Compute the loss of all embeddings, and its gradients with respect to them: the cache.
3. In the backward pass, encode each mini-batch once more, with a graph, and propagate its part of the cache through it.

Step 3 repeats step 1 exactly: the same rows, dropout masks and precision (:mod:`replay`). Rows are grouped by their
length (:mod:`packing`). Graphs that fit into a budget are kept from step 1 and not made again (:mod:`activations`). On
several ranks the gradients are summed once (:mod:`sync`). All that a step remembers belongs to that step, so two
forward passes may come before a backward pass, and two backward passes may follow one forward pass.

In memory at a time are the activations of one mini-batch or those that are kept, the embeddings and their gradients,
and for each mini-batch the state of the random generators (5 kB). If DistributedDataParallel has to see every parameter
at once, or DeepSpeed, they are the activations of one mini-batch of each pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..logs import log_once
from ..values import dry
from .activations import ActivationBudget, budget_bytes
from .loss_stage import leaves_of
from .options import Options
from .outputs import Output, gradients_of_rows, put
from .packing import Limits, MiniBatch, Pool, Sliced, make_pools
from .padded import Column
from .replay import RandomState, Surroundings, devices_of
from .sync import GradientSync, most_of_all_ranks

logger = logging.getLogger(__name__)

# Encodes a mini-batch of n rows. Returns [n, ...] each: embeddings, and whatever else the loss needs of the rows.
Embed = Callable[[MiniBatch, bool], Sequence[Tensor]]


def cached_loss(
    embed: Embed,
    encoders: Sequence[nn.Module],
    columns: Sequence[Column],
    stage: Callable[..., Tensor],
    options: Options,
    pad: Sequence[int | None] = (),
    *,
    limits: Sequence[Limits] = (),
    trained: int | None = None,
) -> Tensor:
    """Returns the loss () of a batch; its backward pass encodes the batch once more.

    Args:
        embed: ``embed(mini_batch, first)`` runs the encoder and returns its outputs. ``first`` is False in the second
            pass, where only the trained outputs are needed.
        encoders: The module that encodes each column.
        columns: The features of each column.
        stage: ``stage(columns)`` returns the loss () from the outputs of each column, [B, ...] each. If gradients are
            enabled, it leaves those of the trained outputs in their ``.grad``. The loss may still carry gradients of
            parameters of its own.
        options: The user's options.
        pad: The token id that the tokenizer of each column's encoder pads with, if it is known.
        limits: The most of one mini-batch for each column; if empty, what the options say.
        trained: The first so many outputs get gradients, unless they are integers. None: all of them.

    Raises:
        ValueError: A column is empty, or the loss does not use it.
    """
    step = _Step(embed, encoders, columns, options, pad, limits or [options.limits] * len(columns), trained)
    if not torch.is_grad_enabled():
        return stage(step.embed_all(record=False))
    outputs = step.embed_all(record=True)
    embeddings = [column[:trained] for column in outputs]
    for output in (output for column in embeddings for output in column):
        output.requires_grad_(output.is_floating_point() or output.is_complex())
    loss = stage(outputs)
    unused = [
        str(position) for position, column in enumerate(embeddings) if all(output.grad is None for output in column)
    ]
    if unused:
        raise ValueError(
            f"The loss computation did not use input column(s) {', '.join(unused)}: their embeddings received no "
            "gradient. Every input column is embedded (twice, with gradient caching), so remove the unused column(s) "
            "from the dataset instead."
        )
    step.cache([[output.grad for output in column] for column in embeddings])
    ids = {id(output) for column in embeddings for output in column}
    if any(id(leaf) in ids for leaf in leaves_of(loss)):
        # A user's stage has called backward() on the loss that it returns, so the graph is used up.
        loss = loss.detach()
    loss = loss.clone() if loss.requires_grad else loss.detach().requires_grad_()
    loss.register_hook(step.replay)
    # With DeepSpeed on a tensor of its own: it registers a hook that has to run before ours, at the loss that it is
    # given.
    return loss.clone() if any(encoder.sync.engines for encoder in step.encoders) else loss


@dataclass(eq=False)
class _Part:
    """Holds a mini-batch of a step, and what is needed to encode it once more.

    Attributes:
        mini_batch: The rows.
        pool: The number of their pool.
        counts: False if it is encoded only because other ranks have more mini-batches.
        keep: True if its graph is to be kept whatever the budget says.
        random_state: The random generators before the first pass; set if there is a second one.
        kept: The trained outputs with their graph, if it was kept.
    """

    mini_batch: MiniBatch
    pool: int
    counts: bool = True
    keep: bool = False
    random_state: RandomState | None = None
    kept: Sequence[Tensor] | None = None


@dataclass(eq=False)
class _Encoder:
    """Holds a module that encodes columns, and its parts of a step in the order of the first pass."""

    module: nn.Module
    sync: GradientSync
    parts: list[_Part] = field(default_factory=list)

    def may_be_kept(self) -> list[_Part]:
        """Returns the parts whose graphs may be kept: not those that a wrapper has to run in the second pass."""
        last = self.last_parts()
        return [] if self.sync.in_step else [part for part in self.parts if part not in last]

    def last_parts(self) -> list[_Part]:
        """Returns the parts whose backward pass sums gradients over the ranks; it reaches every parameter in use."""
        if not self.sync.wrapped:
            return []
        last_of_pool = {part.pool: part for part in self.parts}
        return list(last_of_pool.values()) if self.sync.counts_all_parameters else self.parts[-1:]


class _Step:
    """Runs one batch from its features to its gradients."""

    def __init__(
        self,
        embed: Embed,
        encoders: Sequence[nn.Module],
        columns: Sequence[Column],
        options: Options,
        pad: Sequence[int | None],
        limits: Sequence[Limits],
        trained: int | None,
    ) -> None:
        self._embed = embed
        self._trained = trained
        self._show = options.show_progress_bar
        modules = {id(module): module for module in encoders}
        numbers = {key: number for number, key in enumerate(modules)}
        self.encoders = [_Encoder(module, GradientSync(module)) for module in modules.values()]
        if options.unique_rows and any(_has_active_dropout(module) for module in modules.values()):
            log_once(logger, "unique_rows=True: rows that are equal share one dropout mask, as they are encoded once.")
        if options.activation_budget and any(encoder.sync.in_step for encoder in self.encoders):
            log_once(logger, "activation_budget: none are kept of an encoder that is sharded over ranks.")
        of_column = [numbers[id(module)] for module in encoders]
        self._columns = len(columns)
        tensors = [value for column in columns for value in _tensors(column)]
        packing, unique_rows = options.packing, options.unique_rows
        if dry(*tensors):
            # Without data nothing tells which rows are long, or equal.
            packing, unique_rows = "none", False
        try:
            self.pools = make_pools(
                columns,
                of_column,
                limits,
                packing=packing,
                unique_rows=unique_rows,
                pad=pad,
            )
        except MemoryError as error:
            # In torch's words, which tools that look for the largest batch wait for.
            raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: {error or 'for packing'}") from error
        self._devices = devices_of(modules.values(), tensors)
        self._surroundings = Surroundings(modules.values(), self._devices)
        self._budget = ActivationBudget(budget_bytes(options.activation_budget, self._devices), list(modules.values()))
        self._gradients: list[list[Tensor | None]] = []
        self._versions: list[int] = []
        for number, pool in enumerate(self.pools):
            encoder = self.encoders[of_column[pool.columns[0]]]
            encoder.parts += [_Part(mini_batch, number) for mini_batch in pool.mini_batches]
        for encoder in self.encoders:
            if encoder.sync.in_step:
                encoder.parts = self._as_many_as_other_ranks(encoder)
        if options.activation_budget is None:
            self._keep_the_end(self.encoders[-1])

    def _keep_the_end(self, encoder: _Encoder) -> None:
        """Marks the last mini-batches to keep their graphs, as many as together are no larger than one may be.

        They take no extra memory: the second pass runs them first, and then needs as much for each of the others.
        """
        pool = encoder.parts[-1].pool
        left = self.pools[pool].budget
        for part in reversed(encoder.may_be_kept()):
            left -= part.mini_batch.tokens
            if part.pool != pool or left < 0:
                return
            part.keep = True

    def _as_many_as_other_ranks(self, encoder: _Encoder) -> list[_Part]:
        """Returns the parts of a sharded encoder, with the last of a pool repeated until all ranks have as many."""
        pools: dict[int, list[_Part]] = {}
        for part in encoder.parts:
            pools.setdefault(part.pool, []).append(part)
        device = next(encoder.module.parameters()).device
        most = most_of_all_ranks([len(parts) for parts in pools.values()], device)
        return [
            part
            for parts, count in zip(pools.values(), most, strict=True)
            for part in (
                *parts,
                *(_Part(parts[-1].mini_batch, parts[-1].pool, counts=False) for _ in range(count - len(parts))),
            )
        ]

    # -- the first pass ------------------------------------------------------------------------------------------------

    def embed_all(self, record: bool) -> list[list[Tensor]]:
        """Runs the first pass, and returns the outputs of each column, its rows in the caller's order.

        Args:
            record: True if a backward pass may follow.
        """
        begin = RandomState(self._devices) if record else None
        self._versions = self._versions_now()
        of_pools: list[list[Output]] = [[] for _ in self.pools]
        try:
            with (
                self._surroundings.restored(),
                self._surroundings.autocasting(),
                self._progress("Embed", record) as progress,
            ):
                for encoder in self.encoders:
                    may_be_kept = set(encoder.may_be_kept())
                    pool = None
                    with encoder.sync.accumulating():
                        for part in encoder.parts:
                            if part.pool != pool:
                                pool = part.pool
                                self._budget.new_pool()
                            outputs = self._first(part, record, part in may_be_kept)
                            progress.update(part.mini_batch.tokens)
                            if part.counts:
                                put(of_pools[part.pool], outputs, part.mini_batch)
        except BaseException:
            if begin is not None:
                begin.restore()
            raise
        return [self._column(of_pools, position) for position in range(self._columns)]

    def _first(self, part: _Part, record: bool, may_keep: bool) -> Sequence[Tensor]:
        """Encodes a part in the first pass, and keeps its graph if that is allowed and fits into the budget."""
        if record:
            part.random_state = RandomState(self._devices)
        tokens = part.mini_batch.tokens
        counts = not part.keep and may_keep and self._budget.fits(tokens)
        if not (record and (part.keep or counts)):
            with torch.no_grad():
                return self._embed(part.mini_batch, True)
        with torch.enable_grad(), self._budget.counting() if counts else nullcontext():
            outputs = self._embed(part.mini_batch, True)
        if part.keep or self._budget.keeps(tokens):
            part.kept = outputs[: self._trained]
        # Detached, or the caller's variable would hold the graph until the next mini-batch is done.
        return [output.detach() for output in outputs]

    def _column(self, of_pools: Sequence[Sequence[Output]], position: int) -> list[Tensor]:
        """Returns the outputs [B, ...] of the column at a position from those of all pools."""
        number, pool = self._pool_of(position)
        return [output.of(pool.index(position)) for output in of_pools[number]]

    def _pool_of(self, position: int) -> tuple[int, Sliced | Pool]:
        """Returns the pool that holds the column at a position, and its number."""
        return next((number, pool) for number, pool in enumerate(self.pools) if position in pool.columns)

    # -- the second pass -----------------------------------------------------------------------------------------------

    def cache(self, gradients: Sequence[Sequence[Tensor | None]]) -> None:
        """Keeps the gradients of the trained outputs of each column, put together for the rows of each pool."""
        self._gradients = []
        for pool in self.pools:
            indices = [pool.index(position) for position in pool.columns]
            outputs = zip(*(gradients[position] for position in pool.columns), strict=True)
            self._gradients.append(
                [gradients_of_rows(list(zip(output, indices, strict=True)), pool.rows) for output in outputs]
            )

    def replay(self, grad_output: Tensor) -> None:
        """Runs the second pass: propagates the cache, times ``grad_output`` (), to the parameters of the encoders."""
        if self._versions_now() != self._versions:
            # Kept graphs would mix the new parameters with activations of the old ones. torch does not notice it,
            # because their saved tensors went through a hook.
            for encoder in self.encoders:
                for part in encoder.parts:
                    part.kept = None
        with torch.enable_grad(), self._surroundings.restored(), self._progress("Backward", True) as progress:
            for encoder in self.encoders:
                with encoder.sync.second_pass() as factor:
                    self._replay(encoder, grad_output if factor == 1 else grad_output * factor, progress)

    def _replay(self, encoder: _Encoder, grad_output: Tensor, progress: Any) -> None:
        """Runs the second pass of one encoder."""
        last = encoder.last_parts()
        trained = None
        if encoder.sync.to_learn:
            # First of all, or DistributedDataParallel would learn the graph of a pass that accumulates.
            with encoder.sync.learning():
                self._back_together(encoder, last, torch.zeros_like(grad_output))
        with encoder.sync.accumulating():
            # Kept graphs first, which frees their memory.
            for part in sorted(encoder.parts, key=lambda part: part.kept is None):
                if part not in last and self._back_together(encoder, [part], grad_output):
                    trained = part
                progress.update(0 if part in last else part.mini_batch.tokens)
        summed = self._back_together(encoder, last, grad_output)
        progress.update(sum(part.mini_batch.tokens for part in last))
        if encoder.sync.due and not summed and trained is not None:
            # The last part is frozen, so nothing was summed: run a trained part again with gradients of zero.
            self._back_together(encoder, [trained], torch.zeros_like(grad_output))

    def _versions_now(self) -> list[int]:
        """Returns torch's counter of changes in place of every parameter that is trained."""
        return [p._version for encoder in self.encoders for p in encoder.module.parameters() if p.requires_grad]

    def _back_together(self, encoder: _Encoder, parts: Sequence[_Part], grad_output: Tensor) -> bool:
        """Encodes parts of an encoder anew and runs one backward pass for all; returns False if none is trained."""
        pairs = [pair for part in parts for pair in self._with_gradients(part, self._second(part), grad_output)]
        if pairs:
            encoder.sync.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return bool(pairs)

    def _second(self, part: _Part) -> Sequence[Tensor]:
        """Returns the trained outputs of a part with their graph, kept or made again."""
        if part.kept is not None:
            kept, part.kept = part.kept, None
            return kept
        assert part.random_state is not None  # the first pass has recorded it
        with self._surroundings.autocasting(), part.random_state.restored():
            return self._embed(part.mini_batch, False)[: self._trained]

    def _with_gradients(
        self, part: _Part, outputs: Sequence[Tensor], grad_output: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the outputs of a part that have a graph and that the loss has used, each with its gradient."""
        for output, rows in zip(outputs, self._gradients[part.pool], strict=True):
            if rows is None or not output.requires_grad:
                continue
            if not part.counts:
                yield output, torch.zeros_like(output)
                continue
            rows = rows if output.ndim < 2 else rows[:, : output.shape[1]]
            rows = rows[part.mini_batch.index(rows.device)]
            yield output, (rows * grad_output.to(rows.device)).to(output.dtype)

    @contextmanager
    def _progress(self, what: str, record: bool) -> Iterator[Any]:
        """Shows a bar over the tokens of one pass for a block; the two passes of a step are numbered."""
        passes = f" {1 if what == 'Embed' else 2}/2" if record else ""
        total = sum(part.mini_batch.tokens for encoder in self.encoders for part in encoder.parts)
        with tqdm(
            desc=f"{what} mini-batches{passes}",
            total=total,
            unit=" tokens",
            unit_scale=True,
            disable=not self._show,
        ) as bar:
            yield bar


def _has_active_dropout(encoder: nn.Module) -> bool:
    """Returns True if a module inside of an encoder drops anything now."""
    return any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
        for module in encoder.modules()
    )


def _tensors(column: Column) -> list[Tensor]:
    """Returns the tensors of a column."""
    values = [column] if isinstance(column, Tensor) else column.values()
    return [value for value in values if isinstance(value, Tensor)]
