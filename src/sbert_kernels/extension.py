"""The compiled CPU kernels (``csrc/cpu``): found prebuilt in the package, else compiled once into a cache, then loaded.

This file holds the one list of sources and flags. ``setup.py`` builds with it too, so importing it needs neither torch
nor a compiler. The library registers its operators with ``TORCH_LIBRARY`` and uses nothing of Python: one file serves
every Python version, but only the torch version whose C++ headers it was compiled against.

A library in the cache is code that runs in whoever loads it: :mod:`.trust` says which one may be. A prebuilt one is
trusted as the package is, in whose folder it lies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from . import settings, trust

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent
# A wheel carries the sources inside the package; a checkout has them at its top level.
SOURCES = next((d for d in (PACKAGE / "csrc", PACKAGE.parents[1] / "csrc") if d.is_dir()), PACKAGE / "csrc") / "cpu"

_NAME = "sbert_kernels_cpu"
_SUFFIX = ".pyd" if sys.platform == "win32" else ".so"  # as torch.utils.cpp_extension names a library
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
_TIMEOUT_S = 900.0

_lock = threading.Lock()
_library: Path | None = None  # the one loaded in this process
_failures: dict[tuple[bool, str | None], str] = {}  # by the settings that they happened under


class BuildError(Exception):
    """The library could not be compiled; the message is one line that says why."""


def load() -> str | None:
    """Makes ``torch.ops.sbert_kernels`` available; returns None, or one clause that says why it cannot.

    The first call may compile, which takes about a minute and logs a line. Its outcome holds for the process: a later
    call costs nothing, and a failure is tried again only under other settings (``SBERT_KERNELS_COMPILE``,
    ``SBERT_KERNELS_CACHE``). Safe to call from several threads and from several processes at once.
    """
    if _library is not None:
        return None
    key = settings.get("compile"), settings.get("cache")
    if key in _failures:
        return _failures[key]
    with _lock:
        if _library is None and key not in _failures:
            reason = _load(*key)
            if reason is not None:
                _failures[key] = reason
        return None if _library is not None else _failures[key]


def describe() -> str:
    """Returns one line for ``info``: the library in use and where it came from, or why there is none. Loads it."""
    reason = load()
    if _library is None:
        return f"none ({reason})"
    return f"{_library} ({'prebuilt' if _library.parent == PACKAGE else 'compiled on first use'})"


def _load(compile_allowed: bool, cache: str | None) -> str | None:
    reasons = []
    try:
        prebuilt = PACKAGE / prebuilt_name()
        if prebuilt.exists():
            reason = _open(prebuilt)
            if reason is None:
                return None
            reasons.append(reason)
        else:
            reasons += [
                f"the prebuilt {other.name} is for another torch or other sources (wanted {prebuilt.name})"
                for other in sorted(PACKAGE.glob(f"_cpu-*{_SUFFIX}"))
            ]
        reason = _open(_compiled(cache, compile_allowed))
        if reason is None:
            if reasons:
                logger.info("Compiled kernels: %s; using %s.", "; ".join(reasons), _library)
            return None
        reasons.append(f"{reason}; remove it to have it compiled again")
    except BuildError as error:
        reasons.append(str(error))
    return "; ".join(reasons)


def _open(path: Path) -> str | None:
    global _library
    import torch

    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        # torch says only that it could not load the file; the loader's own words are the cause.
        return f"{path} cannot be loaded: {_first_line(str(error.__cause__ or error))}"
    _library = path
    return None


def _sources() -> list[Path]:
    found = sorted(SOURCES.rglob("*.cpp"))
    stems = [path.stem for path in found]
    assert len(set(stems)) == len(stems), f"torch names objects by their source's stem, which must differ: {stems}"
    return found


def _key() -> str:
    """Returns all that the library depends on: torch's version and C++ ABI in clear, flags and sources as a hash."""
    import torch

    if not _sources():
        raise BuildError(f"there are no sources in {SOURCES}")
    digest = hashlib.sha256(repr((_COMPILE_FLAGS, _LINK_FLAGS, torch.compiled_with_cxx11_abi())).encode())
    for path in sorted(p for p in SOURCES.rglob("*") if p.suffix in (".cpp", ".h")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(SOURCES).as_posix()} {len(content)} ".encode() + content)
    return f"torch{torch.__version__}-{sys.platform}-{platform.machine().lower()}-{digest.hexdigest()[:12]}"


