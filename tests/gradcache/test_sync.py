"""The gradient cache on several ranks: the gradients of one process on the union of the batches, summed once a step."""

from __future__ import annotations

import copy
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.sentence_transformer.modules import Router
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sbert_kernels import GradCache, losses
from support.numbers import assert_close
from support.ranks import Collectives

VOCABULARY, LONGEST, COLUMNS = 200, 24, 4
SIZES = (32, 3)

Features = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """``wrap`` is given a model of its own and returns what is trained in its place, or one encoder a column."""

    wrap: Callable[[Any], Any]
    model: str = "bert"
    rows: tuple[int, ...] = (8, 8)  # of each rank
    batches: tuple[int, ...] = (1, 1)  # accumulated in each step
    gathers: bool = True
    prepare: Callable[[Any], None] = lambda model: None  # also done to the model of the single process
    options: tuple[tuple[str, Any], ...] = ()
    interrupted: bool = False  # an exception in the backward pass comes first
    uncached: bool = True  # torch trains this without a cache as well


def direct(**options: Any) -> Callable[[nn.Module], nn.Module]:
    """The whole model in DistributedDataParallel, in several buckets."""
    return lambda model: DistributedDataParallel(model, bucket_cap_mb=0.05, **options)


def nested(model: Any) -> nn.Module:
    """A part of the model in DistributedDataParallel."""
    model[0] = direct()(model[0])
    return model


def towers_apart(model: Any) -> list[nn.Module]:
    query, document = (direct()(model[0].sub_modules[route]) for route in ("query", "document"))
    return [query] + [document] * (COLUMNS - 1)


def sharded(model: Any) -> nn.Module:
    for layer in model[0].auto_model.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def freeze(route: str) -> Callable[[Any], None]:
    return lambda model: model[0].sub_modules[route].requires_grad_(False)


def checkpoint(reentrant: bool) -> Callable[[Any], None]:
    return lambda model: model[0].auto_model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def add_unused(model: Any) -> None:
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))


