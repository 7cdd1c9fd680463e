"""The problems that a GPU library must solve before it serves, and how its results are judged.

The judge is the backend `blockwise` in float64, of the same rounded inputs: it shares no kernel of ours with what is
judged, and the vendor's float64 products are other kernels than those of half precision. In-batch losses are judged on
the device, whose float64 takes milliseconds where a CPU takes seconds; the others on the CPU.

Kernels are compiled for the width of embeddings: it is that of the problem that came, so that few kernels are compiled
for the check alone. Most problems have few rows: a number that is no multiple of a tile, but of 16, as usual ones are,
and they come in several chunks. A library that needs no compiling is also given problems so large that each block of a
launch computes several tiles, as it does in a usual call: see `large_rows`. These are computed twice, and must give the
same bits, as nothing is added up in an order that may change.

What is allowed is a multiple of `ROUNDINGS`, which is some times the error of rounding the softmax's weights once to
the type of the products. A whole gradient may have 14 times the error of eager torch on these problems in float32
(5e-7), but two fifths of it in bfloat16 (2%), as eager rounds logits too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from ...problems.contrastive import ContrastiveProblem, ContrastiveSpec, Needs
from ...problems.pairwise import PairwiseProblem
from ...problems.ranking import Needs as RankingNeeds
from ...problems.ranking import RankingProblem
from ...problems.scale import Scale
from .._backend import Operations, Problem

ROWS = 208
USUAL_SIZE = {"contrastive": 64, "ranking": 1008, "pairwise": 64}
# Of the width that a check takes from a problem: with less, embeddings are too much alike for a fair judgement.
LEAST_WIDTH, MOST_WIDTH = 32, 8192
# Of the ranking, which is one launch for up to 8192 pairs, compiled for the next power of 2.
LEAST_PAIRS, MOST_PAIRS, BESIDE = 64, 8192, 16
# Of the large problems: 8 steps of 64 at least, where the CUDA kernels' loads wrap around after 6; less than 1 GiB.
LEAST_LARGE_WIDTH, MOST_LARGE_WIDTH = 512, 2048
TILE = 128  # of the CUDA kernels, rows and columns
TILES_A_BLOCK = 3  # of a large problem, at least: both warp groups that take turns, and the first of them again
# Of the similarity matrix, which has 2 ROWS columns of 2 or 4 bytes: a chunk holds 128 rows or 64.
BLOCK_BYTES = 128 * 2 * ROWS * 2

ROUNDINGS = {torch.float32: 2.0**-18, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
# What results of a large problem may show instead in either type, and twice that: see `_contrastive_values`. One wrong
# tile of 450 at width 768 shows 0.5% in its rows' gradients, of which 0.4% is allowed, and 30% in the negatives' (3%);
# wrong sums of it show 2% in its rows' losses (0.8%). Right kernels show the most in float16, which rounds vectors of
# unit length: a vector is off by 2^-11 at worst, and the loss of a row by 0.4%.
OF_LARGE, TWICE = 2.0**-10, 2.0
# In roundings: of a number or of the mean factor of a gradient, of a gradient's norm, of the norm of its worst row.
OF_FACTOR, OF_WHOLE, OF_ROW = 1.5, 2.0, 4.0


@dataclass(frozen=True)
class Value:
    """One result of a problem, and the rounding that it may show some times, relative to its size."""

    name: str
    tensor: Tensor
    rounding: float


@dataclass(frozen=True)
class Case:
    """A problem of one operation and type, in plain memory.

    Attributes:
        name: What is special about it, for the log.
        operation: Its operation.
        problem: What is computed.
        gradients: The gradients are computed as well.
        large: Each block of a launch computes several tiles: all rows are computed at once, twice, and judged sharply.
    """

    name: str
    operation: str
    problem: Problem
    gradients: bool = True
    large: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type whose roundings its results may show."""
        problem = self.problem
        if isinstance(problem, ContrastiveProblem):
            return problem.queries.dtype
        return problem.scores.dtype if isinstance(problem, RankingProblem) else problem.x.dtype

    @property
    def block_bytes(self) -> int | None:
        """The setting that it is computed with; None: the usual one."""
        return None if self.large else BLOCK_BYTES

    def values(self, operations: Operations, problem: Problem) -> list[Value]:
        """Returns what a backend's modules compute of the problem, which may lie elsewhere or have another type."""
        return _VALUES[self.operation](operations, problem, self)


