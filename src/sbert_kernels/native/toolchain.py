"""Finds what the CUDA kernels are compiled with: nvcc with its headers, CUTLASS, and the C++ compiler that links.

Nothing of it has to be installed for the library to be used. It may come from the system or from PyPI:
docs/packaging.md lists the packages.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .building import BuildError

# What has to be below the folder of a toolkit, at one of several places, and the PyPI package that puts it there.
_PARTS = {
    "nvcc": (("bin/nvcc",), "nvidia-cuda-nvcc"),
    "cicc": (("nvvm/bin/cicc",), "nvidia-nvvm"),
    "crt/host_config.h": (("include/crt/host_config.h",), "nvidia-cuda-crt"),
    "cuda_runtime.h": (("include/cuda_runtime.h",), "nvidia-cuda-runtime"),
    "libcudart_static.a": (("lib64/libcudart_static.a", "lib/libcudart_static.a"), "nvidia-cuda-runtime"),
    "cuda/std": (("include/cccl/cuda/std", "include/cuda/std"), "nvidia-cuda-cccl"),
}


@dataclass(frozen=True)
class Toolchain:
    """What to compile CUDA kernels with.

    Attributes:
        home: The folder of the CUDA toolkit.
        version: Its version, as ``13.0.88``.
        cutlass: The folder of CUTLASS, with ``include`` in it.
        cutlass_version: Its version, as ``4.2.0``.
    """

    home: Path
    version: str
    cutlass: Path
    cutlass_version: str

    @property
    def nvcc(self) -> Path:
        """Returns the compiler's program."""
        return self.home / "bin" / "nvcc"

    @property
    def cutlass_includes(self) -> list[Path]:
        """Returns the folders of CUTLASS's headers."""
        return [self.cutlass / "include", self.cutlass / "tools" / "util" / "include"]

    @property
    def cudart_folder(self) -> Path:
        """Returns the folder of ``libcudart_static.a``: ``lib64``, or ``lib`` in the packages from PyPI."""
        return _part(self.home, "libcudart_static.a").parent


def find() -> Toolchain:
    """Returns what there is to compile CUDA kernels with.

    nvcc is that of ``CUDA_HOME`` (or ``CUDA_PATH``) if it is set, else of the packages from PyPI, else on ``PATH``.
    CUTLASS is ``CUTLASS_PATH`` if it is set, else the package nvidia-cutlass.

    Raises:
        BuildError: something is missing; the message is one clause that says what, and where it was looked for.
    """
    home = _toolkit()
    for part, (_, package) in _PARTS.items():
        if not _part(home, part).exists():
            raise BuildError(f"the CUDA toolkit in {home} has no {part} (from PyPI: {package})")
    said = _said_by(home / "bin" / "nvcc", "--version")
    version = re.search(r"\bV(\d+(\.\d+)+)", said)
    if version is None:
        raise BuildError(f"{home / 'bin' / 'nvcc'} --version names no version")
    cutlass = _cutlass()
    header = (cutlass / "include" / "cutlass" / "version.h").read_text(encoding="utf-8")
    numbers = re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) +(\d+)", header)
    return Toolchain(home, version[1], cutlass, ".".join(numbers))


def _part(home: Path, part: str) -> Path:
    """Returns where a part of a toolkit is, or the first place where it could be."""
    places = [home / place for place in _PARTS[part][0]]
    return next((place for place in places if place.exists()), places[0])


def _toolkit() -> Path:
    """Returns the folder of the CUDA toolkit."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            home = Path(os.environ[variable]).expanduser()
            if not (home / "bin" / "nvcc").exists():
                raise BuildError(f"{variable}={home} has no bin/nvcc")
            return home
    for folder in _packages("nvidia"):
        # Newest last: 13 and later share one folder a major version.
        for home in sorted(folder.glob("cu[1-9][0-9]"), reverse=True):
            if (home / "bin" / "nvcc").exists():
                return home
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("there is no nvcc (CUDA_HOME names a toolkit; from PyPI: nvidia-cuda-nvcc)")
    # It may be a script that calls another one: the compiler itself knows where it is.
    top = re.search(
        r"^#\$ TOP=(.+)$", _said_by(Path(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull), re.M
    )
    if top is None:
        raise BuildError(f"{nvcc} --dryrun does not say where it is installed (CUDA_HOME can)")
    return Path(top[1]).resolve()


def _cutlass() -> Path:
    """Returns the folder of CUTLASS."""
    header = Path("include", "cutlass", "version.h")
    if os.environ.get("CUTLASS_PATH"):
        path = Path(os.environ["CUTLASS_PATH"]).expanduser()
        if not (path / header).exists():
            raise BuildError(f"CUTLASS_PATH={path} has no {header}")
        return path
    for folder in _packages("cutlass_library"):
        if (folder / "source" / header).exists():
            return folder / "source"
    raise BuildError("there is no CUTLASS (CUTLASS_PATH names it; pip install --no-deps nvidia-cutlass)")


def _packages(name: str) -> Iterator[Path]:
    """Yields the folders of an installed package, without importing it."""
    # An empty entry of the path is the current folder, which may be anybody's.
    spec = importlib.machinery.PathFinder.find_spec(name, [entry for entry in sys.path if entry])
    yield from map(Path, (spec.submodule_search_locations or ()) if spec else ())


def _said_by(program: Path, *arguments: str) -> str:
    """Returns what a program says.

    Raises:
        BuildError: it cannot be run.
    """
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{program} cannot be run ({error})") from None
    return done.stdout + done.stderr
