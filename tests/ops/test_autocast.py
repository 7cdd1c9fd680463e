"""Under torch.autocast the products take its type, as those of torch.matmul do; all else, and the loss, is float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import autocast as benchmark
from sbert_kernels import contrastive_loss, settings, use_backend
from sbert_kernels.backends.cpu import contrastive as cpu
from support.contrastive import autocast_types, draw

HALF = (torch.bfloat16, torch.float16)


def step(loss: Callable[..., Tensor] = contrastive_loss, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    leaves = [draw(9, 16, seed=seed).to(dtype).requires_grad_() for seed in range(2)]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("outer", HALF)
def test_autocast_is_read_where_the_loss_is_called(monkeypatch: pytest.MonkeyPatch, outer: torch.dtype) -> None:
    types = autocast_types(monkeypatch)
    before = step()
    with torch.autocast("cpu", outer):
        inside = step()
        step(dtype=torch.float64)  # which torch's own products leave as it is
        step(dtype=torch.bfloat16)
        step(lambda q, d: contrastive_loss(q, d, guide_queries=q, guide_documents=d))  # stock's has no products
        with torch.autocast("cpu", enabled=False):
            off = step()
    after = step()
    with torch.no_grad(), torch.autocast("cpu", outer):
        contrastive_loss(draw(9, 16), draw(9, 16, seed=1))
    assert types == [None, outer, None, outer, None, None, None, outer]
    for other in (off, after):
        assert all(map(torch.equal, before, other))
    assert {value.dtype for value in inside} == {torch.float32}


def test_on_a_device_without_autocast_there_is_none() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert contrastive_loss(draw(4, 8).to("meta"), draw(4, 8).to("meta")).dtype == torch.float32


@pytest.mark.usefixtures("compiled")
def test_the_cpu_kernels_multiply_in_bfloat16_and_a_setting_wins() -> None:
    """They have no float16 products, and compute those in float32."""
    exact = step()
    with settings.override(matmul="float32"), torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, step(), exact))
    with torch.autocast("cpu", torch.float16):
        assert all(map(torch.equal, step(), exact))
    reason = cpu.why_not_precision(cpu.MatmulPrecision.BFLOAT16)
    if reason is not None:
        pytest.skip(reason)
    with settings.override(matmul="bfloat16"):
        rounded = step()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, step(), rounded))
    assert not torch.equal(rounded[1], exact[1])


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_backends_of_torch_operations_compute_in_float32(backend: str) -> None:
    with use_backend(backend):
        exact = step()
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, step(), exact))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("scale", benchmark.SCALES)
@pytest.mark.parametrize("kind", benchmark.SHARED)
@pytest.mark.parametrize("dtype", HALF)
def test_errors_are_at_most_twice_those_of_stock_under_autocast(dtype: torch.dtype, kind: str, scale: float) -> None:
    errors = benchmark.errors_of(dtype, 128, kind, scale, repeats=3)
    for quantity in ("loss", "dQ", "dD"):
        assert errors[f"ours {quantity}"] <= 2 * errors[f"stock {quantity}"], errors


@pytest.mark.parametrize("dtype", HALF)
def test_a_gradient_scaler_is_exact(dtype: torch.dtype) -> None:
    """Gradients are float32 until they have been multiplied: a factor that float16 cannot hold loses nothing."""
    factor = 2.0**20
    with torch.autocast("cpu", dtype):
        plain, scaled = step(), step(lambda q, d: contrastive_loss(q, d) * factor)
    for value, gradient in zip(scaled[1:], plain[1:], strict=True):
        assert torch.equal(value, gradient * factor)


def test_a_compiled_caller_follows_autocast_around_it_and_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, documents = draw(9, 16), draw(9, 16, seed=1)

    def loss(queries: Tensor, documents: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            inside = contrastive_loss(queries, documents)
        return torch.stack([inside, contrastive_loss(queries, documents)])

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    types = autocast_types(monkeypatch)
    for around in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            assert torch.equal(compiled(queries, documents), loss(queries, documents))
    assert types == [torch.float16, None] * 2 + [torch.float16, torch.bfloat16] * 2 + [torch.float16, None] * 2
