"""Adds the compiled CPU kernels to the build where it can; everything else is declared in pyproject.toml.

torch is deliberately no build requirement: an isolated build would download it (gigabytes with CUDA), and in a version
that need not be the one that runs. Without torch, a compiler and ninja at hand the package is pure Python, and the
kernels are compiled on first use. SBERT_KERNELS_BUILD=0 never builds them here, =1 fails where they cannot be built.
"""

import os
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup

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
from sbert_kernels import extension  # noqa: E402


def remove_libraries(directory: Path) -> None:
    """Removes what earlier builds left there: their names differ, so nothing would overwrite them."""
    for library in directory.glob("_cpu-*"):
        library.unlink()


class BuildLibrary(build_ext):
    """Compiles as the first use does, into a file whose name says what it was built for."""

    def get_ext_filename(self, fullname: str) -> str:
        """Returns the file's path below the build folder."""
        return os.path.join(*fullname.split(".")[:-1], extension.prebuilt_name())

    def build_extension(self, ext: Extension) -> None:
        """Compiles the library; raises CompileError with the reason on one line."""
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        remove_libraries(library.parent)
        library.parent.mkdir(parents=True, exist_ok=True)
        log = Path(self.build_temp).absolute() / "build.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            extension.build(library, log)
        except extension.BuildError as error:
            raise CompileError(f"{error} (full log: {log})") from None

    def copy_extensions_to_source(self) -> None:
        """Puts the library beside the sources, for an editable install."""
        remove_libraries(extension.PACKAGE)
        super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """Tagged by what is inside: a library needs its platform but no particular Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Returns the tag of the wheel: "any" where it holds no library."""
        self.root_is_pure = not any(
            Path(self.get_finalized_command("build_ext").build_lib).glob("sbert_kernels/_cpu-*")
        )
        return "py3", "none", super().get_tag()[2]


mode = os.environ.get("SBERT_KERNELS_BUILD", "auto")
if mode not in ("auto", "0", "1"):
    raise SystemExit(f"SBERT_KERNELS_BUILD={mode!r} cannot be read: expected 0, 1 or auto.")
why_not = "SBERT_KERNELS_BUILD=0" if mode == "0" else extension.why_not_compile()
if why_not is not None:
    if mode == "1":
        raise SystemExit(f"SBERT_KERNELS_BUILD=1, but the CPU kernels cannot be built: {why_not}.")
    print(f"sbert-kernels: built without the CPU kernels, they are compiled on first use: {why_not}.")

setup(
    packages=[*find_packages("src"), "sbert_kernels.csrc"],
    # An optional extension that fails to compile is left out with a warning.
    ext_modules=[] if why_not else [Extension("sbert_kernels._cpu", sources=[], optional=mode != "1")],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
