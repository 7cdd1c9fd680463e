"""Without data (meta tensors, FakeTensorMode, make_fx) operations read no value, and give what a real call would."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from sbert_kernels import angle_loss, contrastive_loss, cosent_loss, pairwise_similarity, ranking_loss
from sbert_kernels.values import dry, readable

N, DIM = 6, 8


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def contrastive(dtype: torch.dtype = torch.float32, columns: int = 1, **options: Any) -> tuple[Callable[..., Any], Any]:
    documents = [leaf(N, DIM, dtype=dtype) for _ in range(columns)]
    return contrastive_loss, {"queries": leaf(N, DIM, dtype=dtype), "documents": documents, **options}


def ranked(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], Any]:
    return function, {"x": leaf(N, DIM), "y": leaf(N, DIM), "labels": torch.rand(N), **options}


CASES: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "plain": contrastive,
    "bf16": lambda: contrastive(torch.bfloat16),
    "fp64": lambda: contrastive(torch.float64),
    "hard negatives": lambda: contrastive(columns=3, hardness_mode="all_negatives", hardness_strength=2.0),
    "four directions": lambda: contrastive(
        directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), all_queries=leaf(N, DIM)
    ),
    "duplicates": lambda: contrastive(duplicates="positive", document_ids=torch.arange(N)),
    "guide": lambda: contrastive(guide_queries=torch.randn(N, 3), guide_documents=torch.randn(N, 3)),
    "matryoshka": lambda: contrastive(matryoshka_dims=[2, 8]),
    "learnable": lambda: contrastive(scale=torch.tensor(20.0, requires_grad=True), weights=leaf(N).abs().detach()),
    "cosent": lambda: ranked(cosent_loss, scale=torch.tensor(20.0, requires_grad=True)),
    "angle": lambda: ranked(angle_loss, weights=torch.rand(N).requires_grad_()),
    "ranking": lambda: (ranking_loss, {"scores": leaf(N, dtype=torch.float64), "labels": torch.arange(N)}),
    "similarities": lambda: (pairwise_similarity, {"x": leaf(N, DIM), "y": [leaf(N, DIM), leaf(N, DIM)]}),
}


def run(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """What it returns, and the gradient of every leaf."""
    result = function(**arguments)
    total = result if isinstance(result, Tensor) else sum(result).sum()
    total.backward()
    return result, [tensor.grad for tensor in tensors_of(arguments) if tensor.requires_grad]


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in values for tensor in tensors_of(item)]


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(item, function) for key, item in value.items()}
    return [mapped(item, function) for item in value] if isinstance(value, list) else value


def described(values: Any) -> list[tuple[Any, ...]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors_of(values)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("where", ["meta", "fake", "fake in mode"])
def test_a_dry_run_gives_what_a_real_run_would(where: str, case: str) -> None:
    torch.manual_seed(0)
    function, arguments = CASES[case]()
    mode = FakeTensorMode()
    if where == "meta":
        dry = mapped(arguments, lambda t: t.detach().to("meta").requires_grad_(t.requires_grad))
    else:
        dry = mapped(arguments, mode.from_tensor)
    real = run(function, arguments)
    with mode if where == "fake in mode" else nullcontext():
        found = run(function, dry)
    assert described(found) == described(real)
    assert all(tensor.is_meta if where == "meta" else hasattr(tensor, "fake_mode") for tensor in tensors_of(found))


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_a_graph_that_was_traced_computes_the_loss(tracing: str) -> None:
    """make_fx records operators, not the values of the batch that it saw."""

    def gradients(x: Tensor, y: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        loss = contrastive_loss(x, y, scale=scale) + cosent_loss(x, y, labels)
        return loss.detach(), *torch.autograd.grad(loss, (x, y))

    torch.manual_seed(0)
    first, second = ([torch.randn(N, DIM), torch.randn(N, DIM), torch.rand(N), torch.tensor(9.0)] for _ in range(2))
    graph = make_fx(gradients, tracing_mode=tracing)(*first)
    for found, wanted in zip(graph(*second), gradients(*second), strict=True):
        torch.testing.assert_close(found, wanted)


def test_nothing_is_checked_that_has_no_value_and_shapes_still_are() -> None:
    x = torch.empty(N, DIM, device="meta")
    assert contrastive_loss(x, x, scale=torch.empty((), device="meta")).is_meta
    with pytest.raises(ValueError, match="labels must have shape"):
        cosent_loss(x, x, torch.empty(N + 1, device="meta"))


def test_a_dry_run_of_one_rank_takes_the_others_to_have_as_many_pairs() -> None:
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        with FakeTensorMode():
            scores = torch.randn(N, requires_grad=True)
            ranking_loss(scores, torch.rand(N), gather_across_devices=True).backward()
    finally:
        dist.destroy_process_group()
    assert scores.grad.shape == (N,)


def test_what_torch_compile_cannot_trace_is_no_dry_run() -> None:
    """It is run eagerly, with values: nobody may decide for it that there are none."""

    def asked(x: Tensor) -> Tensor:
        return x + float(dry(x)) + 2 * float(readable(x))

    assert torch.compile(asked, backend="eager", fullgraph=True)(torch.zeros(())).item() == 0
    assert asked(torch.zeros(())).item() == 2
