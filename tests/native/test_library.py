"""The compiled kernels are found, compiled once, or done without for a stated reason; never an exception."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sbert_kernels import settings
from sbert_kernels.native import building, cpu
from sbert_kernels.native.cpu import CpuLibrary
from sbert_kernels.native.library import SUFFIX

# No torch header: a fraction of a second to compile, and no operator that the process could have already.
TINY = 'extern "C" int sbert_kernels_tiny() { return 7; }\n'
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
by_mode = pytest.mark.skipif(sys.platform == "win32", reason="modes say nothing on Windows")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CpuLibrary:
    """A library that this process has not loaded yet: sources, package and cache of its own."""
    for name in ("csrc/cpu", "package"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("SBERT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SBERT_KERNELS_COMPILE", raising=False)
    (tmp_path / "csrc" / "cpu" / "tiny.cpp").write_text(TINY)
    return CpuLibrary(tmp_path / "csrc", tmp_path / "package")


@pytest.fixture
def builds(fresh: CpuLibrary, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records compiles instead of running them; the "library" is no library, so that loading it fails."""
    made: list[Path] = []

    def build(library: Path, log: Path) -> None:
        made.append(library)
        library.write_bytes(b"not a library")

    monkeypatch.setattr(fresh, "build", build)
    monkeypatch.setattr(fresh, "why_not_compile", lambda: None)
    return made


