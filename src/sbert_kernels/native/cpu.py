"""The compiled CPU kernels (``csrc/cpu``), as ``torch.ops.sbert_kernels``.

They use torch's C++ interface: a library serves only the torch version whose headers it was compiled against.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Hashable, Mapping
from pathlib import Path

from .. import settings
from . import building
from .library import SUFFIX, Library

# No -march: a source chooses among instruction sets at run time. The C++ standard is the one of torch's own headers,
# which torch.utils.cpp_extension adds. Without OpenMP the inline at::parallel_for of torch's headers is a serial loop.
# The flag goes to the compiler only, not to the linker: its functions are found in the runtime that torch itself has
# loaded, so that there are never two pools of threads. Apple's compiler has no OpenMP. The arithmetic flags give up
# errno and signals, which nobody looks at and which keep a conditional from being vectorised; no result changes.
_ARITHMETIC_FLAGS = ("-fno-math-errno", "-fno-trapping-math")
_COMPILE_FLAGS = {
    "linux": ("-O3", "-fopenmp", *_ARITHMETIC_FLAGS),
    "win32": ("/O2", "/openmp:experimental"),
}.get(sys.platform, ("-O3", "-fopenmp-simd", *_ARITHMETIC_FLAGS))
# torch.utils.cpp_extension links libtorch_python, which would tie the library to a Python; unused, it is dropped.
_LINK_FLAGS = ("-Wl,--as-needed",) if sys.platform.startswith("linux") else ()

# It also loads the library, so that one which cannot be loaded is never put in place.
_BUILD_SCRIPT = (
    building.IN_PYTHON + "import json; from torch.utils.cpp_extension import load; load(**json.loads(sys.argv[1]))"
)


class CpuLibrary(Library):
    """The library of the C++ kernels for the CPU."""

    kind = "cpu"
    title = "CPU kernels"
    folders = ("cpu",)
    depends_on = "another torch or other sources"

    def settings(self) -> Hashable:
        """Returns whether compiling is allowed, and the cache."""
        return settings.get("compile"), settings.get("cache")

    def key(self) -> str:
        """Returns torch's version and the platform in clear; flags, sources and torch's C++ ABI as a hash."""
        import torch

        digest = self.digest(_COMPILE_FLAGS, _LINK_FLAGS, torch.compiled_with_cxx11_abi())
        return f"torch{torch.__version__}-{sys.platform}-{platform.machine().lower()}-{digest}"

    def fits(self, exactly: bool) -> str:
        """Returns the pattern of this very key, as nothing of it may differ."""
        return self.key()  # torch's version has no character that means something in a pattern

    def forbidden(self) -> str | None:
        """Returns that SBERT_KERNELS_COMPILE=0 forbids to compile, or None."""
        return None if settings.get("compile") else "compiling on first use is forbidden by SBERT_KERNELS_COMPILE=0"

    def why_not_compile(self) -> str | None:
        """Returns what is missing to compile with, as one clause, or None."""
        return building.why_not_compile()

    def announcement(self, folder: Path) -> str:
        """Returns the line of the log that says that the library is being compiled."""
        return (
            f"Compiling the {self.title} of sbert-kernels, once for this torch, into {folder}; this takes about a "
            "minute. SBERT_KERNELS_COMPILE=0 forbids it, at the price of slower losses"
        )

    def compile(self, folder: Path, log: Path) -> Path:
        """Compiles with torch's builder, in a process of its own.

        The builder wants a changed environment, prints, and loads what it has built.
        """
        sources = self.sources()
        stems = [path.stem for path in sources]
        assert len(set(stems)) == len(stems), f"torch names objects by their source's stem, which must differ: {stems}"
        name = f"sbert_kernels_{self.kind}"
        arguments = {
            "name": name,
            "sources": [str(path) for path in sources],
            "extra_cflags": list(_COMPILE_FLAGS),
            "extra_ldflags": list(_LINK_FLAGS),
            "build_directory": str(folder),
            "with_cuda": False,
            "is_python_module": False,
            "verbose": True,
        }
        jobs = min(len(sources), os.cpu_count() or 1)  # ATen's headers take about a gigabyte a job
        variables = {"MAX_JOBS": str(jobs), **building.environment(), **_one_word(building.compiler(), folder)}
        building.run([[sys.executable, "-c", _BUILD_SCRIPT, json.dumps(arguments)]], log, variables, self.timeout_s)
        return folder / f"{name}{SUFFIX}"


def _one_word(compiler: list[str], folder: Path) -> Mapping[str, str]:
    """Returns variables that make torch, which takes CXX for one program, run a command of several words."""
    if len(compiler) == 1:
        return {"CXX": compiler[0]}
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@"\n')
    script.chmod(0o700)
    # torch would put ccache before it, which may be in the command already.
    return {"CXX": str(script), "TORCH_NO_COMPILER_WRAPPER": "1"}


LIBRARY = CpuLibrary()
load, library, describe = LIBRARY.load, LIBRARY.library, LIBRARY.describe
prebuilt_name, build, why_not_compile = LIBRARY.prebuilt_name, LIBRARY.build, LIBRARY.why_not_compile
