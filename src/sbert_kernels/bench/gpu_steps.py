"""What the jobs of `bench gpu` run: the losses of both libraries and of their peers, and steps of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sbert_kernels import contrastive_loss, settings
from sbert_kernels.bench import contrastive, gpu_peers, ranking
from sbert_kernels.bench.gpu_jobs import Job, Training, small
from sbert_kernels.bench.gpu_pace import Budget, Make, Pace, Step
from sbert_kernels.bench.peers import compiled, gradients_of
from sbert_kernels.workloads.recipes import OURS, STOCK

# In the error of a backend that was asked for by name; what its self-check says in it of kernels that are no good.
REFUSAL, FAULTS = "cannot serve this call", ("WRONG RESULTS", "in its self-check")


@dataclass
class Bench:
    """Holds what the jobs share."""

    device: str
    repeats: int
    budget: Budget
    backends: tuple[str | None, ...] = ("triton",)  # of ours, the preferred one first; None: as the library chooses
    serving: dict[str, str | None] = field(default_factory=dict)  # the first that serves a job, by name
    peers: dict[str, gpu_peers.MakeLoss] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)  # peers that were found to compute the same
    missing: dict[str, str] = field(default_factory=dict)  # why a peer is not timed
    pace: Pace = field(default_factory=Pace)


# -- losses -----------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Computes our in-batch loss where documents of one id are no negatives of one another's queries."""

    def forward(self, features: list[dict[str, Tensor]], labels: None) -> Tensor:
        """Returns the loss; every two rows have the same document id."""
        queries, documents = (column["embedding"] for column in features)
        return contrastive_loss(queries, documents, duplicates="mask", document_ids=_ids(len(documents), documents))


def _ids(rows: int, like: Tensor) -> Tensor:
    return torch.arange(rows, device=like.device) // 2


def _masked_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Returns stock's similarities (N, N), with the same exclusions."""
    from sentence_transformers.util import cos_sim

    ids = _ids(len(b), b)
    own = torch.eye(len(b), dtype=torch.bool, device=b.device)
    return cos_sim(a, b).masked_fill((ids[:, None] == ids) & ~own, -math.inf)


class UnderAutocast(nn.Module):
    """Computes a loss as a training step does under autocast: forward in it, backward after it."""

    def __init__(self, loss: nn.Module, device: str) -> None:
        super().__init__()
        self.loss, self.device = loss, device

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """Returns the loss."""
        with torch.autocast(self.device.partition(":")[0], torch.bfloat16):
            value: Tensor = self.loss(features, labels)
        return value


def loss_of(library: str, job: Job, device: str, *, exact: bool = False) -> nn.Module:
    """Returns the loss of a job out of a library (the name of a module); ``exact``: not under autocast."""
    if isinstance(job.case, ranking.Case):
        return ranking.make_loss(library, job.case)
    if job.mask and library == OURS:
        loss: nn.Module = Masked()
    else:
        options = {"similarity_fct": _masked_similarity}
        loss = contrastive.make_loss(library, replace(job.in_batch, options=options) if job.mask else job.in_batch)
    return UnderAutocast(loss, device) if job.autocast and not exact else loss


# -- steps ------------------------------------------------------------------------------------------------------------

Inputs = Callable[[nn.Module], Step]


def inputs_of(job: Job, device: str) -> Inputs:
    """Draws the embeddings of a job, and returns how to make the step of a loss of them."""
    case = job.case
    if isinstance(case, ranking.Case):
        columns, labels = ranking.make_inputs(case, device)
        return lambda loss: Step(*ranking.make_step(loss, columns, labels))
    features = contrastive.make_inputs(job.in_batch, contrastive.dtype_of(job.in_batch), device)
    return lambda loss: Step(*contrastive.make_step(loss, job.in_batch, features))


def backend_of(bench: Bench, job: Job) -> str | None:
    """Returns the backend that computes ours in a job: that of the job, or the first that serves it.

    Which one serves it a call on few rows tells. None: as the library chooses.
    """
    if job.backend is not None:
        return job.backend
    *preferred, last = bench.backends
    if job.way or job.kind == "weights":
        return last  # only the Triton kernels have several ways
    if preferred and isinstance(job.case, Training):
        return None  # whose losses are not called here
    few = small(job) or job
    if few.name not in bench.serving:
        bench.serving[few.name] = next((name for name in preferred if _serves(bench, few, name)), last)
    return bench.serving[few.name]


