"""A compiled library: found prebuilt in the package, else in the cache, else compiled into the cache once; then loaded.

What all libraries share is here; what differs (sources, flags, names, the build itself) is in :mod:`.cpu` and
:mod:`.cuda`. A library registers its operators with torch from C++ and uses nothing of Python: one file serves every
Python version.

A library in the cache is code that runs in whoever loads it: :mod:`.trust` says which one may be. A prebuilt one is
trusted as the package is, in whose folder it lies.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import ClassVar

from .. import settings
from . import building, trust
from .building import BuildError

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries the sources inside the package; a checkout has them at its top level.
CSRC = next((d for d in (PACKAGE / "csrc", PACKAGE.parents[1] / "csrc") if d.is_dir()), PACKAGE / "csrc")

SUFFIX = ".pyd" if sys.platform == "win32" else ".so"  # as torch.utils.cpp_extension names a library
_SOURCES = (".cpp", ".h", ".cu", ".cuh")


class Library(ABC):
    """One compiled library of this process, with all that is known about it.

    Attributes:
        kind: Its short name: files are named ``_kind-...`` in the package and ``sbert_kernels_kind`` in the cache.
        title: What it holds, in words for messages.
        folders: The folders of ``csrc`` that it is compiled from.
        depends_on: What a prebuilt file may have been made for that does not fit here, in words.
        timeout_s: The longest time that compiling may take, and that another process waits for it.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]
    depends_on: ClassVar[str]
    timeout_s: ClassVar[float] = 900.0

    def __init__(self, csrc: Path = CSRC, package: Path = PACKAGE) -> None:
        """Describes a library, and neither finds nor loads it.

        Args:
            csrc: The folder of all sources.
            package: The folder in which prebuilt libraries lie.
        """
        self.csrc, self.package = csrc, package
        self._lock = threading.Lock()
        self._loaded: Path | None = None
        self._failures: dict[Hashable, str] = {}  # by the settings that they happened under

    # What differs.

    @abstractmethod
    def settings(self) -> Hashable:
        """Returns the settings that decide where the library is looked for, and whether it may be compiled."""

    @abstractmethod
    def key(self) -> str:
        """Returns all that a library compiled here and now depends on, in clear or as a hash, as part of a file name.

        Raises:
            BuildError: there are no sources, or it cannot be found out what there is to compile with.
        """

    @abstractmethod
    def fits(self, exactly: bool) -> str:
        """Returns the pattern (of ``fnmatch``) of the keys of libraries that serve here.

        Args:
            exactly: True for a library that was compiled under the present settings, False for a prebuilt one.

        Raises:
            BuildError: there are no sources.
        """

    @abstractmethod
    def forbidden(self) -> str | None:
        """Returns which setting forbids to compile on first use, as one clause, or None."""

    @abstractmethod
    def why_not_compile(self) -> str | None:
        """Returns what is missing to compile with, as one clause, or None."""

    @abstractmethod
    def announcement(self, folder: Path) -> str:
        """Returns the line of the log that says that the library is being compiled, where and for how long."""

    @abstractmethod
    def compile(self, folder: Path, log: Path) -> Path:
        """Compiles in a folder, all output in the file ``log``; returns the library, which has been loaded there once.

        Raises:
            BuildError: if compiling fails.
        """

    def why_not_here(self) -> str | None:
        """Returns why the library is of no use in this process whoever compiled it, as one clause, or None."""
        return None

    def opened(self) -> None:
        """Does what remains once torch has loaded the library."""
        return None

    # What is shared.

    def load(self) -> str | None:
        """Makes the library's operators available in ``torch.ops``; returns None, or one clause that says why not.

        The first call may compile, which is logged. Its outcome holds for the process: a later call costs nothing, and
        a failure is tried again only under other settings. Safe to call from several threads and from several
        processes at once.
        """
        reason = self.why_not_here()
        if reason is not None or self._loaded is not None:
            return reason
        key = self.settings()
        if key in self._failures:
            return self._failures[key]
        with self._lock:
            if self._loaded is None and key not in self._failures:
                reason = self._load()
                if reason is not None:
                    self._failures[key] = reason
            return None if self._loaded is not None else self._failures[key]

    def library(self) -> Path | None:
        """Returns the file that this process has loaded, or None."""
        return self._loaded

    def describe(self) -> str:
        """Returns one line for ``info``: the library in use and where it came from, or why there is none. Loads it."""
        reason = self.load()
        if reason is not None or self._loaded is None:
            return f"none ({reason})"
        return f"{self._loaded} ({'prebuilt' if self._loaded.parent == self.package else 'compiled on first use'})"

    def prebuilt_name(self) -> str:
        """Returns the file name of the library that ``setup.py`` builds into the package, here and now.

        Raises:
            BuildError: as :meth:`key` does.
        """
        return f"_{self.kind}-{self.key()}{SUFFIX}"

    def build(self, library: Path, log: Path, folder: Path | None = None) -> None:
        """Compiles the sources into the file ``library``, which appears at once and whole; ``log`` gets the output.

        Args:
            library: The file to make, in a folder that exists.
            log: The file for what the compiler says.
            folder: Where to compile, for files that are not to be made again the next time; None: a temporary one.

        Raises:
            BuildError: if compiling fails.
            OSError: if the files cannot be written.
        """
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-", ignore_cleanup_errors=True) as scratch:
            built = self.compile(Path(scratch) if folder is None else folder, log)
            if folder is not None:  # it stays there, where the next build looks for it
                built = Path(shutil.copy2(built, scratch))
            building.put_in_place(built, library)

    def compiled(self) -> Path:
        """Returns the library in the cache that serves here; compiles it if it is not there yet.

        Raises:
            BuildError: if it must not or cannot be compiled, or the cache cannot be written, or others can write it.
        """
        try:
            return self._compiled()
        except (OSError, RuntimeError) as error:  # no home, not writable, no locks on that file system
            raise BuildError(f"the cache cannot be used ({error}); SBERT_KERNELS_CACHE names another") from None

    def digest(self, *flags: object) -> str:
        """Returns a hash of all sources and of some flags.

        Raises:
            BuildError: there are no sources.
        """
        if not self.sources():
            raise BuildError(f"there are no sources in {self.csrc / self.folders[-1]}")
        digest = hashlib.sha256(repr(flags).encode())
        for path in sorted(p for folder in self.folders for p in (self.csrc / folder).rglob("*")):
            if path.suffix in _SOURCES:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(self.csrc).as_posix()} {len(content)} ".encode() + content)
        return digest.hexdigest()[:12]

    def sources(self) -> list[Path]:
        """Returns the files that the compiler is called for, each of which becomes one object."""
        found = (p for folder in self.folders for p in (self.csrc / folder).rglob("*"))
        return sorted(path for path in found if path.suffix in (".cpp", ".cu"))

    def _load(self) -> str | None:
        reasons = []
        try:
            wanted = f"_{self.kind}-{self.fits(exactly=False)}{SUFFIX}"
            for prebuilt in sorted(self.package.glob(f"_{self.kind}-*{SUFFIX}")):
                if fnmatch.fnmatchcase(prebuilt.name, wanted):
                    reason = self._open(prebuilt)
                    if reason is None:
                        return None
                    reasons.append(reason)
                else:
                    reasons.append(f"the prebuilt {prebuilt.name} is for {self.depends_on} (wanted {wanted})")
            reason = self._open(self.compiled())
            if reason is None:
                if reasons:
                    logger.info("Compiled kernels: %s; using %s.", "; ".join(reasons), self._loaded)
                return None
            reasons.append(f"{reason}; remove it to have it compiled again")
        except BuildError as error:
            reasons.append(str(error))
        return "; ".join(reasons)

    def _open(self, path: Path) -> str | None:
        import torch

        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            # torch says only that it could not load the file; the loader's own words are the cause.
            return f"{path} cannot be loaded: {building.first_line(str(error.__cause__ or error))}"
        self.opened()
        self._loaded = path
        return None

    def _compiled(self) -> Path:
        asked_at = time.time()
        missing = self.forbidden() or self.why_not_compile()
        why_again = ""
        for folder in self._folders(may_compile=missing is None):
            _check_trust(folder)
            library = folder / f"sbert_kernels_{self.kind}{SUFFIX}"
            if _usable(library):
                return library
            if os.path.lexists(library):
                why_again = f"; the one that is there is not loaded: {trust.distrust(library)}"
        if missing is not None:
            raise BuildError(missing + why_again)
        log = folder / "build.log"
        with self._locked(folder):
            if _usable(library):
                return library
            # Whoever held the lock has just failed: so would we.
            if log.exists() and log.stat().st_mtime > asked_at and trust.distrust(log) is None:
                raise BuildError(f"{building.reason_in(log)} (full log: {log})")
            for left in folder.glob(".build-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            logger.warning("%s%s.", self.announcement(folder), why_again)
            try:
                self.build(library, log)
            except BuildError as error:
                raise BuildError(f"{error} (full log: {log})") from None
        return library

    def _folders(self, may_compile: bool) -> list[Path]:
        """Returns the folders of the cache whose libraries serve here, the best first.

        If compiling is possible, it is one folder, which need not be there yet.
        """
        root = cache_directory()
        # Homes are shared between containers: a library linked against a newer libc does not load on an older one.
        libc = list(filter(None, platform.libc_ver()))
        if may_compile:
            found = [root / "-".join((self.kind, self.key(), *libc))]
        else:
            pattern = "-".join((self.kind, self.fits(exactly=True), *libc))
            found = [p for p in (root.iterdir() if root.is_dir() else ()) if fnmatch.fnmatchcase(p.name, pattern)]
            found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        # Links are followed once, here: what is checked is then what is opened.
        return [Path(os.path.realpath(folder)) for folder in found]

    @contextlib.contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """Makes a folder of the cache, and holds its lock: one process compiles there at a time."""
        import filelock

        trust.make_folder(folder)
        _check_trust(folder)  # somebody else may have been faster
        lock = folder / "lock"
        if os.path.lexists(lock):
            _check_trust(lock)
        # The operating system frees this lock when its holder dies, unlike the lock of torch.utils.cpp_extension.
        try:
            with filelock.FileLock(str(lock), timeout=self.timeout_s, mode=0o600):
                yield
        except filelock.Timeout:
            raise BuildError(f"another process has been compiling in {folder} for {self.timeout_s:.0f} s") from None


def cache_directory() -> Path:
    """Returns the folder of the cache, which need not be there: the setting's, else one of the user's own."""
    cache = settings.get("cache")
    if cache is not None:
        return Path(cache).expanduser().absolute()
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        root = "~/Library/Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser().absolute() / "sbert_kernels"


def _check_trust(path: Path) -> None:
    reason = trust.distrust(path)
    if reason is not None:
        raise BuildError(f"the cache cannot be trusted: {reason}; SBERT_KERNELS_CACHE names another")


def _usable(library: Path) -> bool:
    """Returns True if the library is there and may be loaded; one that others could have written is compiled anew."""
    return os.path.lexists(library) and trust.distrust(library) is None
