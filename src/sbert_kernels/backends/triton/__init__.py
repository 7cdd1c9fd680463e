"""The operations as Triton kernels: NVIDIA and AMD GPUs from one source, and Triton's interpreter for tests.

This file works without Triton; the other modules import it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from functools import cache
from typing import cast

from ...problems.contrastive import ContrastiveProblem
from ...problems.pairwise import PairwiseProblem
from ...problems.ranking import RankingProblem
from .._backend import Backend, Operations, Problem
from .targets import AMD_ARCHS, OLDEST_CAPABILITY

OLDEST_TRITON = (3, 4)
# Names that it is installed by; torch for ROCm and for Windows comes with a build of its own.
DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-windows")


class TritonBackend(Backend):
    """Serves most of what lies on a GPU."""

    name = "triton"
    summary = "fused kernels on a GPU"
    device = "cuda"
    self_checked = "quickly"

    def why_not_on(self, device: str, by_name: bool) -> str | None:
        """Returns why it cannot run on a device ("cuda:0"), or None if it can."""
        return why_not_on(device, by_name)

    def why_not(self, operation: str, problem: Problem | None) -> str | None:
        """Returns why the kernels cannot serve a problem where Triton runs, or None if they can."""
        from . import contrastive, pairwise, ranking

        if operation == "contrastive":
            return contrastive.why_not(cast("ContrastiveProblem | None", problem))
        if operation == "ranking":
            return ranking.why_not(cast("RankingProblem | None", problem))
        return pairwise.why_not(cast("PairwiseProblem | None", problem))

    def load(self) -> Operations:
        """Imports the kernels and returns their modules."""
        from . import contrastive, pairwise, ranking

        return Operations(contrastive=contrastive, ranking=ranking, pairwise=pairwise)


def why_not_on(device: str, by_name: bool) -> str | None:
    """Returns why the kernels cannot run on a device ("cuda:0"), or None if they can.

    ``by_name``: the backend was asked for, so that the interpreter (TRITON_INTERPRET=1) may serve tensors on the CPU.
    """
    reason = _why_not_version(installed_version())
    if reason is not None:
        return reason
    kind = device.partition(":")[0]
    if kind == "cuda":
        return _why_not_on_gpu(device, by_name)
    if kind != "cpu":
        return f"the inputs are on {device}"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        return None if by_name else "Triton's interpreter is for tests, and serves only when asked for by name"
    import torch

    where = "the inputs are on cpu" if torch.cuda.is_available() else "there is no GPU"
    return f"{where} (TRITON_INTERPRET=1 and the backend's name run it on a CPU, slowly, for tests)"


@cache
def installed_version() -> str | None:
    """Triton's version, without importing it; read once, because every call of an operation asks."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@cache
def _why_not_version(version: str | None) -> str | None:
    if version is None:
        return "Triton is not installed"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_TRITON:
        return f"Triton {version} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    return None


@cache
def _why_not_on_gpu(device: str, by_name: bool) -> str | None:
    """Returns why the kernels cannot run on a GPU, or None; a GPU stays what it is, and every call of a loss asks."""
    import torch

    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(torch.device(device)).gcnArchName.partition(":")[0]
        made_for = f"the kernels are made for {', '.join(AMD_ARCHS)}"
        return None if name in AMD_ARCHS or by_name else f"the GPU is {name}, and {made_for}"
    capability = torch.cuda.get_device_capability(torch.device(device))
    if capability < OLDEST_CAPABILITY:
        has, needed = (".".join(map(str, numbers)) for numbers in (capability, OLDEST_CAPABILITY))
        return f"the GPU's compute capability is {has}, and {needed} is needed"
    return None
