"""The compiled kernels are found, compiled once, or done without for a stated reason; never an exception."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sbert_kernels import extension, settings

# No torch header: a fraction of a second to compile, and no operator that the process could have already.
TINY = 'extern "C" int sbert_kernels_tiny() { return 7; }\n'
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
BUILD = extension.build
by_mode = pytest.mark.skipif(sys.platform == "win32", reason="modes say nothing on Windows")


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An extension that this process has not loaded yet: sources, package and cache of its own."""
    for name in ("sources", "package"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(extension, "SOURCES", tmp_path / "sources")
    monkeypatch.setattr(extension, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(extension, "_library", None)
    monkeypatch.setattr(extension, "_failures", {})
    monkeypatch.setenv("SBERT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SBERT_KERNELS_COMPILE", raising=False)
    (tmp_path / "sources" / "tiny.cpp").write_text(TINY)
    return tmp_path / "sources"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records compiles instead of running them; the "library" is no library, so that loading it fails."""
    made: list[Path] = []

    def build(library: Path, log: Path) -> None:
        made.append(library)
        library.write_bytes(b"not a library")

    monkeypatch.setattr(extension, "build", build)
    monkeypatch.setattr(extension, "why_not_compile", lambda: None)
    return made


def test_compiles_once_for_two_processes_and_the_library_loads(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a command of several words (a launcher, the compiler, a flag), and a umask that takes nothing away."""
    if extension.why_not_compile():
        pytest.skip(extension.why_not_compile())
    if sys.platform != "win32":
        monkeypatch.setenv("CXX", f"env {os.environ.get('CXX') or 'c++'} -DWORDS='\"two words\"'")
        (sources / "flag.cpp").write_text(
            'static_assert(sizeof(WORDS) == 10);\nextern "C" int sbert_kernels_flag() { return 0; }\n'
        )
    code = (
        "import os; os.umask(0)\n"
        "import logging, pathlib, sys; logging.basicConfig(); from sbert_kernels import extension\n"
        "extension.SOURCES = pathlib.Path(sys.argv[1]); extension.PACKAGE = extension.SOURCES\n"
        "print(extension.load(), 'torch.utils.cpp_extension' in sys.modules, extension.describe())"
    )
    command = [sys.executable, "-c", code, str(sources)]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=1800) for process in pair]
    (library,) = (tmp_path / "cache").rglob(f"*{extension._SUFFIX}")
    for output, _ in outputs:
        assert output.strip() == f"None False {library} (compiled on first use)"
    assert sum(errors.count("Compiling the CPU kernels") for _, errors in outputs) == 1
    assert not list((tmp_path / "cache").rglob(".build-*"))
    if sys.platform != "win32":
        modes = {path: path.stat().st_mode & 0o777 for path in (library, library.parent, tmp_path / "cache")}
        assert list(modes.values()) == [0o755, 0o700, 0o700]
        assert not any(path.stat().st_mode & 0o022 for path in (tmp_path / "cache").rglob("*"))


def test_a_source_that_does_not_compile_is_a_reason_and_is_not_tried_again(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if extension.why_not_compile():
        pytest.skip(extension.why_not_compile())
    (sources / "tiny.cpp").write_text("int broken() { return missing_name; }\n")
    reason = extension.load()
    assert reason is not None
    assert "error" in reason
    assert "missing_name" in reason
    log = Path(reason.split("full log: ")[1].rstrip(")"))
    assert "missing_name" in log.read_text()
    monkeypatch.setattr(extension, "build", lambda *_: pytest.fail("compiled again"))
    assert extension.load() == reason
    assert extension.describe() == f"none ({reason})"


def test_a_prebuilt_library_for_other_sources_is_skipped_with_its_reason(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, builds: list[Path]
) -> None:
    monkeypatch.setenv("SBERT_KERNELS_COMPILE", "0")
    library = tmp_path / "package" / extension.prebuilt_name()
    library.write_bytes(b"")
    opened: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: opened.append(Path(path)))
    (sources / "tiny.h").write_text("// a header is a source too\n")
    reason = extension.load()
    assert reason is not None
    assert f"the prebuilt {library.name} is for another torch or other sources" in reason
    assert "SBERT_KERNELS_COMPILE=0" in reason
    assert opened == []
    assert builds == []


def test_a_prebuilt_library_for_another_torch_is_skipped_and_one_for_this_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[Path]
) -> None:
    monkeypatch.setenv("SBERT_KERNELS_COMPILE", "0")
    opened: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: opened.append(Path(path)))
    library = tmp_path / "package" / extension.prebuilt_name()
    library.write_bytes(b"")
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "2.8.0+other")
        assert "2.8.0+other" in (extension.load() or "")
        assert opened == []
        extension._failures.clear()
    assert extension.load() is None
    assert opened == [library]
    assert extension.describe() == f"{library} (prebuilt)"


def test_forbidden_compiling_can_be_allowed_later(builds: list[Path]) -> None:
    with settings.override(compile=False):
        assert "SBERT_KERNELS_COMPILE=0" in (extension.load() or "")
    assert builds == []
    assert "cannot be loaded" in (extension.load() or "")
    assert len(builds) == 1


