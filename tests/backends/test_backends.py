"""Which backend serves a call, and what is said of those that don't."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from sbert_kernels import contrastive_loss, cosent_loss, native, use_backend
from sbert_kernels.__main__ import main
from sbert_kernels.backends import BACKENDS, OPERATIONS, choose, self_check
from sbert_kernels.backends import cuda as cuda_backend
from sbert_kernels.backends import triton as triton_backend
from sbert_kernels.backends.cpu import contrastive as cpu

Pretend = Callable[..., None]
NEEDS_TRITON = pytest.mark.skipif(triton_backend.installed_version() is None, reason="Triton is not installed")


def run_alone(code: str, **environment: str) -> str:
    """What a process of its own prints: importing the Triton kernels decides for a whole process how they run."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables | environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def triton_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """Sets the version of Triton that is seen; None: it is not installed. Without the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    seen: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in seen:
            raise importlib.metadata.PackageNotFoundError(name)
        return seen[name]

    def pretend(version: str | None, distribution: str = "triton") -> None:
        triton_backend.installed_version.cache_clear()
        seen.clear()
        if version is not None:
            seen[distribution] = version

    monkeypatch.setattr(importlib.metadata, "version", version)
    pretend("3.4.0")
    yield pretend
    triton_backend.installed_version.cache_clear()


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """Pretends that there is a GPU of a compute capability, and Triton kernels that serve everything on it."""

    def forget() -> None:
        triton_backend._why_not_on_gpu.cache_clear()
        cuda_backend._why_not_gpu.cache_clear()
        cuda_backend._why_not_driver.cache_clear()

    def pretend(*capability: int, hip: str | None = None) -> None:
        forget()
        monkeypatch.setattr(cuda_backend.library, "load", lambda: "there is no library")
        properties = SimpleNamespace(gcnArchName=f"{hip}:sramecc+:xnack-")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(self_check, "why_not", lambda *_: None)
        for operation in OPERATIONS:
            kernels = SimpleNamespace(why_not=lambda problem: None)
            monkeypatch.setitem(sys.modules, f"{triton_backend.__name__}.{operation}", kernels)
            monkeypatch.setattr(triton_backend, operation, kernels, raising=False)

    yield pretend
    forget()


@pytest.fixture
def cuda_library(monkeypatch: pytest.MonkeyPatch, triton_is: Pretend, gpu_of: Pretend) -> Pretend:
    """Pretends that there is a GPU, and the CUDA library with a driver that serves it; calls may have an obstacle."""

    def pretend(
        obstacle: str | None = None,
        driver: str | None = None,
        capability: tuple[int, int] = (9, 0),
        asked_for: str = "1",
    ) -> None:
        gpu_of(*capability)
        monkeypatch.setenv("SBERT_KERNELS_CUDA", asked_for)
        monkeypatch.setattr(cuda_backend.library, "load", lambda: None)
        monkeypatch.setattr(cuda_backend.library, "why_not_driver", lambda: driver)
        kernels = SimpleNamespace(why_not=lambda problem: None if problem is None else obstacle)
        monkeypatch.setitem(sys.modules, f"{cuda_backend.__name__}.contrastive", kernels)
        monkeypatch.setattr(cuda_backend, "contrastive", kernels, raising=False)

    return pretend


def test_every_backend_has_the_operations_that_it_declares() -> None:
    code = (
        "import importlib\n"
        "from sbert_kernels.backends import BACKENDS, OPERATIONS\n"
        "for backend in BACKENDS:\n"
        "    if backend.why_not_on('cpu', True) is None:\n"
        "        for operation in OPERATIONS:\n"
        "            module = importlib.import_module(f'{type(backend).__module__}.{operation}')\n"
        "            assert callable(getattr(module, operation)), (backend.name, operation)\n"
        "            assert getattr(backend.operations, operation) is module, (backend.name, operation)\n"
        "        print(backend.name)"
    )
    elsewhere = {"cuda", "triton"} if triton_backend.installed_version() is None else {"cuda"}  # runs on a GPU only
    expected = [b.name for b in BACKENDS if b.name not in elsewhere]
    assert run_alone(code, TRITON_INTERPRET="1").split() == expected


