"""The gradient cache under DeepSpeed: a step moves the parameters as one process on the union of the batches does.

Skipped without DeepSpeed. It runs on a CPU: ``DS_BUILD_OPS=0 pip install deepspeed``, then
``pytest tests/gradcache/test_deepspeed.py``.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.sentence_transformer.modules import Router
from torch import Tensor, nn

from sbert_kernels import GradCache, losses
from support.ranks import Collectives

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

VOCABULARY, LONGEST, COLUMNS, WORLD, STEPS = 200, 24, 3, 2, 2
LEARNING_RATE = 0.05

Features = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """``zero`` and ``config`` are entries of DeepSpeed's configuration."""

    stage: int
    rows: tuple[int, ...] = (8, 8)  # of each rank
    batches: int = 1  # accumulated in each step
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    model: str = "bert"
    gathers: bool = True
    size: int = 3  # of a mini-batch; 32 for the whole batch at once
    scale: float | None = None  # a loss scale of the user's
    keywords: dict[str, Any] = field(default_factory=dict)  # of engine.backward
    divided: bool = False  # accumulated batches are divided by their number outside of the engine
    frozen: str = ""  # a route


SCENARIOS = {
    f"stage {stage}{', ' * bool(name)}{name}": Scenario(stage, **options)
    for stage in range(4)
    for name, options in {
        "": {},
        "one mini-batch": {"size": 32},
        "accumulated": {"batches": 2},
        "accumulated, uneven": {"batches": 2, "rows": (3, 8), "gathers": False},
        "towers, accumulated": {"batches": 2, "model": "towers"},
        "divided by the user": {"batches": 2, "keywords": {"scale_wrt_gas": False}, "divided": True},
    }.items()
} | {
    f"stage {stage}, {name}": Scenario(stage, batches=2, **options)
    for stage in (1, 2, 3)
    for name, options in {
        "small buckets": {"zero": {"reduce_bucket_size": 3000}, "rows": (3, 8), "gathers": False},
        "overlapped": {"zero": {"overlap_comm": True, "reduce_bucket_size": 3000}},
        "scaled": {"scale": 1024.0},
        "frozen documents": {"model": "towers", "frozen": "document"},
        "clipped": {"config": {"gradient_clipping": 0.05}},
    }.items()
}


def union(scenario: Scenario, batch: int) -> list[Features]:
    """Columns of the rows of all ranks: texts of different lengths."""
    generator = torch.Generator().manual_seed(batch)
    rows = sum(scenario.rows)
    columns = []
    for column in range(COLUMNS):
        lengths = torch.randint(2, LONGEST + 1, (rows, 1), generator=generator)
        mask = (torch.arange(LONGEST) < lengths).long()
        ids = torch.randint(1, VOCABULARY, (rows, LONGEST), generator=generator) * mask
        columns.append({"input_ids": ids, "attention_mask": mask})
        if scenario.model == "towers":
            columns[-1]["task"] = "document" if column else "query"
    return columns


def rows_of(columns: Sequence[Features], rows: slice) -> list[Features]:
    return [{k: v[rows] if isinstance(v, Tensor) else v for k, v in column.items()} for column in columns]


def prepare(scenario: Scenario, model: Any) -> Any:
    if scenario.frozen:
        model[0].sub_modules[scenario.frozen].requires_grad_(False)
    return model.train()


def initialize(scenario: Scenario, model: Any) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": scenario.batches,
        "zero_optimization": {"stage": scenario.stage, "stage3_param_persistence_threshold": 0, **scenario.zero},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        **scenario.config,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if scenario.scale:
        engine.optimizer.override_loss_scale(scenario.scale)
    return engine


def train(scenario: Scenario, model: Any, rank: int) -> dict[str, Any]:
    """The parameters of one rank after all steps, and the collectives of all."""
    import deepspeed

    prepare(scenario, model)
    loss = losses.CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=scenario.size, gather_across_devices=scenario.gathers
    )
    loss.model = engine = initialize(scenario, model)
    mine = slice(sum(scenario.rows[:rank]), sum(scenario.rows[: rank + 1]))
    with Collectives() as collectives:
        for batch in range(STEPS * scenario.batches):
            value = loss(rows_of(union(scenario, batch), mine), None)
            engine.backward(value / scenario.batches if scenario.divided else value, **scenario.keywords)
            with torch.no_grad():  # versions before 0.19 gather parameters as if gradients went through
                engine.step()
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters) if scenario.stage == 3 else nullcontext():
        found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"parameters": found, "collectives": collectives.counts}


