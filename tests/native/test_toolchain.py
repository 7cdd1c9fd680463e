"""What CUDA kernels are compiled with is found wherever it may be, and what is missing is said in one clause."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sbert_kernels.native import toolchain
from sbert_kernels.native.building import BuildError
from support.toolkit import make_cutlass, make_toolkit

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="CUDA kernels are compiled on Linux only")


@pytest.fixture(autouse=True)
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without CUDA: no variable, no package, no nvcc on PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH", "CUTLASS_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(toolchain, "_packages", lambda name: [tmp_path / "site-packages" / name])
    monkeypatch.setattr(toolchain.shutil, "which", lambda program: None)


@pytest.fixture
def cutlass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = make_cutlass(tmp_path / "cutlass")
    monkeypatch.setenv("CUTLASS_PATH", str(path))
    return path


def why_not() -> str:
    with pytest.raises(BuildError) as error:
        toolchain.find()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_variable_names_the_toolkit_and_is_not_passed_over(
    tmp_path: Path, cutlass: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    make_toolkit(tmp_path / "site-packages" / "nvidia" / "cu13")  # which would do
    monkeypatch.setenv(variable, str(tmp_path / "empty"))
    assert why_not() == f"{variable}={tmp_path / 'empty'} has no bin/nvcc"
    home = make_toolkit(tmp_path / "named")
    monkeypatch.setenv(variable, str(home))
    found = toolchain.find()
    assert (found.home, found.version, found.nvcc) == (home, "13.0.88", home / "bin" / "nvcc")
    assert (found.cutlass, found.cutlass_version) == (cutlass, "4.2.0")
    assert found.cudart_folder == home / "lib"


def test_the_packages_of_pypi_come_before_the_path(
    tmp_path: Path, cutlass: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_toolkit(tmp_path / "site-packages" / "nvidia" / "cu13")
    monkeypatch.setattr(toolchain.shutil, "which", lambda program: pytest.fail("looked on the path"))
    assert toolchain.find().home == home


def test_a_script_on_the_path_is_asked_where_the_compiler_is(
    tmp_path: Path, cutlass: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_toolkit(tmp_path / "toolkit")
    script = tmp_path / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(toolchain.shutil, "which", lambda program: str(script))
    assert toolchain.find().home == home
    script.write_text("#!/bin/sh\n")
    assert why_not() == f"{script} --dryrun does not say where it is installed (CUDA_HOME can)"


@pytest.mark.parametrize("part", toolchain._PARTS)
def test_each_part_of_the_toolkit_that_is_missing_is_named_with_its_package(
    tmp_path: Path, cutlass: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    home = make_toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(home))
    place = toolchain._part(home, part)
    place.rename(place.with_name("away"))
    if part == "nvcc":
        assert why_not() == f"CUDA_HOME={home} has no bin/nvcc"
    else:
        assert why_not() == f"the CUDA toolkit in {home} has no {part} (from PyPI: {toolchain._PARTS[part][1]})"


def test_no_nvcc_and_no_cutlass_are_clauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not() == "there is no nvcc (CUDA_HOME names a toolkit; from PyPI: nvidia-cuda-nvcc)"
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "toolkit")))
    assert why_not() == "there is no CUTLASS (CUTLASS_PATH names it; pip install --no-deps nvidia-cutlass)"
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    assert why_not() == f"CUTLASS_PATH={tmp_path} has no include/cutlass/version.h"
    monkeypatch.delenv("CUTLASS_PATH")
    make_cutlass(tmp_path / "site-packages" / "cutlass_library" / "source")
    assert toolchain.find().cutlass == tmp_path / "site-packages" / "cutlass_library" / "source"


def test_an_nvcc_that_does_not_run_is_a_clause(tmp_path: Path, cutlass: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(home))
    (home / "bin" / "nvcc").chmod(0o644)
    assert f"{home / 'bin' / 'nvcc'} cannot be run" in why_not()