def prebuilt_name() -> str:
    """Returns the file name of the library that ``setup.py`` builds into the package for the torch that is installed.

    Raises:
        BuildError: if there are no sources.
    """
    return f"_cpu-{_key()}{_SUFFIX}"


def _cache_directory(cache: str | None) -> Path:
    if cache is not None:
        return Path(cache).expanduser().absolute()
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        root = "~/Library/Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser().absolute() / "sbert_kernels"


def _compiled(cache: str | None, compile_allowed: bool) -> Path:
    """Returns the library of this torch and these sources in the cache; compiles it if it is not there yet.

    Raises:
        BuildError: if it must not or cannot be compiled, or the cache cannot be written, or others can write it.
    """
    import filelock

    asked_at = time.time()
    try:
        # Homes are shared between containers: a library linked against a newer libc does not load on an older one.
        name = "-".join((_key(), *filter(None, platform.libc_ver())))
        # Links are followed once, here: what is checked is then what is opened.
        directory = Path(os.path.realpath(_cache_directory(cache) / name))
        library, log, lock = directory / f"{_NAME}{_SUFFIX}", directory / "build.log", directory / "lock"
        _check_trust(directory)
        if _usable(library):
            return library
        reason = trust.distrust(library) if os.path.lexists(library) else None
        why_again = "" if reason is None else f"; the one that is there is not loaded: {reason}"
        missing = (
            why_not_compile() if compile_allowed else "compiling on first use is forbidden by SBERT_KERNELS_COMPILE=0"
        )
        if missing is not None:
            raise BuildError(missing + why_again)
        trust.make_folder(directory)
        _check_trust(directory)  # somebody else may have been faster
        if os.path.lexists(lock):
            _check_trust(lock)
        # The operating system frees this lock when its holder dies, unlike the lock of torch.utils.cpp_extension.
        with filelock.FileLock(str(lock), timeout=_TIMEOUT_S, mode=0o600):
            if _usable(library):
                return library
            # Whoever held the lock has just failed: so would we.
            if log.exists() and log.stat().st_mtime > asked_at and trust.distrust(log) is None:
                raise BuildError(f"{_reason(log)} (full log: {log})")
            for left in directory.glob(".build-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            logger.warning(
                "Compiling the CPU kernels of sbert-kernels, once for this torch, into %s; this takes about a minute. "
                "SBERT_KERNELS_COMPILE=0 forbids it, at the price of slower losses%s.",
                directory,
                why_again,
            )
            try:
                build(library, log)
            except BuildError as error:
                raise BuildError(f"{error} (full log: {log})") from None
    except filelock.Timeout:
        raise BuildError(f"another process has been compiling in {directory} for {_TIMEOUT_S:.0f} s") from None
    except (OSError, RuntimeError) as error:  # no home, not writable, no locks on that file system
        raise BuildError(f"the cache cannot be used ({error}); SBERT_KERNELS_CACHE names another") from None
    return library


def _check_trust(path: Path) -> None:
    reason = trust.distrust(path)
    if reason is not None:
        raise BuildError(f"the cache cannot be trusted: {reason}; SBERT_KERNELS_CACHE names another")


def _usable(library: Path) -> bool:
    """Returns True if the library is there and may be loaded; one that others could have written is compiled anew."""
    return os.path.lexists(library) and trust.distrust(library) is None


