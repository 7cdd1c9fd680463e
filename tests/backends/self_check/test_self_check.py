"""What is done about what the self-check finds: once, for whom, and what is told."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sbert_kernels import backends, pairwise_similarity, settings
from sbert_kernels.__main__ import main
from sbert_kernels.backends import self_check
from sbert_kernels.backends._backend import Operations
from sbert_kernels.backends.self_check import Kind, cases, records
from sbert_kernels.problems.contrastive import ContrastiveProblem
from sbert_kernels.problems.scale import Scale
from support.self_checked import CPU, Library, Process, Sabotage, chosen, kept, one_nan, one_wrong_row, raising, scaled


@pytest.mark.parametrize(
    ("sabotage", "words"),
    [
        (scaled, "the gradient of x differs by 0.01 of its norm"),
        (one_wrong_row, "in row 7 by"),
        (one_nan, "the gradient of x has 1 of 1024 values that are no finite numbers"),
    ],
)
def test_a_wrong_library_is_off_from_then_on_and_one_line_says_so(
    process: Process, caplog: pytest.LogCaptureFixture, sabotage: Sabotage, words: str
) -> None:
    library = process.start(Library(sabotage))
    assert chosen("ranking") == "library"  # whose kernels are right, and not trusted any more after this
    assert [chosen() for _ in range(3)] == ["blockwise"] * 3
    assert library.calls == 1
    assert chosen("ranking") == "blockwise"
    (line,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    text = line.getMessage()
    assert text.startswith(
        "The library kernels are switched off: WRONG RESULTS on cpu (cpu): pairwise in float32 of width 32, cos: "
    )
    assert words in text
    assert "The blockwise backend serves instead (row blocks" in text
    assert "Please report this" in text
    with pytest.raises(ValueError, match="backend='library' cannot serve this call: WRONG RESULTS"):
        backends.choose("pairwise", "library", SimpleNamespace(x=torch.ones(2, 4), device=CPU))
    # A process that comes later knows without a check, whatever it computes first.
    library = process.start(Library(sabotage))
    assert chosen("contrastive") == chosen() == "blockwise"
    assert library.calls == 0


def test_losses_are_computed_by_what_serves_instead(process: Process) -> None:
    process.start(Library(scaled))
    leaf = torch.randn(6, 4, requires_grad=True)
    other = torch.randn(6, 4)
    wanted = torch.autograd.grad(torch.cosine_similarity(leaf, other).sum(), leaf)[0]
    (scores,) = pairwise_similarity(leaf, other, ("cos",))
    torch.testing.assert_close(torch.autograd.grad(scores.sum(), leaf)[0], wanted)


def test_without_the_check_a_library_serves_whatever_it_computes(
    process: Process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = process.start(Library(scaled))
    assert chosen() == "blockwise"
    monkeypatch.setenv("SBERT_KERNELS_SELFCHECK", "0")
    assert chosen() == "library"
    library = process.start(Library(scaled))
    assert chosen() == "library"
    assert library.calls == 0


def test_a_kernel_that_raises_is_off_with_the_reason_and_tried_by_the_next_process(
    process: Process, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    library = process.start(Library(raising(RuntimeError("no C compiler\nand more"))))
    assert [chosen(), chosen(), chosen("ranking")] == ["blockwise", "blockwise", "library"]
    assert library.calls == 1
    (line,) = caplog.messages
    assert (
        "pairwise in float32 of width 32 raises RuntimeError in its self-check on cpu: no C compiler. The blockw"
        in line
    )
    assert [path.name.split("-")[1] for path in kept(tmp_path)] == ["ranking"]
    process.start(Library())
    assert chosen() == "library"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_where_memory_runs_out_the_library_serves_and_is_checked_again(
    process: Process, caplog: pytest.LogCaptureFixture, tmp_path: Path, error: Exception
) -> None:
    library = process.start(Library(raising(error)))
    assert [chosen(), chosen()] == ["library", "library"]
    assert library.calls == 2
    assert caplog.messages == []
    assert kept(tmp_path) == []


@pytest.mark.usefixtures("process")
def test_nothing_is_checked_while_a_graph_is_captured_or_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses import FakeTensorMode

    assert self_check._can_run(SimpleNamespace(device=CPU, x=torch.ones(2)))
    with FakeTensorMode():
        assert chosen() == "library"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not self_check._can_run(SimpleNamespace(device=torch.device("cuda:0"), x=torch.ones(2)))
    library = backends.BACKENDS[0]
    assert isinstance(library, Library)
    assert library.calls == 0
    assert chosen() == "library"
    assert library.calls == 2  # cos and angle


@pytest.mark.usefixtures("interpreted")
def test_triton_is_not_checked_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "_checked", lambda *_: pytest.fail("it was checked"))
    x = torch.randn(4, 16)
    pairwise_similarity(x, x, ("cos",), backend="triton")


def test_the_caller_s_state_is_neither_used_nor_changed(process: Process) -> None:
    library = process.start(Library())
    seen: list[Any] = []

    def watched(gradient: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), settings.get("block_bytes")))
        return gradient

    library.sabotage = watched
    torch.manual_seed(3)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), settings.override(block_bytes=12):
            assert chosen(x=torch.ones(2, 4, dtype=torch.float32, device=CPU)) == "library"
            assert settings.get("block_bytes") == 12
            assert torch.is_autocast_enabled("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert {*seen} == {(False, False, cases.BLOCK_BYTES)}
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_threads_wait_for_one_check(process: Process) -> None:
    library = process.start(Library(scaled))
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(chosen())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["blockwise"] * 4
    assert library.calls == 1


def test_what_is_served_in_half_precision_alone_is_checked_there(process: Process, tmp_path: Path) -> None:
    """As float32 embeddings whose products the settings make bfloat16."""

    class HalfAlone(Library):
        def why_not(self, operation: str, problem: Any) -> str | None:
            if operation == "pairwise" and problem.x.dtype == torch.float32 and len(problem.x) > 2:  # of the check
                return "it is float32"
            return None

    library = process.start(HalfAlone())
    assert chosen() == "library"
    assert library.calls == 2
    assert [path.name.split("-")[2] for path in kept(tmp_path)] == ["bfloat16"]
    library = process.start(HalfAlone(scaled))
    assert chosen() == "library"  # as it was found before
    kept(tmp_path)[0].unlink()
    library = process.start(HalfAlone(scaled))
    assert chosen() == "blockwise"
    kept(tmp_path)[0].unlink()
    library = process.start(HalfAlone(raising(RuntimeError("no C compiler"))))
    assert [chosen(), chosen(), chosen("ranking", scores=torch.ones(2).half())] == ["blockwise", "blockwise", "library"]
    assert library.calls == 1


def test_what_is_right_at_one_width_is_checked_at_another(
    monkeypatch: pytest.MonkeyPatch, process: Process, tmp_path: Path
) -> None:
    class WrongIfWide(Library):
        def load(self) -> Operations:
            right = super().load()

            def contrastive(problem: Any, needs: Any) -> Any:
                self.calls += 1
                found = right.contrastive.contrastive(problem, needs)
                return found._replace(loss=found.loss * 2) if problem.queries.shape[1] >= 128 else found

            return right._replace(contrastive=SimpleNamespace(contrastive=contrastive))

    def served(width: int) -> str:
        x = torch.ones(4, width, dtype=torch.bfloat16)
        return backends.choose("contrastive", problem=ContrastiveProblem(x, (x,), Scale(20.0))).backend.name

    for width in (64, 128):
        process.start(WrongIfWide())
        assert [served(width), served(width)] == [["library"] * 2, ["blockwise"] * 2][width == 128]
        assert len(kept(tmp_path)) == 1
        kept(tmp_path)[0].unlink()
    process.start(WrongIfWide())
    assert [served(width) for width in (64, 128, 64)] == ["library", "blockwise", "blockwise"]
    process.start(WrongIfWide())
    assert served(64) == "blockwise"


def test_a_library_that_serves_no_problem_of_the_check_is_not_called_right(
    process: Process, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class OnlyTwo(Library):
        def why_not(self, operation: str, problem: Any) -> str | None:
            return None if len(getattr(problem, "x", ())) == 2 else "there are not two"

    library = process.start(OnlyTwo(scaled))
    assert [chosen(), chosen()] == ["library"] * 2
    assert library.calls == 0
    assert kept(tmp_path) == []
    assert not self_check._right
    (line,) = caplog.messages
    assert line == (
        "The library kernels compute pairwise unchecked, as they serve none of the problems of their self-check "
        "(pairwise in bfloat16 of width 32)."
    )


def test_info_tells_what_is_known(
    process: Process, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(library: Library) -> str:
        process.start(library)
        assert main(["info"]) == 0
        text = capsys.readouterr().out
        return text[text.index("self-check") :].partition("\n\n")[0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace())
    library = Library()
    library.device = "cuda"
    assert "library: not checked yet" in printed(library)
    cuda = torch.device("cuda", 0)
    kept = records.Records(library, cuda)
    kept.write(Kind("pairwise", torch.float32, 300), records.Outcome(None, "2026-11-28T01:02:03+00:00"))
    line = "library: pairwise in float32 of width 300 right since 2026-11-28T01:02:03+00:00; nothing else"
    assert line in printed(library)
    kept.path(Kind("pairwise", torch.float32, 300)).with_name(f"library-junk-{kept.key}.json").write_text("")
    kept.write(Kind("ranking", torch.float32, 1008), records.Outcome("ranking is off", "2026-11-28T01:02:03+00:00"))
    assert "library: WRONG RESULTS on a GPU (cuda:0): ranking is off (found 2026-11-28T01:0" in printed(library)
    monkeypatch.setenv("SBERT_KERNELS_SELFCHECK", "0")
    assert "WRONG RESULTS" in printed(library)
    assert "(SBERT_KERNELS_SELFCHECK=0: it serves whatever is found)" in printed(library)