def test_compiles_once_for_two_processes_and_the_library_loads(
    tmp_path: Path, fresh: CpuLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a command of several words (a launcher, the compiler, a flag), and a umask that takes nothing away."""
    if fresh.why_not_compile():
        pytest.skip(fresh.why_not_compile())
    if sys.platform != "win32":
        monkeypatch.setenv("CXX", f"env {os.environ.get('CXX') or 'c++'} -DWORDS='\"two words\"'")
        (fresh.csrc / "cpu" / "flag.cpp").write_text(
            'static_assert(sizeof(WORDS) == 10);\nextern "C" int sbert_kernels_flag() { return 0; }\n'
        )
    code = (
        "import os; os.umask(0)\n"
        "import logging, pathlib, sys; logging.basicConfig(); from sbert_kernels.native.cpu import CpuLibrary\n"
        "fresh = CpuLibrary(*map(pathlib.Path, sys.argv[1:]))\n"
        "print(fresh.load(), 'torch.utils.cpp_extension' in sys.modules, fresh.describe())"
    )
    command = [sys.executable, "-c", code, str(fresh.csrc), str(fresh.package)]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=1800) for process in pair]
    (library,) = (tmp_path / "cache").rglob(f"*{SUFFIX}")
    for output, _ in outputs:
        assert output.strip() == f"None False {library} (compiled on first use)"
    assert sum(errors.count("Compiling the CPU kernels") for _, errors in outputs) == 1
    assert not list((tmp_path / "cache").rglob(".build-*"))
    if sys.platform != "win32":
        modes = {path: path.stat().st_mode & 0o777 for path in (library, library.parent, tmp_path / "cache")}
        assert list(modes.values()) == [0o755, 0o700, 0o700]
        assert not any(path.stat().st_mode & 0o022 for path in (tmp_path / "cache").rglob("*"))


def test_a_source_that_does_not_compile_is_a_reason_and_is_not_tried_again(
    fresh: CpuLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fresh.why_not_compile():
        pytest.skip(fresh.why_not_compile())
    (fresh.csrc / "cpu" / "tiny.cpp").write_text("int broken() { return missing_name; }\n")
    reason = fresh.load()
    assert reason is not None
    assert "error" in reason
    assert "missing_name" in reason
    log = Path(reason.split("full log: ")[1].rstrip(")"))
    assert "missing_name" in log.read_text()
    monkeypatch.setattr(fresh, "build", lambda *_: pytest.fail("compiled again"))
    assert fresh.load() == reason
    assert fresh.describe() == f"none ({reason})"


def test_a_prebuilt_library_for_other_sources_is_skipped_with_its_reason(
    tmp_path: Path, fresh: CpuLibrary, monkeypatch: pytest.MonkeyPatch, builds: list[Path]
) -> None:
    monkeypatch.setenv("SBERT_KERNELS_COMPILE", "0")
    library = tmp_path / "package" / fresh.prebuilt_name()
    library.write_bytes(b"")
    opened: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: opened.append(Path(path)))
    (fresh.csrc / "cpu" / "tiny.h").write_text("// a header is a source too\n")
    reason = fresh.load()
    assert reason is not None
    assert f"the prebuilt {library.name} is for another torch or other sources" in reason
    assert "SBERT_KERNELS_COMPILE=0" in reason
    assert opened == []
    assert builds == []


def test_a_prebuilt_library_for_another_torch_is_skipped_and_one_for_this_is_loaded(
    fresh: CpuLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[Path]
) -> None:
    monkeypatch.setenv("SBERT_KERNELS_COMPILE", "0")
    opened: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: opened.append(Path(path)))
    library = tmp_path / "package" / fresh.prebuilt_name()
    library.write_bytes(b"")
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "2.8.0+other")
        assert "2.8.0+other" in (fresh.load() or "")
        assert opened == []
        fresh._failures.clear()
    assert fresh.load() is None
    assert opened == [library]
    assert fresh.describe() == f"{library} (prebuilt)"


def test_forbidden_compiling_can_be_allowed_later(fresh: CpuLibrary, builds: list[Path]) -> None:
    with settings.override(compile=False):
        assert "SBERT_KERNELS_COMPILE=0" in (fresh.load() or "")
    assert builds == []
    assert "cannot be loaded" in (fresh.load() or "")
    assert len(builds) == 1


def test_a_library_that_was_compiled_earlier_serves_where_compiling_is_forbidden(
    fresh: CpuLibrary, monkeypatch: pytest.MonkeyPatch, builds: list[Path]
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: opened.append(Path(path)))
    assert fresh.load() is None
    monkeypatch.setattr(fresh, "_loaded", None)
    with settings.override(compile=False):
        assert fresh.load() is None
    assert opened == builds * 2


def test_the_loader_says_in_its_own_words_why_a_library_cannot_be_loaded(fresh: CpuLibrary, builds: list[Path]) -> None:
    reason = fresh.load()
    assert reason is not None
    assert "Could not load this library" not in reason  # torch's words for every cause
    assert Path(reason.split(" cannot be loaded: ")[0]).read_bytes() == b"not a library"


def test_a_cache_that_cannot_be_written_is_a_reason(
    fresh: CpuLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[Path]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SBERT_KERNELS_CACHE", str(tmp_path / "file"))
    reason = fresh.load()
    assert reason is not None
    assert f"{tmp_path / 'file'} is not a folder" in reason
    assert "SBERT_KERNELS_CACHE" in reason
    assert builds == []


@pytest.fixture
def planted(fresh: CpuLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[Path]) -> Path:
    """The library in the cache, as any user could have named it; what is loaded is read, not run."""
    monkeypatch.setattr(torch.ops, "load_library", lambda path: Path(path).read_bytes() == b"not a library" or 1 / 0)
    assert fresh.load() is None
    monkeypatch.setattr(fresh, "_loaded", None)
    (library,) = builds
    builds.clear()
    library.write_bytes(b"planted")
    return library


@by_mode
@pytest.mark.parametrize("above", [0, 1, 2])
def test_a_cache_that_others_can_write_is_neither_loaded_nor_written(
    fresh: CpuLibrary, planted: Path, builds: list[Path], tmp_path: Path, above: int
) -> None:
    folder = (planted.parent, planted.parent.parent, tmp_path)[above]
    folder.chmod(0o777)
    reason = fresh.load()
    assert reason is not None
    assert f"{folder} has mode 0777" in reason
    assert "SBERT_KERNELS_CACHE names another" in reason
    assert builds == []


@by_mode
def test_a_link_to_a_cache_that_others_can_write_is_followed_before_it_is_judged(
    fresh: CpuLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[Path]
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    monkeypatch.setenv("SBERT_KERNELS_CACHE", str(tmp_path / "link"))
    assert f"{tmp_path / 'shared'} has mode 0777" in (fresh.load() or "")
    assert builds == []
    assert not list((tmp_path / "shared").iterdir())


@by_mode
def test_a_library_that_others_can_write_is_compiled_over(
    fresh: CpuLibrary, planted: Path, builds: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    planted.chmod(0o666)
    with settings.override(compile=False):
        reason = fresh.load() or ""
    assert "SBERT_KERNELS_COMPILE=0" in reason
    assert f"is not loaded: {planted} has mode 0666" in reason
    assert builds == []
    planted.unlink()  # the fixture's build writes into the file that is there, where the real one replaces it
    planted.write_bytes(b"planted")
    planted.chmod(0o666)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "build", lambda library, _: (library.unlink(), library.write_bytes(b"not a library")))
        assert fresh.load() is None
    assert f"is not loaded: {planted} has mode 0666" in caplog.text


@as_root
def test_what_belongs_to_another_user_is_not_trusted(fresh: CpuLibrary, planted: Path, builds: list[Path]) -> None:
    with settings.override(compile=False):
        for path in (planted, planted.parent):
            os.chown(path, 12345, -1)
            fresh._failures.clear()
            assert f"{path} belongs to user 12345; wanted is one of this user's (0)" in (fresh.load() or "")
            os.chown(path, 0, -1)
    assert builds == []


@by_mode
@pytest.mark.parametrize("name", ["lock", "build.log"])
def test_no_file_of_the_user_s_is_written_through_a_link(
    fresh: CpuLibrary, tmp_path: Path, planted: Path, name: str
) -> None:
    """Left there by somebody at a time when he could write the folder."""
    planted.unlink()
    (tmp_path / "precious").write_text("precious")
    (planted.parent / name).unlink(missing_ok=True)
    (planted.parent / name).symlink_to(tmp_path / "precious")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "build", type(fresh).build.__get__(fresh))
        patch.setattr(building.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
        reason = fresh.load() or ""
    assert (tmp_path / "precious").read_text() == "precious"
    if name == "lock":
        assert f"{planted.parent / name} is neither a folder nor a file" in reason
    else:
        assert "the compiler said nothing" in reason


def test_no_compiler_and_no_ninja_are_reasons(
    fresh: CpuLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler ('no-such-compiler'" in (fresh.load() or "")
    for command in (" ", "c++ 'unfinished"):
        fresh._failures.clear()
        monkeypatch.setenv("CXX", command)
        assert f"CXX={command!r} is not a command" in (fresh.load() or "")
    fresh._failures.clear()
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(building, "environment", lambda: {"PATH": str(tmp_path)})
    assert "no ninja" in (fresh.load() or "")


def test_a_process_that_waited_for_a_failed_compile_takes_its_outcome(
    fresh: CpuLibrary, builds: list[Path], tmp_path: Path
) -> None:
    """Eight ranks must not compile the same broken source eight times, one after the other."""
    import filelock

    class Held(filelock.FileLock):
        def acquire(self, *args: object, **kwargs: object) -> object:
            log = Path(self.lock_file).with_name("build.log")
            log.write_text("tiny.cpp:1:1: error: as the other process found\n")
            later = log.stat().st_mtime + 1
            os.utime(log, (later, later))
            return super().acquire(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filelock, "FileLock", Held)
        assert "as the other process found" in (fresh.load() or "")
    assert builds == []


def test_the_sources_of_this_checkout_are_found() -> None:
    assert cpu.LIBRARY.sources()
