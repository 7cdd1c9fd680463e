"""The bounds of the logits: when one shift serves all rows, that it keeps sums finite, and when they may vanish."""

from __future__ import annotations

import math

import pytest
import torch

from sbert_kernels.problems.contrastive import LEAST_EXPONENT, ContrastiveProblem, ContrastiveSpec
from sbert_kernels.problems.scale import Scale


def problem_of(scale: float | torch.Tensor, documents: int = 2, **options: object) -> ContrastiveProblem:
    columns = torch.empty(1, 1).expand(documents, 1)
    return ContrastiveProblem(columns[:1], (columns,), Scale(scale), spec=ContrastiveSpec(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scale", "hardness", "shift", "sums_may_vanish"),
    [
        (20.0, 0.0, 0.0, False),
        (torch.tensor(50.0), 3.0, 0.0, False),
        (53.5, 0.0, 0.0, True),
        (60.0, 0.0, 0.0, True),
        (70.0, 5.0, 15.0, True),
        (100.0, 0.0, 40.0, True),
        (math.exp(math.log(100.0)), 0.0, 40.0, True),  # of a temperature that is learned as its logarithm
    ],
)
def test_a_bounded_problem(scale: float | torch.Tensor, hardness: float, shift: float, sums_may_vanish: bool) -> None:
    problem = problem_of(scale, hardness_mode="all_negatives", hardness_strength=hardness)
    assert problem.bounded
    assert problem.shift == pytest.approx(shift)
    assert problem.sums_may_vanish == sums_may_vanish


@pytest.mark.parametrize(
    "problem",
    [
        problem_of(101.1),
        problem_of(97.0, hardness_mode="all_negatives", hardness_strength=4.5),
        problem_of(1.0, similarity="dot"),
        problem_of(torch.empty((), device="meta")),  # a value that nobody has read
    ],
    ids=["scale", "hardness", "dot products", "unread"],
)
def test_an_unbounded_problem(problem: ContrastiveProblem) -> None:
    assert not problem.bounded
    assert not problem.sums_may_vanish


@pytest.mark.parametrize("columns", [1, 2**18, 2**26, 2**40])
@pytest.mark.parametrize("scale", [1.0, 53.0, 70.0, 100.0])
def test_the_sums_of_any_number_of_columns_are_finite_and_those_that_may_vanish_are_known(
    scale: float, columns: int
) -> None:
    problem = problem_of(scale, columns)
    assert math.exp(scale - problem.shift) * columns < 0.5 * torch.finfo(torch.float32).max
    least = -scale - problem.shift  # of the logits, and so of the logarithm of a row's sum
    assert (least < LEAST_EXPONENT) == problem.sums_may_vanish