def alone(scenario: Scenario, model: Any) -> dict[str, Tensor]:
    """The parameters after all steps of stock's loss in a single process, of the union, or averaged over the ranks."""
    prepare(scenario, model)
    loss = stock.MultipleNegativesRankingLoss(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    for batch in range(STEPS * scenario.batches):
        columns, begin = union(scenario, batch), 0
        parts = [sum(scenario.rows)] if scenario.gathers else scenario.rows
        for rows in parts:
            part = rows_of(columns, slice(begin, begin + rows))
            (loss(part, None) / len(parts) / scenario.batches).backward()
            begin += rows
        if batch % scenario.batches == scenario.batches - 1:
            if "gradient_clipping" in scenario.config:
                nn.utils.clip_grad_norm_(trained, scenario.config["gradient_clipping"])
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def refused(model: Any, rank: int) -> dict[str, str]:
    """What is said of each way to train that does not work."""
    scenario = SCENARIOS["stage 2"]
    columns = rows_of(union(scenario, 0), slice(8 * rank, 8 * rank + 8))
    said = {}

    def attempt(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            said[name] = ""
        except (RuntimeError, TypeError) as error:
            said[name] = str(error)

    engine = initialize(scenario, model)
    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    attempt("the module under the engine", lambda: loss(columns, None))
    with torch.no_grad():
        loss(columns, None)
    loss.model = engine
    if hasattr(engine, "_running_engine_backward"):
        attempt("no engine.backward", lambda: loss(columns, None).backward())

    def encode(encoder: Any, features: Features) -> Tensor:
        embeddings = encoder(features)["sentence_embedding"]
        return embeddings if len(embeddings) > 2 else embeddings.detach() * torch.ones(1, requires_grad=True)

    cache = GradCache(
        engine, lambda e: (e[0] * e[1]).sum(), mini_batch_size=3, packing="none", unique_rows=False, encode=encode
    )
    attempt("parameters that the last mini-batch does not use", lambda: engine.backward(cache(columns[:2])))
    return said


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    models = torch.load(f"{folder}/inputs.pt", weights_only=False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        try:
            results[name] = train(scenario, copy.deepcopy(models[scenario.model]), rank)
        except Exception:
            results[name] = traceback.format_exc()
    results["refused"] = refused(copy.deepcopy(models["bert"]), rank)
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def models(bert: Callable[..., Any]) -> dict[str, Any]:
    model = bert(torch.float32)
    model[0].auto_model.resize_token_embeddings(VOCABULARY)
    model[0].auto_model.pooler = None
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    router = Router.for_query_document(query_modules=list(model), document_modules=list(other))
    made = {"bert": model, "towers": SentenceTransformer(modules=[router], device="cpu")}
    return copy.deepcopy(made)


@pytest.fixture(scope="module")
def ranks(models: Any, run_ranks: Callable[..., list[Any]]) -> list[Any]:
    return run_ranks(__file__, WORLD, models)


@pytest.mark.parametrize("name", SCENARIOS)
def test_parameters_are_those_of_one_process(ranks: Any, models: Any, name: str) -> None:
    """Of float32, to a few times what eager torch is away from float64."""
    scenario = SCENARIOS[name]
    begin = dict(models[scenario.model].named_parameters())
    exact = alone(scenario, copy.deepcopy(models[scenario.model]).double())
    eager = alone(scenario, copy.deepcopy(models[scenario.model]))
    for results in ranks:
        assert not isinstance(results[name], str), results[name]
        found = results[name]["parameters"]
        assert found.keys() == exact.keys()
        for key, wanted in exact.items():
            error, allowed = ((x[key].double() - wanted).abs().max() for x in (found, eager))
            moved = (wanted - begin[key].double()).abs().max()
            assert error <= 4 * allowed + torch.finfo(torch.float32).eps * moved, key


@pytest.mark.parametrize("stage", range(4))
def test_the_number_of_mini_batches_adds_no_collectives(ranks: Any, stage: int) -> None:
    """But for the parameters that ZeRO-3 gathers for each."""
    for results in ranks:
        many, one = (results[f"stage {stage}{name}"]["collectives"] for name in ("", ", one mini-batch"))
        gathers = {name for name in many if stage == 3 and "gather" in name}
        assert {k: n for k, n in many.items() if k not in gathers} == {k: n for k, n in one.items() if k not in gathers}
        assert any("reduce" in name for name in many)


WAYS_OUT = {
    "the module under the engine": "give it what deepspeed.initialize",
    "no engine.backward": "needs engine.backward",
    "parameters that the last mini-batch does not use": "needs every mini-batch to use the same parameters",
}


def test_what_does_not_work_is_refused_with_what_to_do(ranks: Any) -> None:
    for results in ranks:
        for way, said in results["refused"].items():
            assert WAYS_OUT[way] in said


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[3])
