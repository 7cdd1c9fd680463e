"""The compiled CUDA kernels (``csrc/cuda``), as ``torch.ops.sbert_kernels_cuda``.

They use LibTorch's stable interface: one library serves every torch >= 2.10, whatever CUDA that was built with. It
loads beside a torch without CUDA and on a machine without a driver too, and is then of no use. It is compiled with nvcc
and the headers of CUTLASS, but with a torch of any kind.

torch's own builder wants a torch with CUDA, and links what only such a torch has; so there is a rule of our own: ninja,
nvcc for each kernel by itself, the C++ compiler for the bindings and for linking.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path

from .. import settings
from . import building, toolchain
from .building import BuildError
from .library import SUFFIX, Library
from .toolchain import Toolchain

# Those that there are kernels for, as nvcc writes them after "sm_".
ARCHITECTURES = ("90a",)
OLDEST_TORCH = (2, 10)  # the stable interface that the bindings are written for

# Without NDEBUG, CUTLASS' asserts put a call into the main loop of a product, which then waits for each instruction.
# -v of ptxas says what is spilled. The names of nearly all functions stay inside.
_NVCC_FLAGS = (
    "-DNDEBUG",
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "-Xfatbin",
    "-compress-all",
    "-Xptxas",
    "-v",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
)
_CXX_FLAGS = (
    "-DNDEBUG",
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
)
# libtorch.so is named though nothing of it is used directly: it brings libtorch_cpu.so and, in a torch with CUDA,
# libtorch_cuda.so, whose functions are weak symbols here. CUDA's runtime is inside, so that none has to be found.
_LINK_FLAGS = (
    "-Wl,--as-needed",
    "-lcudart_static",
    "-lrt",
    "-lpthread",
    "-ldl",
    "-Wl,--exclude-libs,ALL",
    "-Wl,-z,now",
)
_UNIT_BYTES = 3.2e9  # of memory, for the compiler of one kernel made with CUTLASS
_LOAD_SCRIPT = building.IN_PYTHON + "import torch; torch.ops.load_library(sys.argv[1])"


class CudaLibrary(Library):
    """The library of the CUDA kernels."""

    kind = "cuda"
    title = "CUDA kernels"
    folders = ("common", "cuda")
    depends_on = "other sources or another platform"
    timeout_s = 3600.0

    def settings(self) -> Hashable:
        """Returns what is asked for and allowed, and the cache."""
        return tuple(map(settings.get, ("cuda", "cuda_archs", "compile", "cache")))

    def why_not_here(self) -> str | None:
        """Returns that SBERT_KERNELS_CUDA=0 switches the library off, or None."""
        return "SBERT_KERNELS_CUDA=0" if settings.get("cuda") is False else None

    def key(self) -> str:
        """Returns platform, architectures and the compilers' versions in clear, flags and sources as a hash."""
        found = toolchain.find()
        return f"{self._stem()}-{self._architectures()}-nvcc{found.version}-cutlass{found.cutlass_version}"

    def fits(self, exactly: bool) -> str:
        """Returns a pattern: any compiler's library serves; one in the cache has to be for the architectures asked for.

        For which architectures a prebuilt library is, was decided by whoever built it.
        """
        return f"{self._stem()}-{self._architectures() if exactly else '*'}-nvcc*"

    def forbidden(self) -> str | None:
        """Returns which setting forbids to compile on first use, or None. Unasked, nobody waits for minutes."""
        if settings.get("cuda") is None:
            return (
                f"the package holds no {self.title} that fit; SBERT_KERNELS_CUDA=1 compiles them on first use, which "
                "takes some minutes"
            )
        return None if settings.get("compile") else "compiling on first use is forbidden by SBERT_KERNELS_COMPILE=0"

    def why_not_compile(self) -> str | None:
        """Returns what is missing to compile with, as one clause, or None."""
        if not sys.platform.startswith("linux"):
            return f"CUDA kernels are compiled on Linux only, and this is {sys.platform}"
        asked: str = settings.get("cuda_archs")
        if not set(asked.split(",")) <= set(ARCHITECTURES):
            return f"SBERT_KERNELS_CUDA_ARCHS={asked}: there are kernels for {', '.join(ARCHITECTURES)} only"
        reason = building.why_not_compile() or _why_not_torch()
        if reason is None:
            try:
                toolchain.find()
            except BuildError as error:
                reason = str(error)
        return reason

    def announcement(self, folder: Path) -> str:
        """Returns the line of the log that says that the library is being compiled, and what that costs."""
        units = len(self._kernels())
        return (
            f"Compiling the {self.title} of sbert-kernels ({settings.get('cuda_archs')}), once for these "
            f"sources, into {folder}; this takes some minutes: {units} kernels, {_jobs(units)} at a time, "
            "each half a minute of a core and 3.2 GB. Without SBERT_KERNELS_CUDA=1 nothing is compiled"
        )

    def compile(self, folder: Path, log: Path) -> Path:
        """Compiles with ninja, and refuses kernels that spill registers or wait for each tensor-core instruction."""
        built = folder / f"sbert_kernels_{self.kind}{SUFFIX}"
        kernels = self._kernels()
        rules = folder / "build.ninja"
        rules.write_text(_rules(toolchain.find(), self.csrc, self.sources(), built), encoding="utf-8")
        commands = [
            # Verbose: a log without the commands explains little.
            ["ninja", "-v", "-j", str(_jobs(len(kernels))), "-C", str(folder)],
            [sys.executable, "-c", _LOAD_SCRIPT, str(built)],
        ]
        building.run(commands, log, building.environment(), self.timeout_s)
        for path in kernels:
            fault = why_not_kernel(_log(_object(path, self.csrc, folder)))
            if fault is not None:
                with log.open("a") as output:  # for other processes, which look there for what went wrong
                    output.write(f"error: {path.name}: {fault}\n")
                raise BuildError(f"{path.name}: {fault}")
        return built

    def opened(self) -> None:
        """Registers what torch.compile has to know about the operators."""
        _register_fakes()

    def _load(self) -> str | None:
        return _why_not_torch() or super()._load()

    def _kernels(self) -> list[Path]:
        return [path for path in self.sources() if path.suffix == ".cu"]

    def _stem(self) -> str:
        digest = self.digest(_NVCC_FLAGS, _CXX_FLAGS, _LINK_FLAGS)
        return f"{sys.platform}-{platform.machine().lower()}-{digest}"

    def _architectures(self) -> str:
        return str(settings.get("cuda_archs")).replace(",", ".")


