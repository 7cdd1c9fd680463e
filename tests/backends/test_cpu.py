"""What is the C++ kernels' own: layouts, threads, instruction sets, precision, memory, being an operator of torch."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sbert_kernels import contrastive_loss, machine, use_backend
from sbert_kernels import settings as library
from sbert_kernels.backends.cpu import contrastive as cpu
from sbert_kernels.backends.cpu.contrastive import MatmulPrecision
from support.contrastive import ALL_DIRECTIONS, eager, loss_and_gradients, memory_step
from support.numbers import relative_errors


@pytest.fixture(autouse=True)
def _backend(compiled: None) -> Iterator[None]:
    with use_backend("cpu"):
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def multiply_in() -> Iterator[Callable[[MatmulPrecision], None]]:
    """Lets the backend multiply in a format."""
    with ExitStack() as stack:

        def choose(kind: MatmulPrecision) -> None:
            reason = cpu.why_not_precision(kind)
            if reason is not None:
                pytest.skip(reason)
            stack.enter_context(library.override(matmul=kind.name.lower()))

        yield choose


def batch(rows: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries, and documents that are somewhat like them."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(rows, dim, generator=generator)
    documents = queries / 2 + torch.randn(rows, dim, generator=generator)
    return queries.to(dtype).requires_grad_(), documents.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout_of_the_embeddings(dtype: torch.dtype) -> None:
    """Transposed, strided, expanded, and at an address that no vector instruction likes."""
    queries, documents = (x.detach() for x in batch(37, 22, dtype))
    flat = torch.empty(37 * 22 + 1, dtype=dtype)
    flat[1:] = documents.flatten()
    layouts = {
        "transposed": (queries.T.contiguous().T, documents.T.contiguous().T),
        "strided": (torch.stack([queries, queries], 1)[:, 0], torch.stack([documents, documents], 2)[..., 0]),
        "unaligned": (queries, flat[1:].view(37, 22)),
    }
    expected = loss_and_gradients(queries.clone().requires_grad_(), documents.clone().requires_grad_())
    for name, (q, d) in layouts.items():
        found = loss_and_gradients(q.detach().requires_grad_(), d.detach().requires_grad_())
        assert all(map(torch.equal, found, expected)), name
    text = documents[:1]
    expanded = contrastive_loss(queries, text.expand(37, 22))
    assert torch.equal(expanded, contrastive_loss(queries, text.repeat(37, 1)))


@pytest.mark.parametrize("options", [{}, {"directions": ALL_DIRECTIONS, "matryoshka_dims": [7, 30, 64]}])
def test_runs_are_bitwise_equal_with_any_number_of_threads(
    options: dict[str, Any], threads: Callable[[int], None]
) -> None:
    """100 runs with each; between numbers of threads tiles differ, and with them the order of some sums."""
    queries, documents = batch(300, 64)
    results = []
    for count in (1, 2, 3):
        threads(count)
        first = loss_and_gradients(queries, documents, **options)
        for _ in range(100):
            assert all(map(torch.equal, first, loss_and_gradients(queries, documents, **options)))
        results.append(first)
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


RUN = """
import sys, torch
from sbert_kernels import contrastive_loss, native, settings
assert native.cpu.load() is None, native.cpu.load()
assert torch.ops.sbert_kernels.cpu_instruction_set() == sys.argv[1]
torch.manual_seed(0)
queries, documents = (torch.randn(150, 70, requires_grad=True) for _ in range(2))
cases = ({}, {"similarity": "dot"}, {"directions": ("query_to_doc", "doc_to_doc"), "matryoshka_dims": [9, 70]})
for dtype in (torch.float32, torch.bfloat16):
    for options in cases:
        results = []
        for backend, kind in (("cpu", dtype), ("reference", torch.float64)):
            leaves = (x.to(dtype).to(kind) for x in (queries, documents))
            loss = contrastive_loss(*leaves, backend=backend, **options)
            results.append([loss, *torch.autograd.grad(loss, [queries, documents])])
        for value, exact in zip(*results):
            error = ((value - exact).norm() / exact.norm()).item()
            assert error < (1e-5 if dtype == torch.float32 else 1e-2), (dtype, options, error)
for products in ("bfloat16", "bfloat16x3"):
    with settings.override(matmul=products):
        try:
            contrastive_loss(queries, documents, backend="cpu")
        except ValueError as error:
            assert f"SBERT_KERNELS_MATMUL={products!r} cannot be served" in str(error)
        else:
            raise AssertionError(f"{products} products where there should be none")