class LowRank(nn.Module):
    """A frozen layer, and a product of two thin matrices that is trained beside it, as LoRA has it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.layer = layer
        self.down = nn.Parameter(torch.randn(2, layer.in_features, generator=generator, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(layer.out_features, 2, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def add_adapters(model: Any) -> None:
    model.requires_grad_(False)
    for block in model[0].auto_model.encoder.layer:
        attention = block.attention.self
        attention.query, attention.value = LowRank(attention.query), LowRank(attention.value)


SCENARIOS = {
    "direct": Scenario(direct()),
    "nested": Scenario(nested),
    "static graph": Scenario(direct(static_graph=True), batches=(1, 1, 1)),
    "static graph, accumulated": Scenario(direct(static_graph=True), batches=(2, 2), uncached=False),
    "unused parameter": Scenario(direct(find_unused_parameters=True), prepare=add_unused),
    "accumulated": Scenario(direct(), batches=(2, 2)),
    "accumulated, nested": Scenario(nested, batches=(2, 2)),
    "towers": Scenario(direct(), "towers"),
    "towers, unused parameters": Scenario(direct(find_unused_parameters=True), "towers", uncached=False),
    "towers, frozen documents": Scenario(direct(), "towers", prepare=freeze("document")),
    "towers, frozen queries": Scenario(direct(), "towers", prepare=freeze("query")),
    "towers, frozen documents and unused parameters": Scenario(
        direct(find_unused_parameters=True), "towers", prepare=freeze("document"), uncached=False
    ),
    "towers, static graph": Scenario(direct(static_graph=True), "towers", batches=(1, 1, 1)),
    "towers apart": Scenario(towers_apart, "towers"),
    "uneven": Scenario(direct(), rows=(5, 8), gathers=False),
    "uneven, nested": Scenario(nested, rows=(5, 8), gathers=False),
    "sharded": Scenario(sharded),
    "sharded, accumulated": Scenario(sharded, batches=(2, 2)),
    "sharded, uneven": Scenario(sharded, rows=(5, 8), gathers=False),
    "budget": Scenario(direct(), options=(("activation_budget", 2**30),)),
    "budget, static graph": Scenario(
        direct(static_graph=True), batches=(1, 1, 1), options=(("activation_budget", 2**30),)
    ),
    "stock's order": Scenario(direct(), options=(("packing", "none"),)),
    "unique rows": Scenario(direct(), options=(("unique_rows", True),)),
    "checkpointed": Scenario(direct(), prepare=checkpoint(False)),
    "checkpointed, reentrant": Scenario(direct(), prepare=checkpoint(True), uncached=False),
    "interrupted": Scenario(direct(), interrupted=True),
    "adapters": Scenario(direct(), prepare=add_adapters),
    "four ranks": Scenario(direct(), rows=(8, 8, 8, 8)),
    "four ranks, uneven": Scenario(direct(), rows=(5, 8, 2, 7), gathers=False),
    "four ranks, sharded": Scenario(sharded, rows=(5, 8, 2, 7), gathers=False),
}
# Parameters are gathered for every mini-batch there; their gradients travel once, those of two layers and the rest.
SHARDS = 3
SHARDED = [name for name in SCENARIOS if "sharded" in name]


def scenarios(world: int) -> list[str]:
    return [name for name, scenario in SCENARIOS.items() if len(scenario.rows) == world]


def union(scenario: Scenario, batch: int) -> list[Features]:
    """Columns of the rows of all ranks: texts of different lengths, some of which repeat."""
    generator = torch.Generator().manual_seed(batch)
    rows = sum(scenario.rows)
    columns = []
    for column in range(COLUMNS):
        lengths = torch.randint(2, LONGEST + 1, (rows, 1), generator=generator)
        mask = (torch.arange(LONGEST) < lengths).long()
        ids = torch.randint(1, VOCABULARY, (rows, LONGEST), generator=generator) * mask
        ids[-1], mask[-1] = ids[0], mask[0]
        columns.append({"input_ids": ids, "attention_mask": mask})
        if scenario.model == "towers":
            columns[-1]["task"] = "document" if column else "query"
    return columns


def rows_of(columns: Sequence[Features], rows: slice) -> list[Features]:
    return [{k: v[rows] if isinstance(v, Tensor) else v for k, v in column.items()} for column in columns]


def loss_of(scenario: Scenario, model: Any, trained: Any, size: int) -> Callable[[list[Features]], Tensor]:
    """The loss of a batch: with mini-batches of that size, or without a cache for 0."""
    options = {"gather_across_devices": scenario.gathers}
    plain = losses.MultipleNegativesRankingLoss(model, **options)
    if isinstance(trained, list):

        def of_embeddings(embeddings: list[Tensor]) -> Tensor:
            return plain.compute_loss_from_embeddings(embeddings, None)

        if size:
            return GradCache(trained, of_embeddings, mini_batch_size=size)
        return lambda columns: of_embeddings(
            [encoder(column)["sentence_embedding"] for encoder, column in zip(trained, columns, strict=True)]
        )
    loss = plain
    if size:
        loss = losses.CachedMultipleNegativesRankingLoss(
            model, mini_batch_size=size, **options, **dict(scenario.options)
        )
    loss.model = trained
    return lambda columns: loss([dict(column) for column in columns], None)


@contextmanager
def deferred(trained: Any) -> Iterator[None]:
    """What a user does for gradient accumulation."""
    wrapper = next((m for m in trained.modules() if isinstance(m, DistributedDataParallel)), None)
    if wrapper is None:
        trained.set_requires_gradient_sync(False)
    with nullcontext() if wrapper is None else wrapper.no_sync():
        yield
    if wrapper is None:
        trained.set_requires_gradient_sync(True)


def interrupt(loss: Callable[[list[Features]], Tensor], model: nn.Module, columns: list[Features]) -> None:
    """Let the second mini-batch of a backward pass raise."""
    value = loss(columns)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError

    handle = model.register_forward_pre_hook(fail)
    with suppress(InterruptedError):
        value.backward()
    handle.remove()
    model.zero_grad()


def train(scenario: Scenario, model: Any, rank: int, size: int) -> list[dict[str, Any]]:
    """Gradients and collectives of each step of one rank."""
    scenario.prepare(model.train())
    trained = scenario.wrap(model)
    loss = loss_of(scenario, model, trained, size)
    mine = slice(sum(scenario.rows[:rank]), sum(scenario.rows[: rank + 1]))
    if scenario.interrupted and 0 < size < 32:
        interrupt(loss, model, rows_of(union(scenario, 0), mine))
    steps, batch = [], 0
    for batches in scenario.batches:
        model.zero_grad()
        with Collectives() as collectives:
            for left in reversed(range(batches)):
                with deferred(trained) if left else nullcontext():
                    loss(rows_of(union(scenario, batch), mine)).backward()
                batch += 1
        gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        gradients = {k: getattr(g, "full_tensor", g.clone)() for k, g in gradients.items()}
        steps.append({"collectives": collectives.counts, "gradients": _unwrapped(gradients)})
    return steps


def _unwrapped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("module.", ""): gradient for name, gradient in gradients.items()}


def alone(scenario: Scenario, model: Any) -> list[dict[str, Tensor]]:
    """The gradients of each step by stock's loss in a single process, of the union, or averaged over the ranks."""
    scenario.prepare(model.train())
    loss = stock.MultipleNegativesRankingLoss(model)
    steps, batch = [], 0
    for batches in scenario.batches:
        model.zero_grad()
        for _ in range(batches):
            columns, begin = union(scenario, batch), 0
            parts = [sum(scenario.rows)] if scenario.gathers else scenario.rows
            for rows in parts:
                part = rows_of(columns, slice(begin, begin + rows))
                (loss(part, None) / len(parts)).backward()
                begin += rows
            batch += 1
        gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        steps.append(_unwrapped(gradients))
    return steps


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    models = torch.load(f"{folder}/inputs.pt", weights_only=False)
    results: dict[tuple[str, int], Any] = {}
    for name in scenarios(world):
        for size in SIZES + (0,) * SCENARIOS[name].uncached:
            # A group for each: what one leaves behind, or breaks, is not the next one's.
            store = f"file://{folder}/{name}-{size}"
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(minutes=5)
            )
            try:
                results[name, size] = train(SCENARIOS[name], copy.deepcopy(models[SCENARIOS[name].model]), rank, size)
            except Exception:
                results[name, size] = traceback.format_exc()
            dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def models(bert: Callable[..., Any]) -> dict[str, Any]:
    model = bert()
    model[0].auto_model.resize_token_embeddings(VOCABULARY)
    model[0].auto_model.pooler = None  # not used, which DistributedDataParallel must be told
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    router = Router.for_query_document(query_modules=list(model), document_modules=list(other))
    made = {"bert": model, "towers": SentenceTransformer(modules=[router], device="cpu")}
    return copy.deepcopy(made)