def test_a_library_that_was_compiled_earlier_serves_where_compiling_is_forbidden(
    monkeypatch: pytest.MonkeyPatch, builds: list[Path]
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: opened.append(Path(path)))
    assert extension.load() is None
    monkeypatch.setattr(extension, "_library", None)
    with settings.override(compile=False):
        assert extension.load() is None
    assert opened == builds * 2


def test_the_loader_says_in_its_own_words_why_a_library_cannot_be_loaded(builds: list[Path]) -> None:
    reason = extension.load()
    assert reason is not None
    assert "Could not load this library" not in reason  # torch's words for every cause
    assert Path(reason.split(" cannot be loaded: ")[0]).read_bytes() == b"not a library"


def test_a_cache_that_cannot_be_written_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[Path]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SBERT_KERNELS_CACHE", str(tmp_path / "file"))
    reason = extension.load()
    assert reason is not None
    assert f"{tmp_path / 'file'} is not a folder" in reason
    assert "SBERT_KERNELS_CACHE" in reason
    assert builds == []


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[Path]) -> Path:
    """The library in the cache, as any user could have named it; what is loaded is read, not run."""
    monkeypatch.setattr(torch.ops, "load_library", lambda path: Path(path).read_bytes() == b"not a library" or 1 / 0)
    assert extension.load() is None
    monkeypatch.setattr(extension, "_library", None)
    (library,) = builds
    builds.clear()
    library.write_bytes(b"planted")
    return library


@by_mode
@pytest.mark.parametrize("above", [0, 1, 2])
def test_a_cache_that_others_can_write_is_neither_loaded_nor_written(
    planted: Path, builds: list[Path], tmp_path: Path, above: int
) -> None:
    folder = (planted.parent, planted.parent.parent, tmp_path)[above]
    folder.chmod(0o777)
    reason = extension.load()
    assert reason is not None
    assert f"{folder} has mode 0777" in reason
    assert "SBERT_KERNELS_CACHE names another" in reason
    assert builds == []


@by_mode
def test_a_link_to_a_cache_that_others_can_write_is_followed_before_it_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[Path]
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    monkeypatch.setenv("SBERT_KERNELS_CACHE", str(tmp_path / "link"))
    assert f"{tmp_path / 'shared'} has mode 0777" in (extension.load() or "")
    assert builds == []
    assert not list((tmp_path / "shared").iterdir())


@by_mode
def test_a_library_that_others_can_write_is_compiled_over(
    planted: Path, builds: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    planted.chmod(0o666)
    with settings.override(compile=False):
        reason = extension.load() or ""
    assert "SBERT_KERNELS_COMPILE=0" in reason
    assert f"is not loaded: {planted} has mode 0666" in reason
    assert builds == []
    planted.unlink()  # the fixture's build writes into the file that is there, where the real one replaces it
    planted.write_bytes(b"planted")
    planted.chmod(0o666)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "build", lambda library, _: (library.unlink(), library.write_bytes(b"not a library")))
        assert extension.load() is None
    assert f"is not loaded: {planted} has mode 0666" in caplog.text


@as_root
def test_what_belongs_to_another_user_is_not_trusted(planted: Path, builds: list[Path]) -> None:
    with settings.override(compile=False):
        for path in (planted, planted.parent):
            os.chown(path, 12345, -1)
            extension._failures.clear()
            assert f"{path} belongs to user 12345; wanted is one of this user's (0)" in (extension.load() or "")
            os.chown(path, 0, -1)
    assert builds == []


@by_mode
@pytest.mark.parametrize("name", ["lock", "build.log"])
def test_no_file_of_the_user_s_is_written_through_a_link(tmp_path: Path, planted: Path, name: str) -> None:
    """Left there by somebody at a time when he could write the folder."""
    planted.unlink()
    (tmp_path / "precious").write_text("precious")
    (planted.parent / name).unlink(missing_ok=True)
    (planted.parent / name).symlink_to(tmp_path / "precious")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "build", BUILD)
        patch.setattr(extension.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
        reason = extension.load() or ""
    assert (tmp_path / "precious").read_text() == "precious"
    if name == "lock":
        assert f"{planted.parent / name} is neither a folder nor a file" in reason
    else:
        assert "the compiler said nothing" in reason


def test_no_compiler_and_no_ninja_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler ('no-such-compiler'" in (extension.load() or "")
    for command in (" ", "c++ 'unfinished"):
        extension._failures.clear()
        monkeypatch.setenv("CXX", command)
        assert f"CXX={command!r} is not a command" in (extension.load() or "")
    extension._failures.clear()
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(extension, "_environment", lambda: {"PATH": str(tmp_path)})
    assert "no ninja" in (extension.load() or "")


def test_a_process_that_waited_for_a_failed_compile_takes_its_outcome(builds: list[Path], tmp_path: Path) -> None:
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
        assert "as the other process found" in (extension.load() or "")
    assert builds == []


def test_the_sources_of_this_checkout_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert extension._sources()
