"""The contrastive operation with weights by the CUDA kernels (`csrc/cuda`), for compute capability 9.0.

They take the place of one kernel of Triton's, the sweep; all others that a call needs are Triton's. This file works
without Triton; the other modules import it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

from ... import settings
from ...native import cuda as library
from ...problems.contrastive import ContrastiveProblem
from .. import triton
from .._backend import Backend, Operations, Problem

CAPABILITY = (9, 0)  # what the kernels are compiled for runs on no other


class CudaBackend(Backend):
    """Serves in-batch losses of half-precision products on the GPUs that it is made for."""

    name = "cuda"
    summary = "CUDA C++ for Hopper GPUs (H100, H200), beside Triton's kernels"
    device = "cuda"
    substitute = "triton"
    has_kernels_for = ("contrastive",)
    self_checked = "thoroughly"

    def why_not_on(self, device: str, by_name: bool) -> str | None:
        """Returns why it cannot run on a device ("cuda:0"), or None if it can."""
        return why_not_on(device, by_name)

    def why_not(self, operation: str, problem: Problem | None) -> str | None:
        """Returns why the kernels cannot serve a problem where they run, or None if they can."""
        if operation not in self.has_kernels_for:
            return "only the contrastive operation has a CUDA kernel"
        from . import contrastive

        return _why_not_library() or contrastive.why_not(cast("ContrastiveProblem | None", problem))

    def kernel_files(self) -> tuple[Path, ...]:
        """Returns the files that its results follow from: the compiled library, its package, and Triton's."""
        compiled = library.library()
        return (*super().kernel_files(), *triton.TritonBackend().kernel_files(), *((compiled,) if compiled else ()))

    def library(self) -> str | None:
        """Returns one line about the compiled library: where it lies, or why there is none."""
        return library.describe()

    def load(self) -> Operations:
        """Imports the kernels and returns their modules; the operations that it has none for are Triton's."""
        from ..triton import pairwise, ranking
        from . import contrastive

        return Operations(contrastive=contrastive, ranking=ranking, pairwise=pairwise)


def why_not_on(device: str, by_name: bool) -> str | None:
    """Returns why the kernels cannot run on a device ("cuda:0"), or None if they can; ``by_name`` as for Triton."""
    if device.partition(":")[0] != "cuda":
        import torch

        return f"the inputs are on {device}" if torch.cuda.is_available() else "there is no GPU"
    reason = triton.why_not_on(device, by_name) or _why_not_gpu(device)
    if reason is None and not by_name:
        asked_for = settings.get("cuda")
        if asked_for is None:
            return "they have not been timed on a card yet, and serve where SBERT_KERNELS_CUDA=1 says so"
        if asked_for:
            return None  # then somebody has to hear what is missing: `CudaBackend.why_not` says that
    # The library last: to look for it takes longer than all else.
    return reason or library.load()


@cache
def _why_not_gpu(device: str) -> str | None:
    """Returns why a GPU cannot run the kernels, or None; a GPU stays what it is, and every call of a loss asks."""
    import torch

    if torch.version.hip is not None:
        return "the GPU is AMD's"
    capability = torch.cuda.get_device_capability(torch.device(device))
    if capability == CAPABILITY:
        return None
    has, needed = (".".join(map(str, numbers)) for numbers in (capability, CAPABILITY))
    return f"the GPU's compute capability is {has}, and the CUDA kernels are made for {needed}"


def _why_not_library() -> str | None:
    """Returns why there is no library that the driver can run, or None."""
    return library.load() or _why_not_driver()


@cache
def _why_not_driver() -> str | None:
    return library.why_not_driver()