@pytest.fixture(scope="module")
def two(models: Any, run_ranks: Callable[..., list[Any]]) -> list[Any]:
    return run_ranks(__file__, 2, models)


@pytest.fixture(scope="module")
def four(models: Any, run_ranks: Callable[..., list[Any]]) -> list[Any]:
    return run_ranks(__file__, 4, models)


@pytest.fixture
def ranks(request: pytest.FixtureRequest, name: str) -> list[Any]:
    return request.getfixturevalue("four" if len(SCENARIOS[name].rows) == 4 else "two")


def steps_of(ranks: list[Any], name: str, size: int) -> list[list[dict[str, Any]]]:
    """The steps of each rank."""
    of_ranks = [results[name, size] for results in ranks]
    for steps in of_ranks:
        assert not isinstance(steps, str), steps
    return of_ranks


@pytest.fixture(scope="module")
def expected(models: Any) -> Callable[[str], list[dict[str, Tensor]]]:
    found: dict[str, Any] = {}

    def of(name: str) -> list[dict[str, Tensor]]:
        if name not in found:
            found[name] = alone(SCENARIOS[name], copy.deepcopy(models[SCENARIOS[name].model]))
        return found[name]

    return of


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_gradients_are_those_of_one_process(ranks: Any, expected: Any, name: str, size: int) -> None:
    for steps in steps_of(ranks, name, size):
        for step, gradients in zip(steps, expected(name), strict=True):
            assert step["gradients"].keys() == gradients.keys()
            assert_close(list(step["gradients"].values()), list(gradients.values()))


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in SHARDED])
def test_the_number_of_mini_batches_adds_no_collectives(ranks: Any, name: str) -> None:
    """Neither of gradients, as many as without a cache (the buckets of DistributedDataParallel), nor of the loss.

    In the last step: in the first ones DistributedDataParallel arranges its buckets, and learns a static graph.
    """
    uncached = SCENARIOS[name].uncached
    for rank, (few, many) in enumerate(zip(*(steps_of(ranks, name, size) for size in SIZES), strict=True)):
        once = steps_of(ranks, name, 0 if uncached else SIZES[0])[rank]
        assert few[-1]["collectives"] == many[-1]["collectives"]
        assert many[-1]["collectives"]["allreduce_"] == once[-1]["collectives"]["allreduce_"] > 0


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_gradients_travel_once_a_step(ranks: Any, name: str) -> None:
    for size in SIZES:
        for steps in steps_of(ranks, name, size):
            assert [step["collectives"]["_reduce_scatter_base_"] for step in steps] == [SHARDS] * len(steps)


class DeepSpeedEngine(nn.Module):
    """Named like that of DeepSpeed, which is known by its name alone; trained in test_deepspeed.py."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def is_deepcompile_enabled(self) -> bool:
        return False


class PipelineEngine(DeepSpeedEngine):
    """Also named like one of DeepSpeed."""


class DeepCompileEngine(DeepSpeedEngine):
    def is_deepcompile_enabled(self) -> bool:
        return True


def mark(model: nn.Module, name: str) -> nn.Module:
    """Leave at a model's parameters what DeepSpeed does."""
    for parameter in model.parameters():
        setattr(parameter, name, 0)
        parameter.register_post_accumulate_grad_hook(lambda _: None)
    return model


REFUSED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "cannot train a PipelineEngine": PipelineEngine,
    "cannot train an engine with DeepCompile": DeepCompileEngine,
    "cannot train leaf modules of ZeRO-3": lambda model: DeepSpeedEngine(mark(model, "ds_z3_leaf_module")),
    "was given the module under the engine: give it what deepspeed.initialize": lambda model: mark(model, "ds_id"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_ways_of_deepspeed_that_a_cache_cannot_train_are_refused_by_name(models: Any, message: str) -> None:
    model = copy.deepcopy(models["bert"])
    loss = losses.CachedMultipleNegativesRankingLoss(model)
    loss.model = REFUSED[message](model)
    with pytest.raises(TypeError, match=re.escape(message)):
        loss(rows_of(union(SCENARIOS["direct"], 0), slice(0, 8)), None)


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
