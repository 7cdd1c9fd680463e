"""A specification survives its way through a graph of torch.compile."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sbert_kernels.problems._spec import Spec
from sbert_kernels.problems.contrastive import ContrastiveSpec


@dataclass(frozen=True)
class EveryKind(Spec):
    """A field of each type that is allowed."""

    name: str = "cos"
    maybe: str | None = None
    names: tuple[str, ...] = ("a", "b")
    count: int = 3
    part: float = 0.1
    flag: bool = True
    counts: tuple[int, ...] = (1, 2)
    parts: tuple[float, ...] = ()


@pytest.mark.parametrize(
    "spec",
    [
        EveryKind(),
        EveryKind(maybe="x", names=(), flag=False, counts=(), parts=(0.1, -2.0)),
        ContrastiveSpec(),
        ContrastiveSpec(hardness_mode="hard_negatives", hardness_strength=1 / 3, dims=(2, 5), dim_weights=(0.1, 1.0)),
    ],
)
def test_a_specification_comes_back_as_it_was(spec: Spec) -> None:
    again = type(spec).decoded(*spec.encoded())
    assert again == spec
    assert [type(value) for value in vars(again).values()] == [type(value) for value in vars(spec).values()]


def test_a_field_that_no_graph_could_hold_is_refused_when_it_is_declared() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.option must be one of .*, got 'float \| None'"):

        class Wrong(Spec):
            option: float | None = None
