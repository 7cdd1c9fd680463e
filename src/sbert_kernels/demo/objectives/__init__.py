"""What the demo can train. An objective is its data, its losses on either side, and what the model is judged by."""

from __future__ import annotations

from sbert_kernels.demo.objectives.angle import AngleObjective
from sbert_kernels.demo.objectives.base import SIDES, Data, Objective
from sbert_kernels.demo.objectives.mnr import MnrObjective
from sbert_kernels.demo.options import Options

__all__ = ["OBJECTIVES", "SIDES", "Data", "Objective", "objective_of"]

OBJECTIVES: dict[str, type[Objective]] = {"mnr": MnrObjective, "angle": AngleObjective}


def objective_of(options: Options) -> Objective:
    """The objective that these options name."""
    return OBJECTIVES[options.objective](options)