"""


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the instruction sets that are named here are x86's"
)
@pytest.mark.parametrize(
    ("variables", "instruction_set"),
    [
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "AVX2"),
        ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "AVX2"),
        ({"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "AVX512"),
        ({"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, "baseline"),
    ],
    ids=["avx2", "avx2 products", "avx512 without bfloat16", "none"],
)
def test_lesser_machines_compute_the_same(variables: dict[str, str], instruction_set: str) -> None:
    """And refuse the bfloat16 products that none of them has."""
    of_the_processor = {"AVX2": torch.cpu._is_avx2_supported, "AVX512": torch.cpu._is_avx512_supported}
    if instruction_set in of_the_processor and not of_the_processor[instruction_set]():
        pytest.skip(f"this machine has no {instruction_set}")
    command = [sys.executable, "-c", RUN, instruction_set]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_products_follow_the_precision_knob_and_the_machine(
    precision: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(instructions: str | None) -> list[MatmulPrecision]:
        monkeypatch.setattr(cpu, "bfloat16_instructions", lambda: instructions)
        found = []
        for value in ("highest", "high", "medium"):
            precision(value)
            found.append(cpu.choose_precision({torch.float32}))
        # Other types have no knob.
        found.append(cpu.choose_precision({torch.bfloat16}))
        assert cpu.choose_precision({torch.float16}) == MatmulPrecision.FLOAT32
        # Autocast's type is everybody's, whatever the knob says: it is "medium" by now.
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert cpu.choose_precision({dtype}, torch.bfloat16) == found[-1]
            assert cpu.choose_precision({dtype}, torch.float16) == MatmulPrecision.FLOAT32
            with library.override(matmul="float32"):
                assert cpu.choose_precision({dtype}, torch.bfloat16) == MatmulPrecision.FLOAT32
        return found

    exact, three, one = MatmulPrecision.FLOAT32, MatmulPrecision.BFLOAT16X3, MatmulPrecision.BFLOAT16
    assert chosen("AMX") == [exact, three, one, one]
    assert chosen("AVX512-bf16") == [exact, exact, one, one]
    assert chosen(None) == [exact] * 4


def test_products_that_are_asked_for_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, documents = batch(4, 3)
    monkeypatch.setenv("SBERT_KERNELS_MATMUL", "bfloat16x3")
    refused = pytest.raises(ValueError, match="SBERT_KERNELS_MATMUL='bfloat16x3' cannot be served: there are no inst")
    with torch.backends.mkldnn.flags(enabled=False), refused:  # which forbids what the processor may have
        contrastive_loss(queries, documents)
    monkeypatch.setenv("SBERT_KERNELS_MATMUL", "fp8")
    with pytest.raises(ValueError, match="SBERT_KERNELS_MATMUL='fp8' cannot be read: expected one of"):
        contrastive_loss(queries, documents)


def test_bfloat16_is_multiplied_in_float32_while_its_products_are_forbidden() -> None:
    queries, documents = batch(20, 8, torch.bfloat16)
    with library.override(matmul="float32"):
        expected = loss_and_gradients(queries, documents)
    with torch.backends.mkldnn.flags(enabled=False):
        assert cpu.bfloat16_instructions() is None
        found = loss_and_gradients(queries, documents)
    for value, wanted in zip(found, expected, strict=True):  # both rounded to bfloat16 once, at the end
        assert (value - wanted).norm() <= 2**-8 * wanted.norm()


@pytest.mark.parametrize("scale", [20.0, 100.0, 1000.0])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float32, MatmulPrecision.FLOAT32),
        (torch.bfloat16, MatmulPrecision.BFLOAT16),
        (torch.bfloat16, MatmulPrecision.FLOAT32),
        (torch.float16, MatmulPrecision.FLOAT32),
    ],
)
def test_errors_are_at_most_twice_eagers_in_the_same_type(
    dtype: torch.dtype, kind: MatmulPrecision, scale: float, multiply_in: Callable[[MatmulPrecision], None]
) -> None:
    """In the root mean square over some batches: an error of one sum may be anything."""
    multiply_in(kind)
    squares = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(10):
        queries, documents = batch(200, 96, dtype, seed)
        exact = eager(queries, documents, scale, torch.float64)
        results = loss_and_gradients(queries, documents, scale=scale), eager(queries, documents, scale)
        for index, found in enumerate(results):
            squares[index] += relative_errors(found, exact) ** 2
    ours, theirs = (squares / 10).sqrt()
    assert (ours <= 2 * theirs).all(), (ours, theirs)


@pytest.mark.parametrize("kind", MatmulPrecision)
def test_the_gradient_of_a_well_trained_row_is_right_within_a_percent(
    kind: MatmulPrecision, multiply_in: Callable[[MatmulPrecision], None]
) -> None:
    """p = 0.999 of the positive: the gradient is of the size of a bfloat16 rounding of it."""
    multiply_in(kind)
    torch.manual_seed(0)
    documents = F.normalize(torch.randn(512, 64))
    queries = F.normalize(documents + 0.05 * torch.randn(512, 64))
    scale = 16.0
    for _ in range(60):  # to p = 0.999, by its loss
        loss = contrastive_loss(queries, documents, scale=scale, backend="blockwise").item()
        scale *= 1.02 if loss > 1e-3 else 0.99
    assert loss == pytest.approx(1e-3, rel=0.3)
    dtype = torch.bfloat16 if kind == MatmulPrecision.BFLOAT16 else torch.float32
    leaves = [x.to(dtype).requires_grad_() for x in (queries, documents)]
    ours = loss_and_gradients(*leaves, scale=scale)
    exact = loss_and_gradients(*leaves, "reference", torch.float64, scale=scale)
    for value, wanted in zip(ours, exact, strict=True):
        assert (value - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("kind", [MatmulPrecision.BFLOAT16, MatmulPrecision.BFLOAT16X3])
def test_embeddings_that_all_point_one_way(
    kind: MatmulPrecision, multiply_in: Callable[[MatmulPrecision], None]
) -> None:
    """Cosines above 0.99, as of an untrained encoder: the rounding along a vector cancels, as its gradient does."""
    multiply_in(kind)
    dtype = torch.bfloat16 if kind == MatmulPrecision.BFLOAT16 else torch.float32
    torch.manual_seed(0)
    leaves = [(10 + torch.randn(200, 64)).to(dtype).requires_grad_() for _ in range(2)]
    exact = eager(*leaves, 20.0, torch.float64)
    for value, wanted in zip(loss_and_gradients(*leaves), exact, strict=True):
        assert (value - wanted).norm() <= (2**-7 if kind == MatmulPrecision.BFLOAT16 else 2**-13) * wanted.norm()


@pytest.mark.parametrize("kind", MatmulPrecision)
def test_columns_beyond_what_is_packed_for_the_whole_call(
    kind: MatmulPrecision, multiply_in: Callable[[MatmulPrecision], None]
) -> None:
    """Documents of more than 16 MiB, of a number that no tile divides, of which guided doc_to_doc sees a part."""
    multiply_in(kind)
    torch.manual_seed(0)
    n, dim = 40, 500

    def guide(rows: int) -> Tensor:  # whose cosines are equal or far apart: no exclusion hangs on a rounding
        return torch.randint(-2, 3, (rows, 8)).float()

    dtype = torch.bfloat16 if kind == MatmulPrecision.BFLOAT16 else torch.float32
    for negatives in (300, 20_000):
        queries, documents = (x.detach() for x in batch(n, dim, dtype))
        columns = [documents, torch.randn(negatives, dim).to(dtype)]
        leaves = [x.requires_grad_() for x in (queries, *columns)]
        options = {
            "directions": ("query_to_doc", "doc_to_doc"),
            "guide_queries": guide(n),
            "guide_documents": [guide(n), guide(negatives)],
        }
        results = []
        for backend, kept in (("cpu", dtype), ("blockwise", torch.float64)):
            inputs = [x.detach().to(kept).requires_grad_() for x in leaves]
            loss = contrastive_loss(inputs[0], inputs[1:], backend=backend, **options)
            results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
        for value, wanted in zip(*results, strict=True):
            # The guide leaves some rows their own document, of similarity 1: its rounding is that of all their logits.
            limit = {MatmulPrecision.FLOAT32: 1e-4, MatmulPrecision.BFLOAT16X3: 5e-3, MatmulPrecision.BFLOAT16: 1e-2}[
                kind
            ]
            assert (value - wanted).norm() <= limit * wanted.norm()


@pytest.mark.parametrize("kind", [MatmulPrecision.FLOAT32, MatmulPrecision.BFLOAT16X3])
@pytest.mark.parametrize("options", [{}, {"directions": ALL_DIRECTIONS, "scale": 100.0}, {"similarity": "dot"}])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
def test_a_bad_row_spoils_what_it_spoils_in_eager_torch(
    bad: float, options: dict[str, Any], kind: MatmulPrecision, multiply_in: Callable[[MatmulPrecision], None]
) -> None:
    """Rows of NaN, infinities and zeros, among queries or documents: finite where the definition is finite."""
    multiply_in(kind)
    for which in (0, 1):
        leaves = list(batch(20, 8))
        with torch.no_grad():
            leaves[which][5] = bad
        ours = loss_and_gradients(*leaves, **options)
        exact = loss_and_gradients(*leaves, **options, backend="reference")
        for value, wanted in zip(ours, exact, strict=True):
            finite = wanted.isfinite()
            assert value[finite].isfinite().all()
            rtol = 1e-4 if kind == MatmulPrecision.FLOAT32 else 1e-3
            torch.testing.assert_close(value[finite], wanted[finite], rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("rows", [4, 5])
@pytest.mark.parametrize(
    ("kind", "dtype"), [(MatmulPrecision.FLOAT32, torch.float32), (MatmulPrecision.BFLOAT16, torch.bfloat16)]
)
def test_a_column_at_minus_infinity_has_a_gradient_of_zero(
    kind: MatmulPrecision, dtype: torch.dtype, rows: int, multiply_in: Callable[[MatmulPrecision], None]
) -> None:
    """No row gives it a share, and neither do the zeros that pad an odd number of rows."""
    multiply_in(kind)
    queries, documents = (x.detach().abs().requires_grad_() for x in batch(rows, 8, dtype))
    worst = torch.full((1, 8), -math.inf, dtype=dtype, requires_grad=True)
    loss = contrastive_loss(queries, [documents, worst], similarity="dot", scale=1.0)
    (gradient,) = torch.autograd.grad(loss, worst)
    assert loss.isfinite()
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_bad_row_of_weight_zero() -> None:
    """In eager torch 0 x NaN is NaN: so it is here, and nothing hides it."""
    queries, documents = batch(20, 8)
    with torch.no_grad():
        queries[5] = math.nan
    weights = torch.ones(20)
    weights[5] = 0
    assert contrastive_loss(queries, documents, weights=weights).isnan()


def test_float64_is_left_to_torch_ops() -> None:
    queries, documents = (x.detach().double() for x in batch(4, 3))
    with pytest.raises(ValueError, match="'cpu' cannot serve this call: float64 is computed in torch ops"):
        contrastive_loss(queries, documents)
    with use_backend(None):
        assert contrastive_loss(queries, documents).dtype == torch.float64


def captured(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> dict[str, Any]:
    """The arguments that a call hands to the operator, by name."""
    operator, calls = torch.ops.sbert_kernels.contrastive, []

    def spy(**operands: Any) -> Any:
        calls.append(operands)
        return operator(**operands)

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.sbert_kernels, "contrastive", spy)
        contrastive_loss(*args, **options)
    return calls[0]


def test_the_operator_is_a_good_citizen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes and aliases what its schema says: nothing."""
    queries, documents = batch(9, 6)
    ids = torch.arange(9)
    guide = torch.randn(9, 4)
    for options in (
        {},
        {"scale": torch.tensor(5.0, requires_grad=True), "weights": torch.rand(9, requires_grad=True)},
        {"duplicates": "mask", "document_ids": ids, "guide_queries": guide, "guide_documents": guide},
        {"all_queries": queries * 1, "directions": ALL_DIRECTIONS, "matryoshka_dims": [2, 6]},
    ):
        arguments = captured(monkeypatch, queries, documents, **options)
        torch.library.opcheck(torch.ops.sbert_kernels.contrastive.default, (), arguments, test_utils="test_schema")


