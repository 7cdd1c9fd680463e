"""The time that `bench gpu` has: what is left, what a row will take, which peers are too slow to be timed again."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sbert_kernels import machine
from sbert_kernels.bench.gpu_jobs import LEAST_SECONDS, NOT_RUN, Job

LONG_SECONDS, LONG_ROUNDS = 0.1, 3  # calls that take longer are repeated so often
ROW_SECONDS = 6.0  # no further round of a row starts after them, and no call of a contender that takes half of them
CALLS = 5  # of a contender in a row of long calls: one to warm up, one alone, and the rounds
COMPILE_SECONDS = 20.0  # torch.compile of a loss, with a margin
# A peer this many times slower than ours is not timed at larger sizes, if its call is too long to be the host's doing.
DROP_RATIO, DROP_SECONDS = 5.0, 2e-3
# Time is compared with that of stock, which is told at every size that there is time for.
NEVER_DROPPED = ("ours", "eager")


class Budget:
    """Counts seconds from now on; `clock` is read for the time."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        """Returns the seconds that are left; negative ones if none are."""
        return self._end - self._clock()


class Pace:
    """Foresees how long calls take from calls of other sizes: time grows with N N D, or less."""

    def __init__(self) -> None:
        # Sizes and seconds by contender and likeness.
        self._seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
        self._dropped: dict[tuple[str, str], tuple[int, str]] = {}

    def note(self, job: Job, timings: Mapping[str, machine.Timing]) -> None:
        """Remembers how long the contenders of a job took, and which of them were too slow to be timed again."""
        ours = timings.get("ours", machine.Timing()).median_s
        for name, timing in timings.items():
            if not timing.samples:
                continue
            self._seen.setdefault((name, job.likeness), []).append((_size(job), timing.median_s))
            slow = timing.median_s > max(DROP_RATIO * ours, DROP_SECONDS)  # False where ours did not run
            if slow and name not in NEVER_DROPPED:
                text = f"dropped: {timing.median_s / ours:.3g} times ours at N={job.rows}"
                self._dropped.setdefault((name, job.likeness), (job.rows, text))

    def seconds(self, name: str, job: Job) -> float:
        """Returns what a call should take at most; 0 where nothing alike has been seen.

        Of small sizes the host's time is most of it, which does not grow: the size that promises least is right.
        """
        seen = self._seen.get((name, job.likeness), ())
        return min((seconds * _size(job) / size for size, seconds in seen), default=0.0)

    def why_dropped(self, name: str, job: Job) -> str | None:
        """Returns why a contender is not timed in a job, or None."""
        rows, text = self._dropped.get((name, job.likeness), (job.rows, ""))
        return text if job.rows > rows else None

    def row_seconds(self, job: Job) -> float:
        """Returns what has to be left for a job to begin; infinity where a call of ours would take too long."""
        if 2 * self.seconds("ours", job) > ROW_SECONDS:
            return math.inf
        seen = {name for name, likeness in self._seen if likeness == job.likeness}
        calls = [self.seconds(name, job) for name in seen if self.why_dropped(name, job) is None]
        foreseen = sum(CALLS * seconds for seconds in calls if 2 * seconds <= ROW_SECONDS)
        return max(LEAST_SECONDS[job.kind], foreseen) + (COMPILE_SECONDS if job.compiled else 0.0)


def _size(job: Job) -> float:
    return float(job.rows) ** 2 * job.dim


@dataclass(frozen=True)
class Step:
    """Holds a call that runs forward and backward, and the leaves whose `.grad` it fills."""

    call: Callable[[], object]
    leaves: Sequence[Tensor]


@dataclass
class Timed:
    """Holds the times of a row's contenders, and their peak memory over their inputs, gradients included."""

    timings: dict[str, machine.Timing]
    peaks: dict[str, int]  # bytes; none without a GPU


Make = Callable[[], Step]


def timed(
    makes: Mapping[str, Make | str],
    repeats: int,
    budget: Budget,
    expected: Callable[[str], float] = lambda name: 0.0,
) -> Timed:
    """Times in one process what can be made and run, and that there is time for; says of the rest why not.

    Each contender first runs by itself, so that what breaks one is no matter to the others.
    """
    found = Timed({}, {})
    steps: dict[str, Callable[[], object]] = {}
    for name, make in makes.items():
        if isinstance(make, str):
            found.timings[name] = machine.Timing(error=make)
            continue
        if 2 * expected(name) > min(budget.left(), ROW_SECONDS):
            found.timings[name] = machine.Timing(error=f"{NOT_RUN}: some {expected(name):.1f} s a call")
            continue
        try:
            step = make()
            found.timings[name], peak = _alone(step)
            steps[name] = step.call
        except Exception as error:
            found.timings[name] = machine.Timing(error=reason(error))
            release()
            continue
        if peak is not None:
            found.peaks[name] = peak
    seconds = [found.timings[name].median_s for name in steps]
    room = min(ROW_SECONDS, budget.left())
    if steps and sum(seconds) < room:
        rounds = min(repeats, LONG_ROUNDS) if max(seconds) > LONG_SECONDS else repeats
        found.timings |= machine.measure(steps, repeats=rounds, warmup=0, budget_s=room)
    return found


def _alone(step: Step) -> tuple[machine.Timing, int | None]:
    """Returns the time of one call after one to warm up, and its peak memory in bytes, gradients included."""
    step.call()
    for leaf in step.leaves:
        leaf.grad = None
    timings: dict[str, machine.Timing] = {}
    peak = machine.device_peak(lambda: timings.update(machine.measure({"alone": step.call}, repeats=1, warmup=0)))
    timing = timings["alone"]
    if timing.error:
        raise torch.OutOfMemoryError(timing.error)
    return timing, peak


def reason(error: BaseException) -> str:
    """Returns an exception in one line."""
    if machine.is_out_of_memory(error):
        return machine.OUT_OF_MEMORY
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else repr(error)


def release() -> None:
    """Gives the memory back that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