def _serves(bench: Bench, job: Job, backend: str | None) -> bool:
    """Returns False if a backend refuses a job; what else goes wrong is told where it is measured."""
    try:
        with settings.override(backend=backend):
            loss_and_gradients(loss_of(OURS, job, bench.device), job, bench.device)
    except Exception as error:
        return not refused(str(error))
    return True


def refused(text: str) -> bool:
    """Returns True for the text of an error by which a backend leaves a job to others, and not for a fault of it."""
    return REFUSAL in text and not any(fault in text for fault in FAULTS)


def our_settings(bench: Bench, job: Job) -> dict[str, Any]:
    """Returns the settings of ours in a job: the backend that is measured, and the way of the weights that it names."""
    return {"backend": backend_of(bench, job), **({"weights": job.way} if job.way else {})}


def as_ours(bench: Bench, job: Job, step: Step) -> Step:
    """Returns the step, run with `our_settings`."""
    values = our_settings(bench, job)

    def call() -> object:
        with settings.override(**values):
            return step.call()

    return Step(call, step.leaves)


def ours(bench: Bench, job: Job, step_of: Inputs) -> Step:
    """Returns a step of our loss."""
    return as_ours(bench, job, step_of(loss_of(OURS, job, bench.device)))


def contenders(bench: Bench, job: Job, step_of: Inputs, free_bytes: float) -> dict[str, Make | str]:
    """Returns how to make the step of each contender of a job, or why there is none."""
    case = job.in_batch if isinstance(job.case, contrastive.Case) else None
    matrix = too_large(case, free_bytes) if case else None

    def compiled_step() -> Step:
        found: list[Step] = []

        def make(loss: nn.Module) -> Callable[[], Tensor]:
            found.append(step_of(loss))
            return found[0].call  # type: ignore[return-value]

        step, why_not = compiled(loss_of(STOCK, job, bench.device), make)
        if step is None:
            raise RuntimeError(why_not)
        return found[0]

    makes: dict[str, Make | str] = {"ours": partial(ours, bench, job, step_of)}
    makes["eager"] = matrix or (lambda: step_of(loss_of(STOCK, job, bench.device)))
    if job.compiled:
        makes["compiled"] = matrix or compiled_step
    if job.peers and case:
        for name, make_loss in bench.peers.items():
            makes[name] = _peer(bench, job, name, make_loss, step_of)
        makes |= bench.missing
    untold = (gpu_peers.OTHER_LOSS, gpu_peers.NOT_INSTALLED)  # the latter is told once, when the command starts
    return {name: bench.pace.why_dropped(name, job) or make for name, make in makes.items() if make not in untold}


def _peer(bench: Bench, job: Job, name: str, make_loss: gpu_peers.MakeLoss, step_of: Inputs) -> Make | str:
    """Returns how to make a peer's step, or why it is not timed."""
    if name not in bench.checked:
        return "not checked: there was no time for it"
    loss = gpu_peers.PEERS[name].why_not(job.in_batch) or make_loss(job.in_batch)
    return loss if isinstance(loss, str) else partial(step_of, loss)


def too_large(case: contrastive.Case, free_bytes: float) -> str | None:
    """Returns what one N x N matrix needs if it alone cannot fit, or None; eager torch holds several."""
    needed = case.batch * case.batch * (1 + case.negatives) * contrastive.dtype_of(case).itemsize
    return f"needs {needed / 2**30:.3g} GiB" if needed > free_bytes else None


def free_bytes() -> float:
    """Returns the bytes that torch can still allocate."""
    if not torch.cuda.is_available():
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


# -- values -----------------------------------------------------------------------------------------------------------


def loss_and_gradients(loss: nn.Module, job: Job, device: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Returns loss and gradients in float64; computed in ``dtype``, or in the inputs' own."""
    case = job.case
    if isinstance(case, ranking.Case):
        columns, labels = ranking.make_inputs(case, device)
        call, leaves = ranking.make_step(loss, [column.to(dtype or column.dtype) for column in columns], labels)
    else:
        inputs = contrastive.make_inputs(job.in_batch, contrastive.dtype_of(job.in_batch), device)
        columns_ = [{key: value.to(dtype or value.dtype) for key, value in column.items()} for column in inputs]
        call, leaves = contrastive.make_step(loss, job.in_batch, columns_)
    return [call().double(), *(gradient.double() for gradient in gradients_of(leaves))]