def test_wrong_operands_are_refused_by_the_operator_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called directly, it must not read memory that is not there."""
    queries, documents = batch(9, 6)
    arguments = captured(monkeypatch, queries, documents)
    for name, value, message in (
        ("queries", queries.detach().T, "queries must be a contiguous CPU matrix"),
        ("documents", documents.detach()[:5], "row_offset does not fit"),
        ("documents", documents.detach()[:, :3].contiguous(), "embeddings differ in dimension"),
        ("dims", [7], "dims must ascend from 1 to 6"),
        ("terms", arguments["terms"][:-1], "terms is cut short"),
        ("term_layout", "rows_are_queries bool", "these kernels were built for other terms"),
        ("row_offset", -1, "row_offset does not fit"),
        ("document_ids", torch.arange(3), "document_ids must be a contiguous int64 tensor"),
        ("precision", 3, "precision must be 0, 1 or 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.sbert_kernels.contrastive(**(arguments | {name: value}))
    arguments["precision"] = MatmulPrecision.BFLOAT16
    with (
        torch.backends.mkldnn.flags(enabled=False),
        pytest.raises(RuntimeError, match="matmul precision 2 needs AVX512-bf16"),
    ):
        torch.ops.sbert_kernels.contrastive(**arguments)


@pytest.mark.parametrize("dims", [None, [16, 32, 64]])
def test_memory_is_a_block_and_the_gradients(dims: list[int] | None) -> None:
    """N x N fp32 logits alone would take 576 MiB. In float32 there are no copies of the inputs, and in no format of the
    gradients of 3 MiB."""
    n, dim = 12_288, 64
    result = machine.run_in_process(memory_step, n, dim, "cpu", dims)
    assert result.value is True
    assert result.peak_extra_bytes < cpu.LARGEST_BLOCK_BYTES + (2 * 3 + 6) * library.MIB
