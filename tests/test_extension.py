"""The compiled kernels are found, compiled once, or done without for a stated reason; never an exception."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sbert_kernels import extension, settings

# No torch header: a fraction of a second to compile, and no operator that the process could have already.
TINY = 'extern "C" int sbert_kernels_tiny() { return 7; }\n'


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
    monkeypatch.setattr(extension, "obstacle", lambda: None)
    return made


def test_compiles_once_for_two_processes_and_the_library_loads(tmp_path: Path, sources: Path) -> None:
    if extension.obstacle():
        pytest.skip(extension.obstacle())
    code = (
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


def test_a_source_that_does_not_compile_is_a_reason_and_is_not_tried_again(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if extension.obstacle():
        pytest.skip(extension.obstacle())
    (sources / "tiny.cpp").write_text("int broken() { return missing_name; }\n")
    with caplog.at_level(logging.WARNING):
        reason = extension.load()
    assert reason is not None
    assert "error" in reason
    assert "missing_name" in reason
    log = Path(caplog.messages[-1].split("Full log: ")[1].rstrip("."))
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
    assert str(tmp_path / "file") in reason
    assert "SBERT_KERNELS_CACHE" in reason
    assert builds == []


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
