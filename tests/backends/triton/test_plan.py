"""What is decided about a call before it runs: the plan, the facts about GPUs, and launches by keyword."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import aot
from sbert_kernels import settings
from sbert_kernels.backends.triton.targets import BY_NAME, Target
from sbert_kernels.problems.contrastive import Needs

pytestmark = pytest.mark.usefixtures("interpreted")

H100 = Target("cuda", 90)
CASES = {case.name: case for case in aot.CASES}


def parts_of(value: Any) -> list[Any]:
    """Everything that a plan consists of."""
    children = [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else []
    children += list(value) if isinstance(value, tuple) else []
    return [value, *(part for child in children for part in parts_of(child))]


def needs_of(case: aot.Case) -> Needs:
    return Needs(True, True, False, "scale" in case.options) if case.gradients else Needs()


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_hashable_and_without_tensors(name: str) -> None:
    from sbert_kernels.backends.triton.contrastive.plan import make_plan

    first, second = (
        make_plan(aot.problem_of(CASES[name], torch.bfloat16, 384, rows=1000), needs_of(CASES[name]), H100)
        for _ in range(2)
    )
    assert first == second
    assert hash(first) == hash(second)
    assert not [part for part in parts_of(first) if isinstance(part, Tensor)]
    other = make_plan(aot.problem_of(CASES[name], torch.bfloat16, 384, rows=1001), needs_of(CASES[name]), H100)
    assert other != first


@pytest.mark.parametrize("name", CASES)
def test_running_a_plan_reads_no_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbert_kernels.backends.triton import launching
    from sbert_kernels.backends.triton.contrastive.plan import make_plan
    from sbert_kernels.backends.triton.contrastive.run import run

    problem = aot.problem_of(CASES[name], torch.bfloat16, 384, rows=1000)
    with settings.override(block_bytes=settings.MIB):
        plan = make_plan(problem, needs_of(CASES[name]), H100)
    monkeypatch.setattr(settings, "get", lambda name: pytest.fail(f"{name} is read"))
    with launching.recording(H100) as launches:
        run(plan, problem)
    sweeps = [launch for launch in launches if launch.kernel.__name__ == "sweep"]
    planned = [
        sweep
        for softmax in plan.softmaxes
        for sweep in (*softmax.statistics, *(sweep for chunk in softmax.chunks for sweep in chunk.sweeps))
    ]
    assert [(launch.grid, launch.config) for launch in sweeps] == [(sweep.grid, sweep.config) for sweep in planned]
    assert len(planned) > (1 if CASES[name].gradients else 0)


def test_chunks_cover_all_rows_once_and_fit_into_their_memory() -> None:
    from sbert_kernels.backends.triton.contrastive.plan import make_plan

    problem = aot.problem_of(CASES["four directions"], torch.bfloat16, 64, rows=1000)
    with settings.override(block_bytes=4 * settings.MIB):
        (softmax,) = make_plan(problem, Needs(True, True), H100).softmaxes
    assert [chunk.begin for chunk in softmax.chunks[1:]] == [chunk.end for chunk in softmax.chunks[:-1]]
    assert (softmax.chunks[0].begin, softmax.chunks[-1].end) == (0, 1000)
    assert len(softmax.chunks) > 2
    assert 2 * sum(softmax.weight_entries) <= 4 * settings.MIB
    # One product in all writes to new memory: the columns of another term, or of another chunk, are added.
    assert sum(sum(chunk.overwrites) for chunk in softmax.chunks) == 1


def test_diagonals_at_unequal_distances_are_refused() -> None:
    from sbert_kernels.backends.triton.contrastive.plan import Diagonals

    assert Diagonals.of((3, 10, 17)) == Diagonals(3, 7, 3)
    assert Diagonals.of(()) == Diagonals()
    with pytest.raises(ValueError, match="equal distances"):
        Diagonals.of((3, 10, 18))


def test_a_launch_names_the_parameters_that_are_wrong() -> None:
    from sbert_kernels.backends.triton import launching, pairwise

    given = dict.fromkeys(("x", "x_stride", "y", "y_stride", "n", "eps", "cos", "dot", "HALF", "D", "angel"))
    with launching.recording(H100), pytest.raises(TypeError, match=r"\['angel', 'angle'\]"):
        launching.launch(pairwise.pair_scores, (1,), config=pairwise.CONFIG, **given)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (("cuda", 90), "H100"),
        (("cuda", 87), "A10"),
        (("cuda", 103), "B200"),
        (("cuda", 121), "RTX 5090"),
        (("cuda", 70), "T4"),
        (("hip", "gfx942"), "MI300X"),
        (("hip", "gfx950"), "MI300X"),
        (("interpreter", 0), "H100"),
    ],
)
def test_a_gpu_without_a_row_is_treated_as_the_next_older_one(target: tuple[str, Any], name: str) -> None:
    assert Target(*target).gpu is BY_NAME[name]
    assert Target(*target).processors == BY_NAME[name].multiprocessors
    assert Target(*target, 7).processors == 7