def why_not_compile() -> str | None:
    """Returns what is missing to compile with, as one clause, or None."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    try:
        program = _compiler()[0]
    except ValueError:
        return f"CXX={os.environ['CXX']!r} is not a command"
    if shutil.which(program) is None:
        return f"there is no C++ compiler ({program!r} is not found; CXX names another)"
    if shutil.which("ninja", path=_environment()["PATH"]) is None:
        return "there is no ninja (pip install ninja)"
    return None


def _compiler() -> list[str]:
    """Returns the words of the compiler's command: ``CXX`` may name a launcher before the compiler, and flags after it.

    Raises:
        ValueError: CXX is blank, or has a quote without its partner.
    """
    command = os.environ.get("CXX")
    if sys.platform == "win32":  # a path there has backslashes and spaces, and torch compiles with cl in any case
        return [command or "cl"]
    words = shlex.split(command) if command else ["c++"]
    if not words:
        raise ValueError("CXX is blank")
    return words


def _one_word(compiler: list[str], scratch: Path) -> Mapping[str, str]:
    """Returns variables that make torch, which takes CXX for one program, run a command of several words."""
    if len(compiler) == 1:
        return {"CXX": compiler[0]}
    script = scratch / "c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@"\n')
    script.chmod(0o700)
    # torch would put ccache before it, which may be in the command already.
    return {"CXX": str(script), "TORCH_NO_COMPILER_WRAPPER": "1"}


def _environment() -> Mapping[str, str]:
    """Returns the environment to compile in: torch looks for ninja on PATH only, pip may have put it elsewhere."""
    path = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]
    try:
        import ninja

        path += filter(
            None, [ninja.BIN_DIR]
        )  # "" where the package does not know; an empty entry is the current folder
    except ImportError:
        pass
    jobs = min(len(_sources()), os.cpu_count() or 1)  # ATen's headers take about a gigabyte a job
    return {"MAX_JOBS": str(jobs), **os.environ, "PATH": os.pathsep.join(path)}


# It also loads the library, so that one which cannot be loaded is never put in place. Python would import from the
# current folder (the empty entry), which may be anybody's.
_BUILD_SCRIPT = (
    "import sys; sys.path[:] = filter(None, sys.path)\n"
    "import json; from torch.utils.cpp_extension import load; load(**json.loads(sys.argv[1]))"
)


def build(library: Path, log: Path) -> None:
    """Compile the sources into the file ``library``, which appears at once and whole; ``log`` gets the output.

    In a process of its own: torch's builder wants a changed environment, prints, and loads what it has built.

    Raises:
        BuildError: if compiling fails.
        OSError: if the files cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-", ignore_cleanup_errors=True) as scratch:
        arguments = {
            "name": _NAME,
            "sources": [str(path) for path in _sources()],
            "extra_cflags": list(_COMPILE_FLAGS),
            "extra_ldflags": list(_LINK_FLAGS),
            "build_directory": scratch,
            "with_cuda": False,
            "is_python_module": False,
            "verbose": True,
        }
        command = [sys.executable, "-c", _BUILD_SCRIPT, json.dumps(arguments)]
        log.unlink(missing_ok=True)  # never through a link
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as output:
            try:
                done = subprocess.run(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**_environment(), **_one_word(_compiler(), Path(scratch))},
                    timeout=_TIMEOUT_S,
                )
            except subprocess.TimeoutExpired:
                raise BuildError(f"the compiler took longer than {_TIMEOUT_S:.0f} s") from None
        if done.returncode != 0:
            raise BuildError(_reason(log))
        built = Path(scratch) / f"{_NAME}{_SUFFIX}"
        with built.open("rb+") as file:  # whole on the disk before it has its name, whatever happens to the machine
            os.fsync(file.fileno())
        built.chmod(0o755)  # whatever the umask: nobody else may write it
        os.replace(built, library)


def _reason(log: Path) -> str:
    """Returns the line of a build log that says most: the compiler's first error, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    error = next((line for line in lines if re.search(r"\berror( \w+)?:|: not found$", line)), None)
    return _first_line(error or (lines[-1] if lines else "the compiler said nothing"))


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0].rstrip(".")
