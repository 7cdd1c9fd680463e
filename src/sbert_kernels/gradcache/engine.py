"""The gradient cache (Gao et al. 2021, arXiv 2101.06983): a loss over a whole batch in the memory of a mini-batch.

1. Embed the batch mini-batch by mini-batch, without graphs.
2. Compute the loss of all embeddings, and its gradients with respect to them: the cache.
3. In the backward pass, embed each mini-batch once more, with a graph, and back-propagate its part of the cache.

Step 3 is the first pass over again: same rows, dropout masks, precision (:mod:`replay`). Rows are grouped by their
length (:mod:`packing`); graphs that fit a budget are kept from step 1 and not made again (:mod:`activations`); on
several ranks gradients are summed once (:mod:`sync`). What a step remembers is its own, so that two forward passes may
precede a backward pass, or two backward passes follow one.

Held at a time: the activations of one mini-batch or those kept, the embeddings and their gradients, and for each
mini-batch the state of the random generators (5 kB). Where DistributedDataParallel has to see every parameter at once,
it is one mini-batch of each pool, the last.
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
from .options import Options
from .outputs import Output, gradients_of_rows, put
from .packing import Column, Limits, MiniBatch, Pool, Sliced, make_pools
from .replay import RandomState, Surroundings, devices_of
from .stage import leaves_of
from .sync import GradientSync, most_of_all_ranks

logger = logging.getLogger(__name__)

# What is made of a mini-batch of n rows, [n, ...] each: embeddings, and whatever else the loss needs of the rows.
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
    """The loss of a batch, whose backward pass embeds the batch once more.

    Args:
        embed: ``embed(mini_batch, first)`` runs the encoder; without ``first`` only the ``trained`` outputs matter.
        encoders: The module that embeds each column.
        columns: The features of each column.
        stage: ``stage(columns)`` returns the loss, a scalar, of the outputs of each column, [B, ...] each. If gradients
            are enabled it leaves those of the trained outputs in their ``.grad``, and the loss may still carry those of
            parameters of its own.
        options: Those of the user.
        pad: The padding token's id of each column's encoder, where it is known.
        limits: Of each column's mini-batches; those of the options if there are none.
        trained: How many of the outputs, the first, get a gradient, as far as they are no integers. None: all.

    Raises:
        ValueError: a column is empty, or the loss does not use it.
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
        # A stage of the user's that has called backward() and returns what it was called on: that graph is used up.
        loss = loss.detach()
    loss = loss.clone() if loss.requires_grad else loss.detach().requires_grad_()
    loss.register_hook(step.replay)
    return loss


@dataclass(eq=False)
class _Part:
    """A mini-batch of a step, and what it takes to embed it once more."""

    mini_batch: MiniBatch
    pool: int
    counts: bool = True  # False: embedded for the sake of other ranks
    keep: bool = False  # its graph takes no memory that is not needed later
    random_state: RandomState | None = None
    kept: Sequence[Tensor] | None = None  # trained outputs with their graph


@dataclass(eq=False)
class _Encoder:
    """A module that embeds columns, and its parts of a step in the order of the first pass."""

    module: nn.Module
    sync: GradientSync
    parts: list[_Part] = field(default_factory=list)

    def may_be_kept(self) -> list[_Part]:
        """The parts whose graphs may wait for the second pass: not those that a wrapper has to see then."""
        last = self.last_parts()
        return [] if self.sync.sharded else [part for part in self.parts if part not in last]

    def last_parts(self) -> list[_Part]:
        """The parts whose backward pass sums gradients over the ranks: together they reach every parameter in use."""
        if not self.sync.wrapped:
            return []
        last_of_pool = {part.pool: part for part in self.parts}
        return list(last_of_pool.values()) if self.sync.counts_all_parameters else self.parts[-1:]


