"""A GPU library is compared with torch operations before it serves: what is found, what is done about it, what is kept.

A library of torch operations, which can be sabotaged, stands for one of a GPU; it takes the CPU for its device.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
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
from sbert_kernels.backends.blockwise import BlockwiseBackend
from sbert_kernels.backends.self_check import Kind, cases, records
from sbert_kernels.problems.contrastive import ContrastiveProblem
from sbert_kernels.problems.scale import Scale

CPU = torch.device("cpu")
Sabotage = Callable[[Any], Any]


class Library(BlockwiseBackend):
    """Computes pairwise gradients as ``sabotage`` changes them."""

    name = "library"
    summary = "a library"
    device = "cpu"
    self_checked = "quickly"

    def __init__(self, sabotage: Sabotage = lambda gradient: gradient) -> None:
        self.sabotage, self.calls = sabotage, 0

    def load(self) -> Operations:
        right = super().load()

        def gradients(problem: Any, *rest: Any) -> Any:
            self.calls += 1
            found = right.pairwise.pairwise_gradients(problem, *rest)
            return found._replace(x=self.sabotage(found.x))

        return right._replace(pairwise=SimpleNamespace(pairwise=right.pairwise.pairwise, pairwise_gradients=gradients))

    def kernel_files(self) -> tuple[Path, ...]:
        return (Path(__file__),)


class Process:
    """Starts processes that choose between a library and torch operations; each has forgotten what the others found."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def start(self, library: Library) -> Library:
        for name, empty in (("_right", set()), ("_unchecked", set()), ("_wrong", {}), ("_raised", {})):
            self._monkeypatch.setattr(self_check, name, empty)
        self._monkeypatch.setattr(backends, "BACKENDS", (library, BlockwiseBackend()))
        return library


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Process:
    monkeypatch.setenv("SBERT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SBERT_KERNELS_COMPILE", "0")  # nor does anything compile into that folder
    monkeypatch.setattr(cases, "ROWS", 32)
    monkeypatch.setattr(cases, "USUAL_SIZE", {"contrastive": 64, "ranking": 32, "pairwise": 64})
    monkeypatch.setattr(cases, "LEAST_PAIRS", 32)
    monkeypatch.setattr(cases, "large_rows", lambda multiprocessors: 32)
    started = Process(monkeypatch)
    started.start(Library())
    return started


def chosen(operation: str = "pairwise", **values: Any) -> str:
    x = torch.ones(2, 4)
    parts: dict[str, Any] = {"x": x, "queries": x, "scores": x[0], "autocast": None, "device": CPU, **values}
    return backends.choose(operation, problem=SimpleNamespace(**parts)).backend.name


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.json"))


def scaled(gradient: Tensor) -> Tensor:
    return gradient * 1.01


def one_wrong_row(gradient: Tensor) -> Tensor:
    gradient[7] = gradient[8]
    return gradient


def one_nan(gradient: Tensor) -> Tensor:
    gradient[3, 5] = float("nan")
    return gradient


def raising(error: BaseException) -> Sabotage:
    def sabotage(gradient: Tensor) -> Tensor:
        raise error

    return sabotage


# -- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreted", "process")
@pytest.mark.parametrize(
    "kind",
    [Kind("contrastive", torch.bfloat16, 64), Kind("ranking", torch.float32, 32), Kind("pairwise", torch.float32, 64)],
    ids=str,
)
def test_the_triton_kernels_are_right(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "ROWS", 16)
    assert self_check._compare(backends.TritonBackend(), kind, CPU) == (True, None)


@pytest.mark.usefixtures("interpreted", "process")
def test_a_wrong_triton_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from sbert_kernels.backends.triton import pairwise

    launch = pairwise.launch

    def wrong(kernel: Any, *arguments: Any, **named: Any) -> None:
        launch(kernel, *arguments, **named)
        if named.get("x_gradient") is not None:
            named["x_gradient"].mul_(1.01)

    monkeypatch.setattr(pairwise, "launch", wrong)
    _, found = self_check._compare(backends.TritonBackend(), Kind("pairwise", torch.float32, 64), CPU)
    assert found is not None
    assert "pairwise in float32 of width 64, cos: the gradient of x differs by 0.01 of its norm" in found