def why_not_kernel(log: Path) -> str | None:
    """Returns why a kernel must not be shipped though it compiled, as one clause, or None.

    Args:
        log: What nvcc said, with ``-Xptxas -v``.
    """
    function = None
    for line in log.read_text(errors="replace").splitlines():
        # The products of the tensor cores wait for one another; the result is right, at a fraction of the speed.
        if re.search(r"\bC75(08|10)\b", line):
            return f"its tensor-core instructions are serialised: {building.first_line(line)[:300]}"
        named = re.search(r"Function properties for (\S+)", line)
        if named is not None:
            function = named[1] if len(named[1]) <= 120 else named[1][:120] + "..."
        spilt = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spilt is not None and (int(spilt[1]) or int(spilt[2])):
            return f"{function} spills registers ({spilt[1]} bytes stored, {spilt[2]} bytes loaded)"
    return "ptxas did not say what registers it uses" if function is None else None


def why_not_driver() -> str | None:
    """Returns why the GPU's driver cannot run the kernels, as one clause, or None. Loads the library.

    CUDA's runtime is inside the library. Drivers of the same or a newer major version serve it.
    """
    reason = LIBRARY.load()
    if reason is not None:
        return reason
    import torch

    driver, runtime = torch.ops.sbert_kernels_cuda.driver_version()
    if driver == 0:
        return "there is no NVIDIA driver"
    if driver // 1000 < runtime // 1000:
        needed = f"CUDA {runtime // 1000}" + (" (driver r580 or newer)" if runtime // 1000 == 13 else "")
        return (
            f"the NVIDIA driver serves CUDA {driver // 1000}.{driver % 1000 // 10}, and the CUDA kernels need {needed}"
        )
    return None


def _why_not_torch() -> str | None:
    """Returns that torch is too old, as one clause, or None."""
    import torch
    from torch.torch_version import TorchVersion

    oldest = ".".join(map(str, OLDEST_TORCH))
    if TorchVersion(torch.__version__) >= oldest:
        return None
    return f"torch {torch.__version__} is too old for the CUDA kernels, which need >= {oldest}"


def _jobs(units: int) -> int:
    """Returns how many compilers to run at a time: MAX_JOBS, else by files, processors and memory."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdecimal() or int(asked) == 0:
            raise BuildError(f"MAX_JOBS={asked!r} is not a number of compilers to run at a time")
        return int(asked)
    try:
        available = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        available = None
    fitting = int(int(available[1]) * 1024 // _UNIT_BYTES) if available else 1
    return max(1, min(units, os.cpu_count() or 1, fitting))


def _object(source: Path, csrc: Path, folder: Path) -> Path:
    """Returns where the object of a source is made."""
    return folder / source.relative_to(csrc).with_name(source.name + ".o")


def _log(of_object: Path) -> Path:
    """Returns where the rules keep what the compiler of a kernel said: it must be there when it is not made anew."""
    return of_object.with_name(of_object.name + ".log")


def _rules(found: Toolchain, csrc: Path, sources: Sequence[Path], built: Path) -> str:
    """Returns the text of build.ninja."""
    import torch

    torch_folder = Path(torch.__file__).parent
    compiler = shlex.join(building.compiler())
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in settings.get("cuda_archs").split(",")]
    nvcc = shlex.join([str(found.nvcc), *_NVCC_FLAGS, *targets, *_system(*found.cutlass_includes)])
    includes = _system(torch_folder / "include", found.home / "include")
    # What raises names its file: by its place among the sources, not by that on the machine that compiled it.
    cxx = f"{compiler} {shlex.join([*_CXX_FLAGS, f'-fmacro-prefix-map={csrc}=csrc', *includes])}"
    libraries = shlex.join(
        ["-Wl,--no-as-needed", f"-L{torch_folder / 'lib'}", "-ltorch", f"-L{found.cudart_folder}", *_LINK_FLAGS]
    )
    gcc = ("depfile = $out.d", "deps = gcc")
    said = "> $out.log 2>&1; code=$$?; cat $out.log; exit $$code"
    lines = [
        "ninja_required_version = 1.5",
        *_rule("kernel", f"{_escaped(nvcc)} -MD -MF $out.d -c $in -o $out {said}", *gcc),
        *_rule("bindings", f"{_escaped(cxx)} -MD -MF $out.d -c $in -o $out", *gcc),
        *_rule("link", f"{_escaped(compiler)} -shared -o $out $in {_escaped(libraries)}"),
    ]
    objects = []
    for path in sources:
        objects.append(_path(_object(path, csrc, built.parent)))
        # ninja makes anew what was made from older files or by another command; the compiler is one of the files.
        rule, tool = ("kernel", f" | {_path(found.nvcc)}") if path.suffix == ".cu" else ("bindings", "")
        lines.append(f"build {objects[-1]}: {rule} {_path(path)}{tool}")
    lines.append(f"build {_path(built)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _system(*folders: Path) -> list[str]:
    """Returns the flags for folders of headers that are not ours, about which no compiler need warn."""
    return [word for folder in folders for word in ("-isystem", str(folder))]


def _rule(name: str, command: str, *rest: str) -> list[str]:
    return [f"rule {name}", *(f"  {line}" for line in (f"command = {command}", *rest))]


def _escaped(text: str) -> str:
    """Returns a command's text as ninja wants it."""
    return text.replace("$", "$$")


def _path(path: Path) -> str:
    """Returns a path as ninja wants it in a line that begins with "build"."""
    return re.sub(r"([$ :])", r"$\1", str(path))


@functools.cache
def _register_fakes() -> None:
    """Tells torch, once, what the operators return for tensors without data."""
    import torch

    # It only writes into the tensors that it is given. The other operators take no tensors.
    torch.library.register_fake("sbert_kernels_cuda::contrastive_weights", lambda *_, **__: None)


LIBRARY = CudaLibrary()
load, library, describe = LIBRARY.load, LIBRARY.library, LIBRARY.describe
prebuilt_name, build, why_not_compile = LIBRARY.prebuilt_name, LIBRARY.build, LIBRARY.why_not_compile