class _Step:
    """One batch from its features to its gradients."""

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
        if options.activation_budget and any(encoder.sync.sharded for encoder in self.encoders):
            log_once(logger, "activation_budget: none are kept of an encoder that is sharded over ranks (FSDP).")
        of_column = [numbers[id(module)] for module in encoders]
        self._columns = len(columns)
        tensors = [value for column in columns for value in _tensors(column)]
        packing, unique_rows = options.packing, options.unique_rows
        if dry(*tensors):
            # Which rows are long, or equal, is not known.
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
            # In torch's words, for which a smaller batch is tried.
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
            if encoder.sync.sharded:
                encoder.parts = self._as_many_as_other_ranks(encoder)
        if options.activation_budget is None:
            self._keep_the_end(self.encoders[-1])

    def _keep_the_end(self, encoder: _Encoder) -> None:
        """Keep the graphs of the mini-batches that come last, together no larger than one may be: that memory is needed
        for each of the others in the second pass, when these are through."""
        pool = encoder.parts[-1].pool
        left = self.pools[pool].budget
        for part in reversed(encoder.may_be_kept()):
            left -= part.mini_batch.tokens
            if part.pool != pool or left < 0:
                return
            part.keep = True

    def _as_many_as_other_ranks(self, encoder: _Encoder) -> list[_Part]:
        """The parts of a sharded encoder, the last of each pool repeated for as long as another rank has more."""
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
        """The outputs of each column, its rows in the caller's order.

        Args:
            record: Whether a backward pass may follow.
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
        # Without its graph, which would otherwise stand until the next mini-batch is done.
        return [output.detach() for output in outputs]

    def _column(self, of_pools: Sequence[Sequence[Output]], position: int) -> list[Tensor]:
        number, pool = self._pool_of(position)
        return [output.of(pool.index(position)) for output in of_pools[number]]

    def _pool_of(self, position: int) -> tuple[int, Sliced | Pool]:
        return next((number, pool) for number, pool in enumerate(self.pools) if position in pool.columns)

    # -- the second pass -----------------------------------------------------------------------------------------------

    def cache(self, gradients: Sequence[Sequence[Tensor | None]]) -> None:
        """Keep the gradients of the columns' trained outputs, as those of the rows of the pools."""
        self._gradients = []
        for pool in self.pools:
            indices = [pool.index(position) for position in pool.columns]
            outputs = zip(*(gradients[position] for position in pool.columns), strict=True)
            self._gradients.append(
                [gradients_of_rows(list(zip(output, indices, strict=True)), pool.rows) for output in outputs]
            )

    def replay(self, grad_output: Tensor) -> None:
        """Back-propagate the cache, times ``grad_output`` (), into the parameters of the encoders."""
        if self._versions_now() != self._versions:
            # Kept graphs would mix these parameters with activations of the old, and as their saved tensors went
            # through a hook, torch does not notice.
            for encoder in self.encoders:
                for part in encoder.parts:
                    part.kept = None
        with torch.enable_grad(), self._surroundings.restored(), self._progress("Backward", True) as progress:
            for encoder in self.encoders:
                last = encoder.last_parts()
                trained = None
                if encoder.sync.to_learn:
                    # Of mini-batches that accumulate before it DistributedDataParallel would learn another graph.
                    with encoder.sync.learning():
                        self._back_together(last, torch.zeros_like(grad_output))
                with encoder.sync.accumulating():
                    # Kept graphs first, which makes room.
                    for part in sorted(encoder.parts, key=lambda part: part.kept is None):
                        if part not in last and self._back_together([part], grad_output):
                            trained = part
                        progress.update(0 if part in last else part.mini_batch.tokens)
                summed = self._back_together(last, grad_output)
                progress.update(sum(part.mini_batch.tokens for part in last))
                if encoder.sync.due and not summed and trained is not None:
                    # A frozen end sums nothing: embed for its sake what is trained, with a gradient of zero.
                    self._back_together([trained], torch.zeros_like(grad_output))

    def _versions_now(self) -> list[int]:
        """Counters of the changes in place of every parameter that is trained."""
        return [p._version for encoder in self.encoders for p in encoder.module.parameters() if p.requires_grad]

    def _back_together(self, parts: Sequence[_Part], grad_output: Tensor) -> bool:
        """Embed parts once more and back-propagate all in one; False if none of them is trained."""
        pairs = [pair for part in parts for pair in self._with_gradients(part, self._second(part), grad_output)]
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        return bool(pairs)

    def _second(self, part: _Part) -> Sequence[Tensor]:
        if part.kept is not None:
            kept, part.kept = part.kept, None
            return kept
        with self._surroundings.autocasting(), part.random_state.restored():
            return self._embed(part.mini_batch, False)[: self._trained]

    def _with_gradients(
        self, part: _Part, outputs: Sequence[Tensor], grad_output: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The outputs of a part that have a graph and that the loss has used, each with its gradient."""
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
        """A bar over the tokens of one pass; the two of a step are numbered."""
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
    return any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
        for module in encoder.modules()
    )


def _tensors(column: Column) -> list[Tensor]:
    values = [column] if isinstance(column, Tensor) else column.values()
    return [value for value in values if isinstance(value, Tensor)]
