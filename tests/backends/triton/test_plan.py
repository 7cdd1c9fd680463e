"""What is decided about a call before it runs: the plan, the facts about GPUs, and launches by keyword."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import aot
from sbert_kernels import settings
from sbert_kernels.backends.triton.targets import BY_NAME, Target
from sbert_kernels.problems.contrastive import Needs
from sbert_kernels.problems.scale import Scale

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
    from sbert_kernels.backends.triton.contrastive.planner import make_plan

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
    from sbert_kernels.backends.triton.contrastive.planner import make_plan
    from sbert_kernels.backends.triton.contrastive.run import Program

    problem = aot.problem_of(CASES[name], torch.bfloat16, 384, rows=1000)
    with settings.override(block_bytes=settings.MIB):
        plan = make_plan(problem, needs_of(CASES[name]), H100)
    monkeypatch.setattr(settings, "get", lambda name: pytest.fail(f"{name} is read"))
    with launching.recording(H100) as launches:
        Program(plan).run(problem)
    chunks = [chunk for softmax in plan.softmaxes for chunk in softmax.chunks]
    passes = [launch for launch in launches if launch.kernel.__name__ == plan.way]
    planned = [part for chunk in chunks for part in (*chunk.sweeps, *chunk.weights)]
    assert [(launch.grid, launch.config) for launch in passes] == [(part.grid, part.config) for part in planned]
    redone = [launch.grid for launch in launches if launch.kernel.__name__ == "redo"]
    assert redone == [part.grid for chunk in chunks for part in chunk.redo]
    assert len(planned) > (1 if CASES[name].gradients else 0)


def test_a_plan_is_made_once_for_calls_of_a_kind() -> None:
    """Another scale is the same kind, unless it asks for other kernels; another layout or setting is another one."""
    from sbert_kernels.backends.triton import contrastive, launching

    def programs(**changes: Any) -> int:
        problem = replace(aot.problem_of(CASES["plain"], torch.bfloat16, 384, rows=1000), **changes)
        with launching.recording(H100):
            contrastive.contrastive(problem, Needs(True, True))
        return len(contrastive._programs)

    contrastive._programs.clear()
    assert [programs(), programs(), programs(scale=Scale(30.0))] == [1, 1, 1]
    assert programs(scale=Scale(100.0)) == 2  # rows may have to be done again
    assert programs(scale=Scale(torch.empty((), device="meta"))) == 3  # nothing bounds it
    assert programs(queries=torch.empty(1000, 400, dtype=torch.bfloat16, device="meta")[:, :384]) == 4
    with settings.override(block_bytes=settings.MIB):
        assert programs() == 5
    assert programs() == 5


def test_chunks_cover_all_rows_once_and_fit_into_their_memory() -> None:
    from sbert_kernels.backends.triton.contrastive.planner import make_plan

    problem = aot.problem_of(CASES["four directions"], torch.bfloat16, 64, rows=1000)
    with settings.override(block_bytes=4 * settings.MIB):
        (softmax,) = make_plan(problem, Needs(True, True), H100).softmaxes
    assert [chunk.begin for chunk in softmax.chunks[1:]] == [chunk.end for chunk in softmax.chunks[:-1]]
    assert (softmax.chunks[0].begin, softmax.chunks[-1].end) == (0, 1000)
    assert len(softmax.chunks) > 2
    of_weights = [buffer for buffer in softmax.chunks[0].buffers if buffer.name.startswith("weights")]
    assert sum(math.prod(b.shape) * b.dtype.itemsize for b in of_weights) <= 4 * settings.MIB
    # One product in all writes to new memory: the columns of another term, or of another chunk, are added.
    assert sum(sum(chunk.overwrites) for chunk in softmax.chunks) == 1


def test_chunks_grow_with_the_gpu_until_the_columns_gradient_costs_little() -> None:
    """At least 4096 rows if a sixteenth of the memory holds them, and what 512 MiB hold in any case."""
    from sbert_kernels.backends.triton.contrastive.planner import make_plan

    def rows(n: int, gib: int) -> int:
        problem = aot.problem_of(CASES["plain"], torch.bfloat16, 768, rows=n)
        with settings.override(weights="sweep"):
            return (
                make_plan(problem, Needs(True, True), Target("cuda", 90, memory=gib << 30)).softmaxes[0].chunks[0].end
            )

    assert [rows(16384, 80), rows(65536, 80), rows(262144, 80), rows(262144, 24)] == [16384, 4096, 4096, 3072]


def test_memory_of_a_chunk_is_used_again_by_the_next_one() -> None:
    from sbert_kernels.backends.triton.contrastive.planner import make_plan

    problem = aot.problem_of(CASES["four directions"], torch.bfloat16, 384, rows=4096)
    for way in settings.WEIGHTS:
        with settings.override(block_bytes=8 * settings.MIB, weights=way):
            plan = make_plan(problem, Needs(True, True), H100)
        assert plan.workspace_bytes < 16 * settings.MIB
        for chunk in plan.softmaxes[0].chunks:
            taken: list[tuple[int, int]] = []
            for buffer in (*plan.buffers, *chunk.buffers):
                if way == "weigh" and buffer.name.startswith("weights"):
                    continue  # over the dot products
                begin = buffer.offset * buffer.dtype.itemsize
                span = 1 + sum((n - 1) * s for n, s in zip(buffer.shape, buffer.strides, strict=True))
                taken.append((begin, begin + span * buffer.dtype.itemsize))
            taken.sort()
            assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(taken))
            assert taken[-1][1] <= plan.workspace_bytes


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
