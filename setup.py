"""Adds the compiled kernels to the build where it can; everything else is declared in pyproject.toml.

torch is deliberately no build requirement: an isolated build would download it (gigabytes with CUDA), and in a version
that need not be the one that runs. Without torch, a compiler and ninja at hand the package is pure Python, and the CPU
kernels are compiled on first use. SBERT_KERNELS_BUILD=0 never builds them here, =1 fails where they cannot be built.

The CUDA kernels are built only where SBERT_KERNELS_CUDA=1 asks for them, and then the build fails if they cannot be.
"""

import os
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_namespace_packages, find_packages, setup

# Only a build without isolation can meet an older one; it would stop at the next line, or at the license's form.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"sbert-kernels needs setuptools >= 77 to be built, got {setuptools.__version__}: pip install -U setuptools, "
        "or build with isolation."
    )

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "src"))
from sbert_kernels import native, settings  # noqa: E402
from sbert_kernels.native.building import BuildError  # noqa: E402
from sbert_kernels.native.library import PACKAGE  # noqa: E402

LIBRARIES = {"_cpu": native.cpu, "_cuda": native.cuda}


def remove_libraries(directory: Path) -> None:
    """Removes what earlier builds left there: their names differ, so nothing would overwrite them."""
    for name in LIBRARIES:
        for library in directory.glob(f"{name}-*"):
            library.unlink()


class BuildLibraries(build_ext):
    """Compiles as the first use does, into files whose names say what they were built for."""

    def get_ext_filename(self, fullname: str) -> str:
        """Returns the file's path below the build folder."""
        *folders, name = fullname.split(".")
        return os.path.join(*folders, LIBRARIES[name].prebuilt_name())

    def build_extension(self, ext: Extension) -> None:
        """Compiles a library; raises CompileError with the reason on one line."""
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        library.parent.mkdir(parents=True, exist_ok=True)
        name = ext.name.rpartition(".")[2]
        folder = Path(self.build_temp).absolute() / name
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "build.log"
        try:
            # CUDA alone keeps its objects, which take minutes: torch's builder for C++ waits forever at a lock that one
            # which was killed has left.
            LIBRARIES[name].build(library, log, folder if name == "_cuda" else None)
        except BuildError as error:
            raise CompileError(f"{error} (full log: {log})") from None

    def copy_extensions_to_source(self) -> None:
        """Puts the libraries beside the sources, for an editable install."""
        remove_libraries(PACKAGE)
        super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """Tags the wheel by what is inside: a library needs its platform but no particular Python."""

    def run(self) -> None:
        """Builds the wheel, without libraries of an earlier build that are not asked for now."""
        if not self.skip_build:
            remove_libraries(self.package_folder())
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Returns the tag of the wheel: "any" where it holds no library."""
        self.root_is_pure = not any(any(self.package_folder().glob(f"{name}-*")) for name in LIBRARIES)
        return "py3", "none", super().get_tag()[2]

    def package_folder(self) -> Path:
        """Returns the folder in which the package is put together."""
        return Path(self.get_finalized_command("build_ext").build_lib, "sbert_kernels")


def extensions() -> list[Extension]:
    """Returns the libraries to build, after a look at what is asked for and what is there."""
    mode = os.environ.get("SBERT_KERNELS_BUILD", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"SBERT_KERNELS_BUILD={mode!r} cannot be read: expected 0, 1 or auto.")
    found = []
    why_not = "SBERT_KERNELS_BUILD=0" if mode == "0" else native.cpu.why_not_compile()
    if why_not is None:
        # An optional extension that fails to compile is left out with a warning.
        found.append(Extension("sbert_kernels._cpu", sources=[], optional=mode != "1"))
    elif mode == "1":
        raise SystemExit(f"SBERT_KERNELS_BUILD=1, but the CPU kernels cannot be built: {why_not}.")
    else:
        print(f"sbert-kernels: built without the CPU kernels, they are compiled on first use: {why_not}.")
    try:
        cuda = settings.get("cuda")
        why_not = native.cuda.why_not_compile() if cuda else None
    except ValueError as error:  # a variable that cannot be read
        raise SystemExit(str(error)) from None
    if cuda:
        if why_not is not None:
            raise SystemExit(f"SBERT_KERNELS_CUDA=1, but the CUDA kernels cannot be built: {why_not}.")
        found.append(Extension("sbert_kernels._cuda", sources=[]))
    return found


setup(
    # Each folder of sources by its name: setuptools warns at length about one that it takes for a forgotten package.
    packages=[
        *find_packages("src"),
        "sbert_kernels.csrc",
        *(f"sbert_kernels.csrc.{name}" for name in find_namespace_packages(str(ROOT / "csrc"))),
    ],
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
