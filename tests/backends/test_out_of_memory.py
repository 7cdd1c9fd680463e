"""Out of memory on the CPU: torch's error, for which a smaller batch is tried, and a process that goes on as before.

In a process of its own, whose address space is limited to a little more than it has; run as a script, this file is it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

DIM = 96
ROOM = (0, 1, 2, 3, 4, 5, 6, 8, 12, 48)  # MiB


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_every_limit_fits_or_is_an_error_of_torchs(compiled: None) -> None:
    pytest.importorskip("accelerate")
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        timeout=300,
        # Memory that is free, but malloc's, would be given to a call whatever the limit.
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes: dict[str, list[str]] = json.loads(done.stdout)
    for name, found in outcomes.items():
        assert set(found) == {"fits", "tried again"}, (name, found)


def main() -> None:
    import resource

    from accelerate.utils.memory import should_reduce_batch_size

    from sbert_kernels import losses

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.embedded import Embedded

    def room(mebibytes: float | None) -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = resource.RLIM_INFINITY if mebibytes is None else size + int(mebibytes * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    torch.set_num_threads(2)
    torch.manual_seed(0)
    columns = [torch.randn(20000, DIM, requires_grad=True) for _ in range(3)]
    labels = torch.rand(20000)
    model = Embedded()
    plain = losses.MultipleNegativesRankingLoss(model)
    directions = losses.MultipleNegativesRankingLoss(model, directions=("query_to_doc", "doc_to_doc"))
    cases: dict[str, tuple[Any, int, int, str]] = {
        "in-batch": (plain, 2, 700, "highest"),
        "in-batch, bfloat16 where there is": (plain, 2, 700, "medium"),
        "hard negatives": (directions, 3, 700, "high"),
        "ranking": (losses.CoSENTLoss(model), 2, 20000, "highest"),
        "angle": (losses.AnglELoss(model), 2, 20000, "highest"),
    }
    outcomes: dict[str, list[str]] = {}
    for name, (loss, count, most, precision) in cases.items():
        torch.set_float32_matmul_precision(precision)

        def value(rows: int, loss: Callable[..., Any] = loss, count: int = count) -> float:
            result = loss([{"embedding": column[:rows]} for column in columns[:count]], labels[:rows])
            result.backward()
            for column in columns:
                column.grad = None
            return result.item()

        before = value(most)
        outcomes[name] = []
        for number, mebibytes in enumerate(ROOM):
            room(mebibytes)
            try:
                # Of another size each time: products of other shapes, whose kernels need memory for their code.
                value(most - 1 - number)
                outcome = "fits"
            except BaseException as error:
                outcome = "tried again" if should_reduce_batch_size(error) else f"{type(error).__name__}: {error}"
            room(None)
            outcomes[name].append(outcome)
            if value(most) != before:
                outcomes[name].append("another value afterwards")
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
