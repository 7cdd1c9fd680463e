"""Kernels alone: what a row says, and that a listed launch can be started again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sbert_kernels import native, pairwise_similarity, settings
from sbert_kernels.backends import cuda
from sbert_kernels.bench import kernels, kernels_cpu
from sbert_kernels.bench.cases import kernels as cases
from sbert_kernels.bench.cases.kernels import Pairs, Products
from sbert_kernels.bench.kernels import Item, Yardsticks
from support import cuda_operator


class Fixed:
    """A source whose kernels take a second, products by the vendor two and copies half of one."""

    device = "cpu"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def items(self, quick: bool) -> Iterator[Item]:
        yield Item("multiplies", "2 x 3 x 4", "float32", lambda: None, 8.0, ((2, 3, 4),))
        yield Item("copies", "5", "float32", lambda: None, 1000.0, starts=3)

    def seconds(self, item: Item, repeats: int) -> float:
        self.asked.append(item.kernel)
        item.call()
        return {"product": 2.0, "copy": 0.5}.get(item.kernel, 1.0)

    def peaks(self) -> dict[str, float]:
        return {"fp32": 96.0, "bandwidth": 4000.0}


def rows() -> list[dict[str, Any]]:
    source = Fixed()
    yardsticks = Yardsticks(source, 1)
    return [kernels.row_of(item, source, yardsticks, source.peaks(), 1) for item in source.items(False)]


def test_products_are_read_against_the_vendors_and_the_peak() -> None:
    row, _ = rows()
    assert row["TFLOP/s"] == 48e-12
    assert row["vendor ms"] == 2000.0
    assert row["this / other"] == 0.5
    assert row["% of peak"] == 50.0


def test_other_kernels_are_read_against_a_copy_of_their_bytes() -> None:
    _, row = rows()
    assert row["GB/s"] == 1e-6
    assert row["copy ms"] == 500.0
    assert row["% of peak"] == 25.0
    assert row["starts"] == 3
    assert "TFLOP/s" not in row


def test_a_product_is_measured_once() -> None:
    source = Fixed()
    yardsticks = Yardsticks(source, 1)
    item = next(source.items(False))
    assert yardsticks.products(item) == yardsticks.products(item) == 2.0
    assert source.asked == ["product"]


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cases.add_arguments(parser)
    return parser.parse_args(options)


def test_a_kernel_that_cannot_run_is_a_row_and_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Fixed):
        def items(self, quick: bool) -> Iterator[Item]:
            def illegal() -> None:
                raise RuntimeError("an illegal memory access\nand more")

            yield Item("breaks", "7", "float32", illegal, 8.0)
            yield from super().items(quick)

    monkeypatch.setattr(kernels, "source", lambda name: Broken())
    with pytest.raises(SystemExit, match="breaks 7: RuntimeError: an illegal memory access"):
        kernels.run(arguments("--source", "cpu", "--output", str(tmp_path)))
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["kernel"] for row in found["rows"]] == ["breaks", "multiplies", "copies"]
    assert found["machine"]["peaks"]["bandwidth"] == 4000.0
    monkeypatch.setattr(kernels, "source", lambda name: Fixed())
    kernels.run(arguments("--source", "cpu", "--output", str(tmp_path), "--seconds", "-1"))
    assert "no time for multiplies 2 x 3 x 4 float32, and what comes after it" in capsys.readouterr().out


def test_without_its_backend_the_command_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as found:
        kernels.run(arguments("--source", "triton"))
    assert found.value.code == 2
    assert "the Triton kernels need a GPU: torch sees none" in capsys.readouterr().err


def test_of_a_gpu_s_sources_those_run_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def source(name: str) -> Fixed:
        if name == "cuda":
            raise RuntimeError("the CUDA kernels are not there: the driver is too old")
        return Fixed()

    monkeypatch.setattr(kernels, "source", source)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    kernels.run(arguments("--output", str(tmp_path)))
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["machine"]["source"] == "triton"
    assert len(found["rows"]) == 2
    assert "bench kernels: the CUDA kernels are not there: the driver is too old" in capsys.readouterr().err


@pytest.mark.skipif(native.cpu.load() is not None, reason="the compiled CPU kernels are not there")
def test_cpu_operations_count_the_products_and_bytes_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = (Products(64, 16), Pairs(32), Pairs(32, 8, "angle"), Pairs(32))
    monkeypatch.setattr(kernels_cpu, "CPU", wanted)
    source = kernels_cpu.CpuKernels()
    items = list(source.items(quick=True))
    assert len(items) == 5
    found = {item.kernel: item for item in items}
    whole, loss = found["contrastive"], found["contrastive, loss alone"]
    assert whole.operations == 3 * loss.operations == 6 * 64 * 64 * 16
    assert whole.moved == 2 * loss.moved == 4 * 64 * 16 * 4
    assert found["ranking"].moved == 3 * 32 * 4
    assert found["pairwise, gradients"].moved == 2 * found["pairwise"].moved == 4 * 32 * 8 * 4
    yardsticks = Yardsticks(source, 1)
    peaks = {"fp32": 1e12, "bandwidth": 1e10}
    for item in found.values():
        assert kernels.row_of(item, source, yardsticks, peaks, 1)["ms"] > 0


# -- launches ---------------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    vectors: Any
    stride: int
    norms: Any


class Named:
    def __init__(self, name: str) -> None:
        self.__name__ = name


def launch_of(kernel: Any, constants: dict[str, Any] | None = None, **arguments: Any) -> Any:
    from sbert_kernels.backends.triton.launching import Config, Launch

    kernel = Named(kernel) if isinstance(kernel, str) else kernel
    return Launch(kernel, (1,), arguments, constants or {}, Config((), 4, 1))


def test_bytes_are_those_of_the_tensors_and_twice_what_is_updated() -> None:
    from sbert_kernels.bench import kernels_triton

    x = torch.zeros(6, 8, dtype=torch.bfloat16)
    side = Side(x, 8, torch.zeros(6))
    assert kernels_triton.moved_bytes(launch_of("unknown", rows=side, n=6, none=None)) == 96 + 24
    assert kernels_triton.moved_bytes(launch_of("weigh", rows=side, dots=torch.zeros(6, 6), weights=x)) == 24 + 144 + 96
    gradient = torch.zeros(6, 8)
    assert kernels_triton.moved_bytes(launch_of("norms_backward", gradient=gradient)) == 2 * 192
    for add, factor in ((True, 2), (False, 1)):
        launch = launch_of("pair_gradients", {"ADD": add}, x_gradient=gradient)
        assert kernels_triton.moved_bytes(launch) == factor * 192


def test_products_are_found_in_tuples_and_by_name() -> None:
    from sbert_kernels.bench import kernels_triton

    rows, columns = Side(torch.zeros(6, 8), 8, None), Side(torch.zeros(10, 8), 8, None)
    assert kernels_triton.product_of(launch_of("sweep", rows=rows, columns=columns)) == (6, 10, 8)
    launch = launch_of("matrix_product", a=torch.zeros(6, 8), b=torch.zeros(8, 10))
    assert kernels_triton.product_of(launch) == (6, 10, 8)
    assert kernels_triton.product_of(launch_of("norms_forward", rows=rows, columns=columns)) is None


def test_launches_of_one_kernel_are_told_apart() -> None:
    from sbert_kernels.bench import kernels_triton

    kernel = Named("rank")
    first = launch_of(kernel, {"FIRST": 1, "ADD": True}, scores=torch.zeros(2))
    second = launch_of(kernel, {"FIRST": 2, "ADD": True}, scores=torch.zeros(2), total=torch.zeros(2))
    assert kernels_triton.label(first, [first, second]) == "rank (FIRST=1)"
    assert kernels_triton.label(second, [first, second]) == "rank (total, FIRST=2)"
    assert kernels_triton.label(first, [first, launch_of("other")]) == "rank"


def test_what_a_launch_updates_is_put_back() -> None:
    from sbert_kernels.bench import kernels_triton

    gradient = torch.arange(4.0)
    kept = kernels_triton._Restorer(launch_of("norms_backward", gradient=gradient, x=torch.zeros(4)))
    gradient.mul_(3)
    kept.restore()
    assert gradient.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
def test_a_listed_launch_computes_when_it_is_started_what_the_operation_does() -> None:
    from sbert_kernels.backends.triton import launching
    from sbert_kernels.bench import kernels_triton

    x, y = (kernels_cpu.embeddings(5, 8, "float32", seed).detach() for seed in (0, 1))
    target = launching.target_of(torch.device("cpu"))
    with settings.override(backend="triton"), launching.recording(target) as launches:
        (found,) = pairwise_similarity(x, y, ("cos",))
        found.fill_(7.0)
    (launch,) = launches
    kernels_triton.start(launch)
    torch.testing.assert_close(found, torch.cosine_similarity(x, y))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of memory that vendor's products, listed before, have to fill
def test_every_launch_of_a_call_and_of_its_backward_pass_is_an_item() -> None:
    from sbert_kernels.bench import kernels_triton

    source = kernels_triton.TritonKernels("cpu", [Products(20, 16, "bfloat16"), Pairs(12, 8)])
    items = list(source.items(quick=False))
    names = {item.kernel.partition(" ")[0] for item in items}
    assert names >= {"norms_forward", "softmax_statistics", "norms_backward", "pair_scores", "pair_gradients"}
    assert max(item.operations for item in items) == 2 * 20 * 20 * 16
    assert len({(item.kernel, item.shape) for item in items}) == len(items)
    for item in items:
        if item.kernel == "pair_scores":
            assert item.moved == (2 * 12 * 8 + 12) * 4
            assert kernels.row_of(item, source, Yardsticks(source, 1), source.peaks(), 1)["% of peak"] > 0


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of memory that vendor's products, listed before, have to fill
def test_every_policy_of_the_cuda_operator_is_an_item_beside_the_vendor_s_product_and_triton_s_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sbert_kernels.bench import kernels_cuda

    monkeypatch.setattr(cuda, "why_not_on", lambda device, by_name: None)
    with cuda_operator.registered():
        source = kernels_cuda.CudaKernels("cpu", [Products(20, 16, "bfloat16")])
        items = list(source.items(quick=False))
        policies = [policy.name for policy in kernels_cuda.POLICIES if policy.dtype == "bfloat16"]
        for item in (item for item in items if item.kernel in policies):
            policies.remove(item.kernel)
            item.call()
            assert item.operations == 2 * 20 * 20 * 16
    assert not policies
    rows = next(item for item in items if item.kernel == "contrastive_weights (rows)")
    assert rows.moved == 2 * 20 * 16 * 2 + 2 * 20 * 4 + 20 * 20 * 2 + 20 * 4
    assert [item.kernel for item in items if not item.kernel.startswith("contrastive_weights")] == [
        "vendor: product, results in bfloat16",
        "sweep",
    ]
    items[0].call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cuda_source_says_why() -> None:
    from sbert_kernels.bench import kernels_cuda

    with pytest.raises(RuntimeError, match="the CUDA kernels are not there: torch sees no GPU"):
        kernels_cuda.CudaKernels()