def test_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_not", lambda problem: None)
    assert choose("contrastive").backend.name == "cpu"
    monkeypatch.setattr(cpu, "why_not", lambda problem: "there is no compiler")
    choice = choose("contrastive")
    assert choice.backend.name == "blockwise"
    assert "preference" in choice.reason
    assert "not cpu: there is no compiler" in choice.reason
    with pytest.raises(ValueError, match="backend='cpu' cannot serve this call: there is no compiler"):
        choose("contrastive", "cpu")
    monkeypatch.setenv("SBERT_KERNELS_BACKEND", "reference")
    assert choose("contrastive").backend.name == "reference"
    assert "SBERT_KERNELS_BACKEND" in choose("contrastive").reason
    with use_backend("blockwise"):
        assert choose("contrastive").backend.name == "blockwise"
        with use_backend(None):
            assert "preference" in choose("contrastive").reason
        assert choose("contrastive", "reference").backend.name == "reference"


def test_unknown_names_are_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"name='tritn' is not a backend: expected one of \['cpu', 'cuda', 'triton', "),
        use_backend("tritn"),
    ):
        pass
    with pytest.raises(ValueError, match="operation='ranking_loss' is unknown"):
        choose("ranking_loss")


def test_without_a_gpu_triton_names_the_obstacle_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch, triton_is: Pretend
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cpu, "why_not", lambda problem: "there is no compiler")
    assert "; not triton: there is no GPU (TRITON_INTERPRET=1" in choose("contrastive").reason
    for operation in OPERATIONS:
        with pytest.raises(ValueError, match=r"backend='triton' cannot serve this call: there is no GPU \(TRITON_INT"):
            choose(operation, "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="cannot serve this call: the inputs are on cpu"):
        choose("contrastive", "triton")
    assert triton_backend.why_not_on("mps:0", True) == "the inputs are on mps:0"


@pytest.mark.parametrize(
    ("version", "distribution", "reason"),
    [
        (None, "triton", "Triton is not installed"),
        ("3.3.1", "triton", "Triton 3.3.1 is older than 3.4"),
        ("2.10.0", "triton", "Triton 2.10.0 is older than 3.4"),
        ("3.4.0", "triton", None),
        ("3.10.0+git1a2b3c", "triton", None),
        ("3.5.1", "pytorch-triton-rocm", None),  # as torch for ROCm installs it
        ("3.3.0", "pytorch-triton-rocm", "Triton 3.3.0 is older than 3.4"),
    ],
)
def test_triton_must_be_there_and_new_enough(
    triton_is: Pretend, gpu_of: Pretend, version: str | None, distribution: str, reason: str | None
) -> None:
    gpu_of(9, 0)
    triton_is(version, distribution)
    assert triton_backend.why_not_on("cuda:0", False) == reason


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((7, 0), None, "the GPU's compute capability is 7.0, and 7.5 is needed"),
        ((7, 5), None, None),
        ((12, 0), None, None),
        ((6, 0), "gfx942", None),  # AMD's numbers mean something else
        ((11, 0), "gfx1100", "the GPU is gfx1100, and the kernels are made for gfx942"),
    ],
)
def test_gpus_without_the_tensor_cores_are_refused(
    triton_is: Pretend, gpu_of: Pretend, capability: tuple[int, int], hip: str | None, reason: str | None
) -> None:
    gpu_of(*capability, hip=hip)
    assert triton_backend.why_not_on("cuda:0", False) == reason
    assert triton_backend.why_not_on("cuda:0", True) == (None if hip else reason)  # who asks for it may try
    assert choose("contrastive", device="cuda").backend.name == ("triton" if reason is None else "blockwise")


def test_the_interpreter_serves_only_by_name(monkeypatch: pytest.MonkeyPatch, triton_is: Pretend) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.why_not_on("cpu", True) is None
    assert "only when asked for by name" in triton_backend.why_not_on("cpu", False)
    monkeypatch.setattr(cpu, "why_not", lambda problem: "there is no compiler")
    choice = choose("contrastive")
    assert choice.backend.name == "blockwise"
    assert "not triton: Triton's interpreter is for tests" in choice.reason


def test_a_gpu_without_triton_is_served_by_torch_ops_and_one_line_says_so(
    triton_is: Pretend, caplog: pytest.LogCaptureFixture
) -> None:
    triton_is(None)
    problem = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        for operation in OPERATIONS * 2:
            assert choose(operation, problem=problem).backend.name == "blockwise"
    (line,) = caplog.messages
    assert line.startswith("The triton kernels are not in use: Triton is not installed. Torch operations compute")


PROBLEM = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32)


def chosen(problem: object = PROBLEM) -> list[str]:
    """Names of the backends that serve each operation, asked twice."""
    return [choose(operation, problem=problem).backend.name for operation in OPERATIONS * 2][: len(OPERATIONS)]


