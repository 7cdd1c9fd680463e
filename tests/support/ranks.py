"""Test files that run as several ranks, in processes of their own."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import runpy
import sys
from collections import Counter
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

HUNG_AFTER = 1800  # seconds


def rank_context() -> BaseContext:
    """Returns how the processes of ranks are started: forked from one that has imported the libraries, if possible.

    To import them takes longer than most tests of ranks. The process runs nothing before it forks. All ranks have the
    environment of the first.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload(
        ["pytest", "torch.distributed.fsdp", "transformers.models.bert.modeling_bert", "sbert_kernels.losses"]
    )
    return context


def run_file_in_ranks(context: BaseContext, file: str, world: int, folder: Path, inputs: Any = None) -> list[Any]:
    """Runs a file as a script ``FILE RANK WORLD FOLDER`` for each rank; returns what each wrote to ``FOLDER/RANK.pt``.

    As a script, because pytest imports a test file under a name that a new process cannot import. ``inputs``, if
    given, are there as ``FOLDER/inputs.pt``. The import path is that of this process, so ``support`` is there too.
    """
    if inputs is not None:
        torch.save(inputs, folder / "inputs.pt")
    processes = []
    for rank in range(world):
        processes.append(context.Process(target=runpy.run_path, args=(file,), kwargs={"run_name": "__main__"}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [file, str(rank), str(world), str(folder)])  # which a child inherits
            processes[-1].start()
    try:
        ready = {process.sentinel: process for process in processes}
        # One that fails leaves the others waiting for it.
        while ready and not any(process.exitcode for process in processes):
            ended = multiprocessing.connection.wait(ready, timeout=HUNG_AFTER)
            assert ended, f"{file} hangs: no rank of {world} has ended within {HUNG_AFTER} s"
            for sentinel in ended:
                ready.pop(sentinel).join()
        assert [process.exitcode for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


class Collectives(TorchDispatchMode):
    """Counts collectives, whoever starts them, but for the broadcast of buffers before a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d" and "broadcast" not in function._schema.name:
            self.counts[function._schema.name.removeprefix("c10d::")] += 1
        return function(*args, **(kwargs or {}))