def size_of(operation: str, problem: Problem) -> int:
    """Returns the size that kernels are compiled for in a problem, or the nearest that is checked.

    That is the width of embeddings, or just less than the number of pairs that a kernel has room for.
    """
    if operation == "ranking":
        pairs = len(cast(RankingProblem, problem).scores)
        room = 1 << (max(pairs, LEAST_PAIRS) - 1).bit_length()
        return room - BESIDE if pairs <= MOST_PAIRS else MOST_PAIRS + BESIDE
    vectors = (
        cast(ContrastiveProblem, problem).queries if operation == "contrastive" else cast(PairwiseProblem, problem).x
    )
    return max(LEAST_WIDTH, min(vectors.shape[1], MOST_WIDTH))


def cases(
    operation: str, dtype: torch.dtype, size: int | None = None, multiprocessors: int | None = None
) -> Iterator[Case]:
    """Yields the problems of an operation in a type and of a size; none for a type that no GPU library serves.

    Args:
        operation: The operation.
        dtype: The type of what is multiplied.
        size: See `size_of`; None: one that serves a test.
        multiprocessors: The device's, for all problems; None: the few for a library whose kernels are compiled for
            each further kind of problem.
    """
    if dtype in ROUNDINGS:
        yield from _CASES[operation](dtype, size or USUAL_SIZE[operation], multiprocessors)


def large_rows(multiprocessors: int) -> int:
    """Returns the rows of a large problem, which has twice as many columns: no multiple of a tile, but of 16.

    With r tiles of rows there are 2 r^2 tiles, more than 3 for each block, of which a device runs one a multiprocessor.

    Cost: on an H100 (132 multiprocessors, r = 15) that makes 1872 rows and 3744 columns, 11 GFLOP a matrix product at
    width 768. The judge takes 12.5 of these for one type, 0.13 TFLOP in float64, and the kernels 28 at most in half
    precision: 10 ms by the rates of the data sheet. An H20, whose float64 is slow (1 TFLOP/s), has 78 multiprocessors:
    0.07 TFLOP, less than a tenth of a second. At the largest width it is 2.7 times as much.
    """
    tiles = math.isqrt(TILES_A_BLOCK * multiprocessors // 2) + 1
    return TILE * max(2, tiles) - 48


def moved(problem: Problem, device: torch.device, dtype: torch.dtype | None = None) -> Problem:
    """Returns the problem with all tensors on a device, and those of floating point in a type, if one is given."""

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(move, value))
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype)

    return replace(problem, **{field.name: move(getattr(problem, field.name)) for field in fields(problem)})


def fault(found: Value, exact: Value) -> str | None:
    """Returns how a result differs from the right one (float64, on any device) by more than is allowed, or None."""
    x, y = found.tensor.detach().to(exact.tensor), exact.tensor
    unit = found.rounding
    if x.shape != y.shape:
        return f"{found.name} has the shape {list(x.shape)}, wanted {list(y.shape)}"
    wild = int((~x.isfinite()).sum())
    if wild:
        return f"{found.name} has {wild} of {x.numel()} values that are no finite numbers"
    if x.dim() == 0:
        error = float((x - y).abs() / y.abs())
        return None if error <= OF_FACTOR * unit else f"{found.name} is {float(x):.6g}, wanted {float(y):.6g}"
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    sizes = y.norm(dim=1)
    rows = (x - y).norm(dim=1) / sizes.clamp(min=float(sizes.square().mean().sqrt()))
    whole, worst, factor = float((x - y).norm() / y.norm()), int(rows.argmax()), float((x * y).sum() / y.square().sum())
    if abs(factor - 1) <= OF_FACTOR * unit and whole <= OF_WHOLE * unit and float(rows[worst]) <= OF_ROW * unit:
        return None
    return (
        f"{found.name} differs by {whole:.2g} of its norm ({OF_WHOLE * unit:.2g} is allowed), in row {worst} by "
        f"{float(rows[worst]):.2g} ({OF_ROW * unit:.2g}), and is {factor:.5f} times as large "
        f"(within {OF_FACTOR * unit:.2g})"
    )