def test_the_cuda_library_serves_in_batch_losses_where_it_is_there(
    cuda_library: Pretend, caplog: pytest.LogCaptureFixture
) -> None:
    cuda_library()
    assert chosen() == ["cuda", "triton", "triton"]
    assert choose("contrastive", "cuda", PROBLEM).backend.name == "cuda"
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call: only the contrastive operation has"):
        choose("ranking", "cuda", PROBLEM)
    assert not caplog.messages  # what it has no kernel for is nothing to tell at each start


def test_unasked_the_cuda_library_serves_by_name_alone(cuda_library: Pretend, caplog: pytest.LogCaptureFixture) -> None:
    cuda_library(asked_for="")
    assert chosen() == ["triton"] * 3
    assert choose("contrastive", "cuda", PROBLEM).backend.name == "cuda"
    assert "; not cuda: they have not been timed on a card yet" in choose("contrastive", problem=PROBLEM).reason
    assert not caplog.messages


def test_a_library_that_is_asked_for_and_not_there_is_told_once(
    cuda_library: Pretend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda_library()
    monkeypatch.setattr(cuda_backend.library, "load", lambda: "there is no nvcc")
    assert chosen() == ["triton"] * 3
    assert caplog.messages == [
        "contrastive is not computed by the cuda kernels: there is no nvcc. The triton kernels compute it."
    ]


@pytest.mark.parametrize(
    ("pretended", "reason"),
    [
        ({"capability": (8, 0)}, "the GPU's compute capability is 8.0, and the CUDA kernels are made for 9.0"),
        ({"capability": (10, 0)}, "the GPU's compute capability is 10.0, and the CUDA kernels are made for 9.0"),
    ],
    ids=["older GPU", "newer GPU"],
)
def test_where_the_cuda_library_cannot_run_triton_serves_without_a_word(
    cuda_library: Pretend, caplog: pytest.LogCaptureFixture, pretended: dict, reason: str
) -> None:
    cuda_library(**pretended)
    assert chosen() == ["triton"] * 3
    assert not caplog.messages
    assert f"; not cuda: {reason}" in choose("contrastive", problem=PROBLEM).reason
    with pytest.raises(ValueError, match=f"backend='cuda' cannot serve this call: {reason}"):
        choose("contrastive", "cuda", PROBLEM)


@pytest.mark.parametrize("obstacle", [{"obstacle": "guide_queries are given"}, {"driver": "the driver is too old"}])
def test_what_the_cuda_library_leaves_to_triton_is_told_once(
    cuda_library: Pretend, caplog: pytest.LogCaptureFixture, obstacle: dict
) -> None:
    cuda_library(**obstacle)
    (reason,) = obstacle.values()
    assert chosen() == ["triton"] * 3
    assert caplog.messages == [
        f"contrastive is not computed by the cuda kernels: {reason}. The triton kernels compute it."
    ]
    with pytest.raises(ValueError, match=f"backend='cuda' cannot serve this call: {reason}"):
        choose("contrastive", "cuda", PROBLEM)


@pytest.mark.parametrize("library", [True, False])
def test_where_triton_serves_nothing_either_one_line_tells(
    cuda_library: Pretend, gpu_of: Pretend, triton_is: Pretend, caplog: pytest.LogCaptureFixture, library: bool
) -> None:
    cuda_library() if library else gpu_of(9, 0)
    triton_is(None)
    assert chosen() == ["blockwise"] * 3
    (line,) = caplog.messages
    assert line.startswith("The triton kernels are not in use: Triton is not installed. Torch operations compute")


def test_without_compiled_kernels_one_line_says_why_what_computes_instead_and_what_it_costs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native.cpu, "load", lambda: "there is no C++ compiler")
    x, labels = torch.randn(4, 3), torch.arange(4.0)
    for _ in range(2):
        contrastive_loss(x, x)
        cosent_loss(x, x.flip(0), labels)
    assert caplog.messages == [
        "The cpu kernels are not in use: there is no C++ compiler. Torch operations compute the same in blocks "
        "instead: without N x N matrices, but mostly no faster than sentence-transformers' own losses."
    ]


