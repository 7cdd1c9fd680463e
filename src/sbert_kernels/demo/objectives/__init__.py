"""The losses that the demo can train: of each its data, its form in both libraries, and what judges the model."""

from __future__ import annotations

from sbert_kernels.demo.objectives.angle import AngleObjective
from sbert_kernels.demo.objectives.base import Data, Objective
from sbert_kernels.demo.objectives.in_batch import InBatchObjective
from sbert_kernels.demo.options import Options

__all__ = ["OBJECTIVES", "Data", "Objective", "objective_of"]

OBJECTIVES: dict[str, type[Objective]] = {
    "matryoshka": InBatchObjective,
    "mnr": InBatchObjective,
    "angle": AngleObjective,
}


def objective_of(options: Options) -> Objective:
    """Returns the objective that these options name."""
    return OBJECTIVES[options.loss](options)