# -- contrastive ------------------------------------------------------------------------------------------------------


def _contrastive_values(operations: Operations, problem: Problem, case: Case) -> list[Value]:
    """Returns loss and gradients; of a large problem also each row's loss, and the negatives' gradient by itself.

    A tile is a small part of a large problem. Wrong weights of a tile show where weights are all that is summed up: in
    the negatives' gradient. Elsewhere the row's own positive is nearly all of a gradient; it is never rounded to the
    type of the products, and so the errors of right kernels are as small. Wrong sums of a tile show in the losses of
    its rows or columns, which are float32's; the gradient of the rows' weights tells them.
    """
    problem = cast(ContrastiveProblem, problem)
    needs = Needs(queries=case.gradients, documents=case.gradients, weights=case.large)
    result, n = operations.contrastive.contrastive(problem, needs), len(problem.queries)
    of_weights = ROUNDINGS[case.dtype]
    rounding = OF_LARGE if case.large else of_weights
    found = [("the loss", result.loss, rounding), ("the queries' gradient", result.queries, rounding)]
    if case.large and result.documents is not None:
        found.append(("the positives' gradient", result.documents[:n], rounding))
        found.append(("the negatives' gradient", result.documents[n:], TWICE * of_weights))
    else:
        found.append(("the documents' gradient", result.documents, rounding))
    found.append(("the losses of the rows", result.weights, TWICE * rounding))
    return [Value(name, x, unit) for name, x, unit in found if x is not None]


def _contrastive_cases(dtype: torch.dtype, width: int, multiprocessors: int | None) -> Iterator[Case]:
    half, all_of_them = dtype != torch.float32, multiprocessors is not None
    vectors = _vectors(ROWS, width)

    def case(name: str, gradients: bool = True, **options: Any) -> Case:
        return Case(name, "contrastive", _contrastive(dtype, *vectors, **options), gradients)

    yield case("one direction")
    if all_of_them or not half:
        yield case("both directions", both=True)
    if dtype != torch.float16 and (all_of_them or half):
        # The rule of entries with equal ids, and rows that are done again as all their logits are far below the bound.
        # Float16 rounds unit vectors: at this scale errors are several times as large.
        yield case("ids, scale 100", duplicates="mask", scale=100.0)
    if multiprocessors is None:
        return
    yield case("ids", duplicates="mask")
    yield case("ids, both directions", both=True, duplicates="mask")
    yield case("ids, the loss alone", gradients=False, duplicates="mask")
    # With a shift, where the type allows a bound that has one.
    yield case("hard negatives", hardness=4.0, scale=20.0 if dtype == torch.float16 else 60.0)
    if half:
        yield from _large_cases(dtype, width, multiprocessors)


def _large_cases(dtype: torch.dtype, width: int, multiprocessors: int) -> Iterator[Case]:
    """Yields a problem for each kernel of the CUDA library, of several tiles a block."""
    rows = large_rows(multiprocessors)
    vectors = _vectors(rows, max(LEAST_LARGE_WIDTH, min(width, MOST_LARGE_WIDTH)))
    weights = torch.linspace(0.5, 1.5, rows, device="cpu")

    def case(name: str, gradients: bool = True, **options: Any) -> Case:
        problem = replace(_contrastive(dtype, *vectors, **options), weights=weights)
        return Case(f"{name}, several tiles a block", "contrastive", problem, gradients, large=True)

    yield case("one direction")
    yield case("ids", duplicates="mask")
    yield case("both directions", both=True)
    yield case("the loss alone", gradients=False)
    yield case("ids, the loss alone", gradients=False, duplicates="mask")