@NEEDS_TRITON
def test_float64_falls_back_with_one_line_in_the_log() -> None:
    code = (
        "import logging, sys, torch\n"
        "from types import SimpleNamespace\n"
        "from sbert_kernels import backends\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "backends.TritonBackend.why_not_on = lambda *_: None\n"
        "backends.CudaBackend.why_not_on = lambda *_: 'there is no library'\n"
        "cuda, labels = torch.device('cuda'), torch.ones(1)\n"
        "problem = SimpleNamespace(device=cuda, dtype=torch.float64, scores=[0.0], labels=labels)\n"
        "for operation in backends.OPERATIONS:\n"
        "    for _ in range(2):\n"
        "        print(backends.choose(operation, problem=problem).backend.name)\n"
        "    try:\n"
        "        backends.choose(operation, 'triton', problem)\n"
        "    except ValueError as error:\n"
        "        print(error)"
    )
    assert run_alone(code).splitlines() == [
        line
        for operation in OPERATIONS
        for line in (
            f"{operation} is not computed by the triton kernels: float64 is computed in torch ops.",
            "blockwise",
            "blockwise",
            "backend='triton' cannot serve this call: float64 is computed in torch ops.",
        )
    ]


def test_nothing_needs_triton_and_nothing_imports_it_without_need() -> None:
    code = (
        "import sys\n"
        "import importlib.metadata\n"
        "HIDE\n"
        "import torch, sbert_kernels\n"
        "from sbert_kernels import backends\n"
        "from sbert_kernels.__main__ import main\n"
        "x = torch.randn(4, 8, requires_grad=True)\n"
        "(sbert_kernels.contrastive_loss(x, x) + sbert_kernels.cosent_loss(x, x.flip(0), torch.arange(4))).backward()\n"
        "main(['info'])\n"
        "print('imported:', sys.modules.get('triton') is not None)"
    )
    hide = (
        "sys.modules['triton'] = None\n"
        "known = importlib.metadata.version\n"
        "def version(name):\n"
        "    if 'triton' in name: raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "importlib.metadata.version = version"
    )
    without = run_alone(code.replace("HIDE", hide), SBERT_KERNELS_BACKEND="blockwise", CUDA_VISIBLE_DEVICES="")
    assert "else triton: fused kernels on a GPU; not here: Triton is not installed" in without
    with_it = run_alone(code.replace("HIDE", ""), SBERT_KERNELS_BACKEND="blockwise", CUDA_VISIBLE_DEVICES="")
    assert with_it.endswith("imported: False\n")


def test_info_says_why_a_backend_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, triton_is: Pretend, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cpu, "why_not", lambda problem: "there is no compiler")
    main(["info"])
    printed = capsys.readouterr().out
    assert "  contrastive: blockwise (first in order of preference" in printed
    assert "    else cpu: C++ that stays in the cache; not here: there is no compiler\n" in printed
    assert "    else triton: fused kernels on a GPU; not here: there is no GPU (TRITON_INTERPRET=1" in printed
    assert "    else reference: eager torch, holds every matrix, the ground truth; only when asked for\n" in printed
    assert "capability" not in printed.replace("cpu_capability", "")


def test_info_tells_the_gpu_from_the_cpu(
    monkeypatch: pytest.MonkeyPatch, triton_is: Pretend, gpu_of: Pretend, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_of(9, 0)
    monkeypatch.setattr(cpu, "why_not", lambda problem: None)
    main(["info"])
    printed = capsys.readouterr().out
    assert "  gpu: a GPU\n" in printed
    assert "compute capability: 9.0\n" in printed
    assert "  contrastive on cpu: cpu (first" in printed
    assert "    else triton: fused kernels on a GPU; not here: the inputs are on cpu" in printed
    assert "  ranking on cuda: triton (first in order of preference: fused kernels on a GPU; not cpu: the in" in printed
    assert "    else cpu: C++ that stays in the cache; not here: the inputs are on cuda\n" in printed


@pytest.mark.usefixtures("compiled")
def test_info_says_which_products_the_processor_has(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info"])
    instructions = cpu.bfloat16_instructions()
    there = (
        f"float32, bfloat16x3, bfloat16 (by {instructions})\n" if instructions else "float32; there are no instructio"
    )
    assert f"  their matmul precisions: {there}" in capsys.readouterr().out
    with torch.backends.mkldnn.flags(enabled=False):
        main(["info"])
    assert "  their matmul precisions: float32; there are no instructions for bfloat16" in capsys.readouterr().out


def test_info_survives_a_request_that_cannot_be_served(
    monkeypatch: pytest.MonkeyPatch, triton_is: Pretend, capsys: pytest.CaptureFixture[str]
) -> None:
    triton_is(None)
    monkeypatch.setenv("SBERT_KERNELS_BACKEND", "triton")
    assert main(["info"]) == 0
    assert "  pairwise: none (use_backend() or SBERT_KERNELS_BACKEND='triton' cannot" in capsys.readouterr().out
