"""What the problems of the self-check find, and that right kernels pass them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sbert_kernels import backends
from sbert_kernels.backends import self_check
from sbert_kernels.backends._backend import Operations
from sbert_kernels.backends.self_check import Kind, cases
from support.self_checked import CPU, Library, Sabotage, one_nan, one_wrong_row, scaled


@pytest.mark.usefixtures("interpreted", "process")
@pytest.mark.parametrize(
    "kind",
    [Kind("contrastive", torch.bfloat16, 64), Kind("ranking", torch.float32, 32), Kind("pairwise", torch.float32, 64)],
    ids=str,
)
def test_the_triton_kernels_are_right(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "ROWS", 16)
    assert self_check._compare(backends.TritonBackend(), kind, CPU) == (True, None)


@pytest.mark.usefixtures("interpreted", "process")
def test_a_wrong_triton_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from sbert_kernels.backends.triton import pairwise

    launch = pairwise.launch

    def wrong(kernel: Any, *arguments: Any, **named: Any) -> None:
        launch(kernel, *arguments, **named)
        if named.get("x_gradient") is not None:
            named["x_gradient"].mul_(1.01)

    monkeypatch.setattr(pairwise, "launch", wrong)
    _, found = self_check._compare(backends.TritonBackend(), Kind("pairwise", torch.float32, 64), CPU)
    assert found is not None
    assert "pairwise in float32 of width 64, cos: the gradient of x differs by 0.01 of its norm" in found


@pytest.mark.usefixtures("process")
def test_every_problem_is_solved_by_torch_operations() -> None:
    """Nothing that eager torch computes in the same type is called wrong, and the problems are what they say."""
    library = Library()
    for kind in self_check.KINDS:
        names = [case.name for case in cases.cases(kind.operation, kind.dtype, multiprocessors=2)]
        assert len({*names}) == len(names) > 0
        assert {case.name for case in cases.cases(kind.operation, kind.dtype)} <= {*names}
    monitored = [
        Kind("contrastive", torch.float32, 64),
        Kind("contrastive", torch.bfloat16, 64),
        Kind("ranking", torch.bfloat16, 32),
        Kind("pairwise", torch.float16, 64),
    ]
    library.self_checked = "thoroughly"
    assert [self_check._compare(library, kind, CPU) for kind in monitored] == [(True, None)] * 4


def test_the_check_is_made_at_the_size_that_the_user_s_kernels_are_compiled_for() -> None:
    def size(operation: str, shape: tuple[int, ...]) -> int:
        x = torch.empty(shape, device="meta")
        return cases.size_of(operation, SimpleNamespace(queries=x, x=x, scores=x))

    for operation in ("contrastive", "pairwise"):
        widths = (1, 32, 300, 768, 8192, 9000)
        assert [size(operation, (9, width)) for width in widths] == [32, 32, 300, 768, 8192, 8192]
    pairs = (0, 64, 65, 1000, 1024, 8192, 8193, 100_000)
    assert [size("ranking", (n,)) for n in pairs] == [48, 48, 112, 1008, 1008, 8176, 8208, 8208]
    (case, *_) = cases.cases("contrastive", torch.bfloat16, 300)
    assert case.problem.queries.shape == (cases.ROWS, 300)


@pytest.mark.usefixtures("process")
def test_other_bits_of_the_same_large_problem_are_a_fault() -> None:
    """As of a race; too few of them to be called wrong otherwise."""

    class Racing(Library):
        self_checked = "thoroughly"

        def load(self) -> Operations:
            right = super().load()

            def contrastive(problem: Any, needs: Any) -> Any:
                self.calls += 1
                found = right.contrastive.contrastive(problem, needs)
                if found.queries is not None and problem.queries.shape[1] >= cases.LEAST_LARGE_WIDTH:
                    found.queries[3, 5] *= 1 + 1e-6 * self.calls
                return found

            return right._replace(contrastive=SimpleNamespace(contrastive=contrastive))

    _, found = self_check._compare(Racing(), Kind("contrastive", torch.float16, 64), CPU)
    assert found is not None
    assert found.endswith("several tiles a block: the queries' gradient has other bits when it is computed again")


@pytest.mark.parametrize("multiprocessors", [2, 78, 114, 132, 148])
def test_each_block_of_a_large_problem_computes_several_tiles(multiprocessors: int) -> None:
    rows = cases.large_rows(multiprocessors)
    down, across = -(-rows // cases.TILE), -(-2 * rows // cases.TILE)
    assert 3 * multiprocessors < down * across <= max(8, 4 * multiprocessors)
    assert down >= 2
    assert rows % cases.TILE != 0 == rows % 16


def test_large_problems_are_wide_and_of_every_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "large_rows", lambda multiprocessors: 32)
    for width, wanted in ((64, 512), (768, 768), (8192, 2048)):
        large = [case for case in cases.cases("contrastive", torch.float16, width, 132) if case.large]
        assert {case.problem.queries.shape[1] for case in large} == {wanted}
        assert {case.block_bytes for case in large} == {None}
    problems = [case.problem.spec for case in large]
    assert {(len(spec.directions), spec.duplicates) for spec in problems} == {(1, "keep"), (1, "mask"), (2, "keep")}
    assert {case.gradients for case in large} == {True, False}


@pytest.mark.parametrize("dtype", cases.ROUNDINGS)
@pytest.mark.parametrize("sabotage", [scaled, one_wrong_row, one_nan])
def test_what_is_a_percent_off_is_wrong_in_every_type(sabotage: Sabotage, dtype: torch.dtype) -> None:
    exact = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)).double()
    rounded = exact.to(dtype)
    unit = cases.ROUNDINGS[dtype]
    right = cases.Value("it", exact, unit)
    assert cases.fault(cases.Value("it", rounded, unit), right) is None
    assert cases.fault(cases.Value("it", sabotage(rounded.float()), unit), right) is not None
    loss = cases.Value("the loss", torch.tensor(2.0, dtype=torch.float64), unit)
    assert cases.fault(cases.Value("the loss", torch.tensor(2.0), unit), loss) is None
    for value in (2.02, float("nan")):
        assert cases.fault(cases.Value("the loss", torch.tensor(value), unit), loss) is not None