def _vectors(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns queries, positives that a model half knows, negatives, (rows, width) each, and a vector beside them."""
    draw = _normal(seed=0)
    queries, beside = draw(rows, width), draw(width)
    return queries, queries + 2 * draw(rows, width), draw(rows, width), beside


def _contrastive(
    dtype: torch.dtype,
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    beside: Tensor,
    *,
    both: bool = False,
    duplicates: str = "keep",
    scale: float = 20.0,
    hardness: float = 0.0,
) -> ContrastiveProblem:
    rows, documents = len(queries), [positives, negatives]
    ids = torch.arange(2 * rows, device="cpu") // 3
    if scale > 20:  # some queries are far from all documents
        documents = [column + beside for column in documents]
        queries = torch.cat([queries[: rows // 16] - 2 * beside, queries[rows // 16 :]])
    return ContrastiveProblem(
        queries=queries.to(dtype),
        documents=tuple([column.to(dtype) for column in documents]),
        scale=Scale(scale),
        query_ids=ids[:rows],
        document_ids=ids,
        spec=ContrastiveSpec(
            directions=("query_to_doc", "doc_to_query") if both else ("query_to_doc",),
            partition_mode="per_direction" if both else "joint",
            duplicates=duplicates,
            hardness_mode="hard_negatives" if hardness else None,
            hardness_strength=hardness,
        ),
    )


# -- ranking ----------------------------------------------------------------------------------------------------------


def _ranking_values(operations: Operations, problem: Problem, case: Case) -> list[Value]:
    result = operations.ranking.ranking(cast(RankingProblem, problem), RankingNeeds(scores=case.gradients))
    found = {"the loss": result.loss, "the scores' gradient": result.scores}
    return [Value(name, x, ROUNDINGS[torch.float32]) for name, x in found.items() if x is not None]


def _ranking_cases(dtype: torch.dtype, pairs: int, multiprocessors: int | None) -> Iterator[Case]:
    draw = _normal(seed=1)
    scores = 0.3 * draw(pairs)
    labels = (scores + 0.3 * draw(pairs)).mul(20).round()  # some 40 values, each many times
    yield Case("labels with ties", "ranking", RankingProblem(scores.to(dtype), labels, Scale(20.0)))
    if multiprocessors is not None:
        yield Case("labels of integers", "ranking", RankingProblem(scores.to(dtype), labels.long(), Scale(20.0)))


# -- pairwise ---------------------------------------------------------------------------------------------------------


def _pairwise_values(operations: Operations, problem: Problem, case: Case) -> list[Value]:
    problem = cast(PairwiseProblem, problem)
    scores = operations.pairwise.pairwise(problem)
    found = [
        Value(f"{name} similarities", x, ROUNDINGS[torch.float32])
        for name, x in zip(problem.similarities, scores, strict=True)
    ]
    if case.gradients:
        draw = _normal(seed=3)
        flowing = [draw(len(x)).to(x) for x in scores]
        result = operations.pairwise.pairwise_gradients(problem, flowing, [True] * (1 + len(problem.columns)))
        for name, x in (("x", result.x), *((f"column {i}", x) for i, x in enumerate(result.columns))):
            assert x is not None
            found.append(Value(f"the gradient of {name}", x, ROUNDINGS[case.dtype]))
    return found


def _pairwise_cases(dtype: torch.dtype, width: int, multiprocessors: int | None) -> Iterator[Case]:
    draw = _normal(seed=2)
    x, y = draw(ROWS, width).to(dtype), draw(ROWS, width).to(dtype)
    for similarity in ("cos", "angle"):
        yield Case(similarity, "pairwise", PairwiseProblem(x, (y,), (similarity,)))


def _normal(seed: int) -> Callable[..., Tensor]:
    """Returns a function that draws normal numbers of a shape, in float32 on the CPU, from a generator of its own."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


_VALUES: dict[str, Callable[[Operations, Problem, Case], list[Value]]] = {
    "contrastive": _contrastive_values,
    "ranking": _ranking_values,
    "pairwise": _pairwise_values,
}
_CASES: dict[str, Callable[[torch.dtype, int, int | None], Iterator[Case]]] = {
    "contrastive": _contrastive_cases,
    "ranking": _ranking_cases,
    "pairwise": _pairwise_cases,
}
