"""What of the self-check is kept for later processes, and for which cards."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sbert_kernels.backends.self_check import records
from support.self_checked import CPU, Library, Process, chosen, kept, scaled


def test_what_is_right_is_kept_for_later_processes(
    process: Process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def checks() -> int:
        library = process.start(Library())
        assert [chosen(), chosen()] == ["library", "library"]
        return library.calls // 2

    assert [checks(), checks()] == [1, 0]
    (path,) = kept(tmp_path)
    assert path.name.startswith("library-pairwise-float32-32-")
    found = json.loads(path.read_text())
    assert found["wrong"] is None
    assert "card" not in found
    assert found["facts"]["torch"].startswith(torch.__version__)
    path.write_text(path.read_text()[:-20])  # cut off
    assert [checks(), checks()] == [1, 0]
    path.write_text('{"facts": 3}')
    assert [checks(), checks()] == [1, 0]
    path.write_text(json.dumps({**found, "facts": {}}))  # of something else, by an accident of the name
    assert [checks(), checks()] == [1, 0]
    path.chmod(0o666)  # anybody may have written it
    assert [checks(), checks()] == [1, 0]
    monkeypatch.setattr(records, "version", lambda name: "9.9")
    assert [checks(), checks()] == [1, 0]
    assert len(kept(tmp_path)) == 2
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".json"]


@pytest.mark.parametrize("other", ["host", "device"])
def test_what_is_wrong_counts_for_the_card_and_what_is_right_for_all_of_its_name(
    process: Process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: str
) -> None:
    def on_another_card(found: Library) -> tuple[str, int]:
        library = process.start(found)
        with monkeypatch.context() as there:
            there.setattr(records, "card", lambda device: {**card, other: "another"})
            return chosen(), library.calls

    card = records.card(CPU)
    process.start(Library(scaled))
    assert chosen() == "blockwise"
    (path,) = kept(tmp_path)
    assert json.loads(path.read_text())["card"] == card
    assert on_another_card(Library()) == ("library", 2)
    assert on_another_card(Library(scaled)) == ("library", 0)  # as another process of that card found
    library = process.start(Library())
    assert chosen() == "blockwise"
    assert library.calls == 0
    path.unlink()
    library = process.start(Library(scaled))
    assert chosen() == "library"  # what is right is shared
    assert library.calls == 0


def test_a_card_is_told_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid="GPU-1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert records.card(torch.device("cuda:1"))["device"] == "GPU-1234"
    del properties.uuid
    assert records.card(torch.device("cuda:1"))["device"] == "cuda:1"


@pytest.mark.parametrize("cache", ["a file", "open to all"])
def test_where_nothing_can_be_kept_each_process_checks_and_one_line_says_so(
    process: Process, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, cache: str
) -> None:
    path = tmp_path / "elsewhere"
    if cache == "a file":
        path.write_text("")
    else:
        path.mkdir()
        path.chmod(0o777)
    monkeypatch.setenv("SBERT_KERNELS_CACHE", str(path))
    for _ in range(2):
        library = process.start(Library())
        assert [chosen(), chosen(), chosen("ranking")] == ["library"] * 3
        assert library.calls == 2
    (line,) = caplog.messages
    assert line.startswith("What the self-check of the library kernels finds is not kept, so that each process checks")
    assert str(path) in line