@pytest.mark.usefixtures("process")
def test_every_problem_is_solved_by_torch_operations() -> None:
    """Nothing that eager torch computes in the same type is called wrong, and the problems are what they say."""
    library = Library()
    for kind in self_check.KINDS:
        names = [case.name for case in cases.cases(kind.operation, kind.dtype, multiprocessors=2)]
        assert len({*names}) == len(names) > 0
        assert {case.name for case in cases.cases(kind.operation, kind.dtype)} <= {*names}
    monitored = [
        Kind("contrastive", torch.float32, 64),
        Kind("contrastive", torch.bfloat16, 64),
        Kind("ranking", torch.bfloat16, 32),
        Kind("pairwise", torch.float16, 64),
    ]
    library.self_checked = "thoroughly"
    assert [self_check._compare(library, kind, CPU) for kind in monitored] == [(True, None)] * 4


def test_the_check_is_made_at_the_size_that_the_user_s_kernels_are_compiled_for() -> None:
    def size(operation: str, shape: tuple[int, ...]) -> int:
        x = torch.empty(shape, device="meta")
        return cases.size_of(operation, SimpleNamespace(queries=x, x=x, scores=x))

    for operation in ("contrastive", "pairwise"):
        widths = (1, 32, 300, 768, 8192, 9000)
        assert [size(operation, (9, width)) for width in widths] == [32, 32, 300, 768, 8192, 8192]
    pairs = (0, 64, 65, 1000, 1024, 8192, 8193, 100_000)
    assert [size("ranking", (n,)) for n in pairs] == [48, 48, 112, 1008, 1008, 8176, 8208, 8208]
    (case, *_) = cases.cases("contrastive", torch.bfloat16, 300)
    assert case.problem.queries.shape == (cases.ROWS, 300)


@pytest.mark.usefixtures("process")
def test_other_bits_of_the_same_large_problem_are_a_fault() -> None:
    """As of a race; too few of them to be called wrong otherwise."""

    class Racing(Library):
        self_checked = "thoroughly"

        def load(self) -> Operations:
            right = super().load()

            def contrastive(problem: Any, needs: Any) -> Any:
                self.calls += 1
                found = right.contrastive.contrastive(problem, needs)
                if found.queries is not None and problem.queries.shape[1] >= cases.LEAST_LARGE_WIDTH:
                    found.queries[3, 5] *= 1 + 1e-6 * self.calls
                return found

            return right._replace(contrastive=SimpleNamespace(contrastive=contrastive))

    _, found = self_check._compare(Racing(), Kind("contrastive", torch.float16, 64), CPU)
    assert found is not None
    assert found.endswith("several tiles a block: the queries' gradient has other bits when it is computed again")


@pytest.mark.parametrize("multiprocessors", [2, 78, 114, 132, 148])
def test_each_block_of_a_large_problem_computes_several_tiles(multiprocessors: int) -> None:
    rows = cases.large_rows(multiprocessors)
    down, across = -(-rows // cases.TILE), -(-2 * rows // cases.TILE)
    assert 3 * multiprocessors < down * across <= max(8, 4 * multiprocessors)
    assert down >= 2
    assert rows % cases.TILE != 0 == rows % 16


def test_large_problems_are_wide_and_of_every_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "large_rows", lambda multiprocessors: 32)
    for width, wanted in ((64, 512), (768, 768), (8192, 2048)):
        large = [case for case in cases.cases("contrastive", torch.float16, width, 132) if case.large]
        assert {case.problem.queries.shape[1] for case in large} == {wanted}
        assert {case.block_bytes for case in large} == {None}
    problems = [case.problem.spec for case in large]
    assert {(len(spec.directions), spec.duplicates) for spec in problems} == {(1, "keep"), (1, "mask"), (2, "keep")}
    assert {case.gradients for case in large} == {True, False}


@pytest.mark.parametrize("dtype", cases.ROUNDINGS)
@pytest.mark.parametrize("sabotage", [scaled, one_wrong_row, one_nan])
def test_what_is_a_percent_off_is_wrong_in_every_type(sabotage: Sabotage, dtype: torch.dtype) -> None:
    exact = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)).double()
    rounded = exact.to(dtype)
    unit = cases.ROUNDINGS[dtype]
    right = cases.Value("it", exact, unit)
    assert cases.fault(cases.Value("it", rounded, unit), right) is None
    assert cases.fault(cases.Value("it", sabotage(rounded.float()), unit), right) is not None
    loss = cases.Value("the loss", torch.tensor(2.0, dtype=torch.float64), unit)
    assert cases.fault(cases.Value("the loss", torch.tensor(2.0), unit), loss) is None
    for value in (2.02, float("nan")):
        assert cases.fault(cases.Value("the loss", torch.tensor(value), unit), loss) is not None


# -- what is done about it --------------------------------------------------------------------------------------------


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


# -- what is kept -----------------------------------------------------------------------------------------------------


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
