"""The CUDA kernels are compiled by request only, refused where they would be slow, and never in anybody's way."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sbert_kernels import native, settings
from sbert_kernels.native import building, cuda, toolchain
from sbert_kernels.native.building import BuildError
from sbert_kernels.native.cuda import CudaLibrary
from support.toolkit import PTXAS, make_cutlass, make_toolkit

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="CUDA kernels are compiled on Linux only")
compiles = pytest.mark.skipif(building.why_not_compile() is not None, reason="there is nothing to compile with")


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    return make_toolkit(tmp_path / "toolkit")


@pytest.fixture
def fresh(tmp_path: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> CudaLibrary:
    """A library that this process has not loaded yet: sources, package and cache of its own, and a toolkit."""
    for name in ("csrc/common", "csrc/cuda/tiny", "package"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("CUTLASS_PATH", str(make_cutlass(tmp_path / "cutlass")))
    monkeypatch.setenv("SBERT_KERNELS_CACHE", str(tmp_path / "cache"))
    for name in ("SBERT_KERNELS_CUDA", "SBERT_KERNELS_CUDA_ARCHS", "SBERT_KERNELS_COMPILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MAX_JOBS", "1")
    monkeypatch.setattr(cuda, "_register_fakes", lambda: None)  # the tiny library has none of the operators
    monkeypatch.setattr(cuda, "_LOAD_SCRIPT", "")  # which imports torch
    (tmp_path / "csrc" / "common" / "tiny.h").write_text("#define TINY 7\n")
    (tmp_path / "csrc" / "cuda" / "tiny" / "tiny.cu").write_text(
        '#include "../../common/tiny.h"\nextern "C" int sbert_kernels_tiny_cuda() { return TINY; }\n'
    )
    (tmp_path / "csrc" / "cuda" / "bindings.cpp").write_text('extern "C" int sbert_kernels_tiny_cpp() { return 0; }\n')
    return CudaLibrary(tmp_path / "csrc", tmp_path / "package")


def again(library: CudaLibrary) -> CudaLibrary:
    """Returns the same library as another process would see it."""
    return CudaLibrary(library.csrc, library.package)


def test_nothing_is_looked_for_unless_it_is_asked_for(fresh: CudaLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find", lambda: pytest.fail("looked for a compiler"))
    assert fresh.load() == (
        "the package holds no CUDA kernels that fit; SBERT_KERNELS_CUDA=1 compiles them on first use, which takes "
        "some minutes"
    )
    with settings.override(cuda=True, compile=False):
        assert fresh.load() == "compiling on first use is forbidden by SBERT_KERNELS_COMPILE=0"
    assert fresh.library() is None


@compiles
def test_compiled_by_request_it_serves_later_without_one_and_without_a_compiler(
    fresh: CudaLibrary, toolkit: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with settings.override(cuda=True):
        assert fresh.load() is None
    (line,) = (line for line in caplog.messages if line.startswith("Compiling the CUDA kernels"))
    assert "(90a)" in line
    assert "this takes some minutes: 1 kernels, 1 at a time" in line
    assert "Without SBERT_KERNELS_CUDA=1 nothing is compiled" in line
    shutil.rmtree(toolkit)
    second = again(fresh)
    assert second.load() is None
    assert second.library() == fresh.library()
    assert second.describe() == f"{fresh.library()} (compiled on first use)"
    with settings.override(cuda=True):
        assert again(fresh).load() is None


def test_switched_off_it_is_not_used_even_if_it_is_loaded(fresh: CudaLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "_loaded", Path("loaded"))
    assert fresh.load() is None
    monkeypatch.setenv("SBERT_KERNELS_CUDA", "0")
    assert fresh.load() == "SBERT_KERNELS_CUDA=0"
    assert fresh.describe() == "none (SBERT_KERNELS_CUDA=0)"


def test_the_name_changes_with_all_that_the_code_depends_on_and_not_with_torch(
    fresh: CudaLibrary, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "ARCHITECTURES", ("90a", "100f"))
    names = {fresh.prebuilt_name()}
    assert "-90a-nvcc13.0.88-cutlass4.2.0.so" in next(iter(names))
    (fresh.csrc / "common" / "tiny.h").write_text("#define TINY 8\n")
    names.add(fresh.prebuilt_name())
    (fresh.csrc / "cuda" / "tiny" / "kernel.cuh").write_text("// a header\n")
    names.add(fresh.prebuilt_name())
    for flags in ("_NVCC_FLAGS", "_CXX_FLAGS", "_LINK_FLAGS"):
        monkeypatch.setattr(cuda, flags, (*getattr(cuda, flags), "-g"))
        names.add(fresh.prebuilt_name())
    with settings.override(cuda_archs="90a,100f"):
        names.add(fresh.prebuilt_name())
    (toolkit / "bin" / "version").write_text("13.5.37")
    names.add(fresh.prebuilt_name())
    assert len(names) == 8
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert fresh.prebuilt_name() in names


def test_a_prebuilt_library_serves_whatever_it_was_compiled_with(
    fresh: CudaLibrary, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", opened.append)
    prebuilt = fresh.package / fresh.prebuilt_name().replace("90a", "90a.100f")
    prebuilt.write_bytes(b"")
    shutil.rmtree(toolkit)
    assert fresh.load() is None
    assert opened == [str(prebuilt)]
    assert fresh.describe() == f"{prebuilt} (prebuilt)"


def test_a_prebuilt_library_of_other_sources_or_a_corrupt_one_is_a_reason(fresh: CudaLibrary) -> None:
    other = fresh.package / fresh.prebuilt_name()
    other.write_bytes(b"not a library")
    reason = fresh.load() or ""
    assert reason.startswith(f"{other} cannot be loaded: ")
    assert "SBERT_KERNELS_CUDA=1" in reason
    (fresh.csrc / "common" / "tiny.h").write_text("#define TINY 8\n")
    reason = again(fresh).load() or ""
    assert reason.startswith(f"the prebuilt {other.name} is for other sources or another platform (wanted _cuda-")


@compiles
@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (PTXAS.replace("0 bytes spill stores", "16 bytes spill stores"), "_Z4tinyv spills registers (16 bytes stored"),
        (
            PTXAS.replace("0 bytes spill loads", "8 bytes spill loads"),
            "spills registers (0 bytes stored, 8 bytes loaded)",
        ),
        (
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
            "a call in the function '_Z4tinyv'\n" + PTXAS,
            "its tensor-core instructions are serialised: ptxas info    : (C7510) Potential Performance Loss",
        ),
        ("", "ptxas did not say what registers it uses"),
        (PTXAS + "ptxas info : (C7508) Potential Performance Loss: in '_Z4tinyv'\n", "(C7508)"),
    ],
)
def test_a_kernel_that_spills_or_waits_is_not_built_and_not_the_next_time_either(
    fresh: CudaLibrary, toolkit: Path, tmp_path: Path, says: str, reason: str
) -> None:
    (toolkit / "bin" / "says").write_text(says)
    (tmp_path / "objects").mkdir()
    for _ in range(2):  # the second time no compiler runs
        with pytest.raises(BuildError, match=r"^tiny\.cu: ") as error:
            fresh.build(tmp_path / "library.so", tmp_path / "log", tmp_path / "objects")
        assert reason in str(error.value)
        assert "\n" not in str(error.value)
        assert building.reason_in(tmp_path / "log") == f"error: {error.value}".rstrip(".")
    assert len((toolkit / "bin" / "compiled").read_text().splitlines()) == 1
    assert not (tmp_path / "library.so").exists()


@compiles
def test_only_what_changed_is_compiled_again_where_objects_are_kept(
    fresh: CudaLibrary, toolkit: Path, tmp_path: Path
) -> None:
    (tmp_path / "objects").mkdir()
    (fresh.csrc / "cuda" / "tiny" / "apart.cu").write_text('extern "C" int sbert_kernels_apart() { return 0; }\n')
    compiled = toolkit / "bin" / "compiled"

    def build() -> list[str]:
        compiled.write_text("")
        fresh.build(tmp_path / "library.so", tmp_path / "log", tmp_path / "objects")
        return sorted(Path(line).name for line in compiled.read_text().splitlines())

    assert build() == ["apart.cu", "tiny.cu"]
    assert build() == []
    header = fresh.csrc / "common" / "tiny.h"
    later = header.stat().st_mtime + 10
    os.utime(header, (later, later))
    assert build() == ["tiny.cu"]
    os.utime(toolkit / "bin" / "nvcc", (later, later))
    assert build() == ["apart.cu", "tiny.cu"]


@compiles
def test_the_first_error_of_nvcc_is_the_reason(fresh: CudaLibrary, tmp_path: Path) -> None:
    (fresh.csrc / "cuda" / "tiny" / "tiny.cu").write_text("int broken() { return missing_name; }\n")
    with pytest.raises(BuildError, match=r"error: .*missing_name"):
        fresh.build(tmp_path / "library.so", tmp_path / "log")


def test_what_is_missing_is_a_clause(fresh: CudaLibrary, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with settings.override(cuda=True, cuda_archs="80,90a"):
        assert fresh.load() == "SBERT_KERNELS_CUDA_ARCHS=80,90a: there are kernels for 90a only"
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu126")
    reason = "torch 2.9.1+cu126 is too old for the CUDA kernels, which need >= 2.10"
    assert again(fresh).load() == reason
    assert fresh.why_not_compile() in (reason, building.why_not_compile())
    monkeypatch.setattr(torch, "__version__", "2.14.0.dev20261101+cu130")
    (toolkit / "bin" / "nvcc").unlink()
    with settings.override(cuda=True):
        assert again(fresh).load() in (f"CUDA_HOME={toolkit} has no bin/nvcc", building.why_not_compile())


@pytest.mark.parametrize("free", ["32000000", "7000000", "1000"])
def test_no_more_compilers_run_than_there_are_processors_and_memory_for(
    monkeypatch: pytest.MonkeyPatch, free: str
) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(Path, "read_text", lambda self: f"MemTotal: 64000000 kB\nMemAvailable:   {free} kB\n")
    assert [cuda._jobs(20), cuda._jobs(1)] == [{"32000000": 8, "7000000": 2, "1000": 1}[free], 1]
    monkeypatch.setenv("MAX_JOBS", "3")
    assert cuda._jobs(20) == 3
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.raises(BuildError, match="MAX_JOBS='all' is not a number"):
        cuda._jobs(20)


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ([0, 13000], "there is no NVIDIA driver"),
        (
            [12080, 13000],
            "the NVIDIA driver serves CUDA 12.8, and the CUDA kernels need CUDA 13 (driver r580 or newer)",
        ),
        ([13000, 13050], None),
        ([14000, 13000], None),
    ],
)
def test_a_driver_of_an_older_major_version_cannot_run_them(
    monkeypatch: pytest.MonkeyPatch, versions: list[int], reason: str | None
) -> None:
    monkeypatch.setattr(cuda.LIBRARY, "load", lambda: None)
    operators = SimpleNamespace(driver_version=lambda: versions)
    monkeypatch.setitem(torch.ops.__dict__, "sbert_kernels_cuda", operators)
    assert cuda.why_not_driver() == reason


def test_without_the_library_no_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.LIBRARY, "load", lambda: "there is none")
    assert cuda.why_not_driver() == "there is none"


@pytest.fixture
def loaded() -> None:
    """Skips where the CUDA kernels of this checkout are not there."""
    reason = native.cuda.load()
    if reason is not None:
        pytest.skip(f"no CUDA kernels: {reason}")


@pytest.mark.usefixtures("loaded")
def test_the_operators_answer_beside_any_torch_and_without_a_driver() -> None:
    assert torch.ops.sbert_kernels_cuda.tile() == [128, 128]
    driver, runtime = torch.ops.sbert_kernels_cuda.driver_version()
    assert runtime >= 13000
    assert (native.cuda.why_not_driver() is None) == (driver >= runtime // 1000 * 1000)


def weights_arguments(device: str) -> tuple[object, ...]:
    rows, factor = torch.empty(4, 8, dtype=torch.bfloat16, device=device), torch.empty(4, device=device)
    options = (20.0, 20.0, [0, 0, 0], [0, 0, 0], 1.0, None, None, 0, None, None)
    sums = torch.empty(1, 4, device=device)
    return rows, rows, factor, factor, *options, torch.empty_like(rows @ rows.T), sums, None


@pytest.mark.usefixtures("loaded")
def test_tensors_without_data_are_taken_and_those_of_a_cpu_are_not() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    operator = torch.ops.sbert_kernels_cuda.contrastive_weights
    with FakeTensorMode():
        assert operator(*weights_arguments("cuda")) is None
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        operator(*weights_arguments("cpu"))
    # The bindings themselves: every argument has come through, with lists and what may be missing.
    with pytest.raises(RuntimeError, match="rows must be on a CUDA device"):
        operator.default._op_dk(torch._C.DispatchKey.CUDA, *weights_arguments("cpu"))
