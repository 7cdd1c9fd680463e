"""How kernels are started: what is remembered of a start is what Triton itself would start for such arguments.

Triton compiles the kernel for a GPU of compute capability 9.0; in place of the driver is a list of what reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
JITFunction = pytest.importorskip("triton.runtime.jit").JITFunction

from sbert_kernels.backends.triton import launching  # noqa: E402
from sbert_kernels.backends.triton.launching import Config, Prepared, launch  # noqa: E402
from sbert_kernels.backends.triton.targets import Target  # noqa: E402

CONFIG = Config((("BLOCK", 32),), num_warps=4, num_stages=1)


class Vectors(NamedTuple):
    """Parameters that belong together."""

    data: Any
    stride: Any
    norms: Any = None


def scale_vectors(x, factor, n, flag, out, BLOCK: tl.constexpr):
    """A kernel with a parameter of each kind."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(x.data + place * x.stride, mask=place < n, other=0.0)
    if x.norms is not None:
        found = found * tl.load(x.norms + place, mask=place < n, other=0.0)
    tl.store(out + place, found * factor * flag, mask=place < n)


class Driver:
    """Stands for a GPU, whose number is that of a tensor on the CPU, and for the code that calls its driver."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.loaded = 0
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        self.loaded += 1
        return 1, self.loaded, 32, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launcher(x: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any) -> None:
            self.calls.append(((x, y, z), stream, function, packed, rest[3:]))

        return launcher

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", found, raising=False)  # from Triton 3.5 on
    if triton.runtime.driver.active is not found:
        monkeypatch.setattr(triton.runtime.driver, "active", found)
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "_KERNELS", {})
    return found


@pytest.fixture
def kernel(driver: Driver) -> Iterator[Any]:
    found = JITFunction(scale_vectors)
    yield found
    launching._KERNELS.clear()
    found.device_caches.clear()  # while there is a driver to unload them with


def arguments(**changed: Any) -> dict[str, Any]:
    memory = torch.zeros(256)
    given = {"x": Vectors(memory, 2), "factor": 0.5, "n": 40, "flag": 3, "out": torch.zeros(64), **changed}
    assert memory.data_ptr() % 16 == 0
    return given


UNALIGNED = torch.zeros(256)[1:]
CHANGES: dict[str, dict[str, Any]] = {
    "another float": {"factor": 0.25},
    "other tensors": {"x": Vectors(torch.ones(256), 2)},
    "an unaligned tensor": {"out": UNALIGNED},
    "an unaligned tensor in a tuple": {"x": Vectors(UNALIGNED, 2)},
    "another type": {"out": torch.zeros(64, dtype=torch.bfloat16)},
    "a tensor for None": {"x": Vectors(torch.zeros(256), 2, torch.zeros(256))},
    "a stride of one": {"x": Vectors(torch.zeros(256), 1)},
    "a number of 16s": {"n": 48},
    "a number of 64 bits": {"n": 2**40},
    "True for one": {"flag": True},
    "one": {"flag": 1},
    "a whole float": {"factor": 1.0},
}


def test_a_remembered_start_is_the_one_that_triton_makes(driver: Driver, kernel: Any) -> None:
    for name, changed in CHANGES.items():
        given = arguments(**changed)
        for _ in range(2):
            launch(kernel, (3, 2), config=CONFIG, **given)
        looked_up, driver.calls = driver.calls, []
        kernel[(3, 2)](*given.values(), 32, num_warps=4, num_stages=1)
        assert looked_up == 2 * driver.calls, name
        driver.calls = []
    assert driver.calls == []
    # What Triton tells apart, and no more, has been compiled.
    assert driver.loaded == len(kernel.device_caches[-1][0])


def test_a_second_start_does_not_go_through_triton(
    driver: Driver, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = Prepared(kernel, (3,), config=CONFIG, factor=0.5, n=40, flag=3)
    moving = {name: value for name, value in arguments().items() if name in ("x", "out")}
    launch(kernel, (3,), config=CONFIG, **arguments())
    prepared(**moving)
    monkeypatch.setattr(kernel, "run", lambda *_, **options: pytest.fail("goes through Triton"))
    launch(kernel, (3,), config=CONFIG, **arguments(factor=0.25))
    prepared(**moving)
    prepared(**moving | {"out": torch.zeros(64)})
    assert len(driver.calls) == 5
    assert len({call[:4] for call in driver.calls}) == 1
    assert driver.calls[3][4] == driver.calls[1][4]
    with pytest.raises(pytest.fail.Exception, match="goes through Triton"):
        prepared(**moving | {"out": UNALIGNED})
    with pytest.raises(pytest.fail.Exception, match="goes through Triton"):
        launch(kernel, (3,), config=Config((("BLOCK", 32),), num_warps=8, num_stages=1), **arguments())


def test_who_is_hooked_into_launches_is_told_of_each(driver: Driver, kernel: Any) -> None:
    heard: list[Any] = []
    prepared = Prepared(kernel, (3,), config=CONFIG, **{k: v for k, v in arguments().items() if k != "out"})
    prepared(out=torch.zeros(64))
    kernel.add_pre_run_hook(lambda *given, **options: heard.append(given))
    launch(kernel, (3,), config=CONFIG, **arguments())
    prepared(out=torch.zeros(64))
    assert len(heard) == 2
    assert len(driver.calls) == 3


@pytest.mark.parametrize("prepared", [False, True])
def test_an_idle_launch_leaves_out_the_driver_alone(driver: Driver, kernel: Any, prepared: bool) -> None:
    meta = {"x": Vectors(torch.empty(256, device="meta"), 2), "out": torch.empty(64, device="meta")}
    fixed = {"factor": 0.5, "n": 40, "flag": 3}
    start = Prepared(kernel, (3,), config=CONFIG, **fixed)
    with launching.idling(Target("cuda", 90)) as names:
        for _ in range(3):
            if prepared:
                start(**meta)
            else:
                launch(kernel, (3,), config=CONFIG, **fixed, **meta)
    assert names == ["scale_vectors"] * 3
    assert not driver.calls
    with launching.recording(Target("cuda", 90)) as launches:
        start(**meta)
    assert launches[0].arguments == fixed | meta
    assert launches[0].constants == {"BLOCK": 32}


def test_a_changing_number_does_not_fill_the_memory(
    driver: Driver, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_MOST_KINDS", 4)
    for n in range(33, 45):
        launch(kernel, (3,), config=CONFIG, **arguments(n=n))
    (known,) = launching._KERNELS.values()
    assert 0 < len(known.starts) <= 4
    assert [call[4][2] for call in driver.calls] == list(range(33, 45))
