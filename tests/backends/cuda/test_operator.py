"""The operator of the CUDA library, policy by policy, against float64: on a GPU, and its epilogue's emulation on a CPU.

Outputs hold NaN before each call. Shapes are ragged, except the first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sbert_kernels.backends import cuda
from support import cuda_operator
from support.operator_judge import faults

pytest.importorskip("triton")

from sbert_kernels.bench.kernels_cuda import POLICIES, Policy, arguments

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shifted": {"scale": 50.0, "shift": 30.0},
    "diagonals": {"excluded": [3, 40, 3], "special": [10, 70, 2], "special_ratio": 1.25, "own_column": 3},
    "far apart": {},
    "below": {"excluded": [-30, 0, 1], "special": [-5, -64, 2], "special_ratio": 0.8, "own_column": -30},
}
SHAPES = ((256, 512, 64), (1000, 2056, 200), (333, 777, 72), (129, 127, 8), (1, 1, 8), (1, 300, 64), (4096, 8192, 768))
REPEATS = 20  # of the last shape: it has several tiles for each block, and a race may show once in many times


def why_not_on_a_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU that torch can use"
    return cuda.why_not_on("cuda:0", True)


def called(policy: Policy, shape: tuple[int, int, int], option: str, device: str) -> dict[str, Any]:
    given = arguments(policy, *shape, device, **OPTIONS[option])
    if policy.dtype == "float16":
        _fit_into_float16(given)
    if option == "far apart":
        given |= {name: _far_apart(given[name]) for name in ("rows", "columns")}
    if policy.ids:  # far larger than 32 bits; of two that are equal in those, one is another
        ids = given["row_ids"] % 40 + (1 << 40), given["column_ids"] % 40 + (1 << 40)
        given["row_ids"], given["column_ids"] = ids
        given["column_ids"][1::7] += 1 << 33
    if given["column_sums"] is not None and option == "below":  # of some columns
        given["column_sums"] = given["column_sums"][:, : shape[1] // 2 + 1].contiguous()
    torch.ops.sbert_kernels_cuda.contrastive_weights(**given)
    return given


def _far_apart(vectors: torch.Tensor) -> torch.Tensor:
    """Returns the vectors inside of wider ones, which begin 16 bytes before them; around them there is NaN."""
    n, width = vectors.shape
    wide = torch.full((n, width + 16), float("nan"), dtype=vectors.dtype, device=vectors.device)
    return wide[:, 8 : 8 + width].copy_(vectors)


def _fit_into_float16(given: dict[str, Any]) -> None:
    """Has the weights of each row add up to about a hundred, as a plan does; unlike bfloat16 the type is narrow."""
    given["shift"] = given["scale"]
    if given["row_coefficient"] is not None:
        products = given["row_factor"][:, None] * given["column_factor"]
        logits = given["scale"] * (given["rows"].float() @ given["columns"].float().T * products)
        given["row_coefficient"] = 100 / ((logits - given["shift"]).exp() * products).sum(1)


@pytest.mark.gpu
@pytest.mark.skipif(why_not_on_a_gpu() is not None, reason=str(why_not_on_a_gpu()))
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.dtype} {policy.name}")
def test_every_policy_on_a_gpu(policy: Policy, shape: tuple[int, int, int], option: str) -> None:
    given = called(policy, shape, option, "cuda")
    assert faults(given) == []
    for _ in range(REPEATS if shape == SHAPES[-1] and option == "plain" else 1):
        again = called(policy, shape, option, "cuda")
        for name in ("weights", "row_sums", "column_sums"):
            if given[name] is not None:
                assert torch.equal(given[name], again[name]), f"{name} has other bits in another call"


@pytest.mark.gpu
@pytest.mark.skipif(why_not_on_a_gpu() is not None, reason=str(why_not_on_a_gpu()))
@pytest.mark.parametrize("policy", [Policy("rows", "bfloat16"), Policy("known", "bfloat16", both=True)], ids=str)
def test_more_entries_than_a_32_bit_index_counts(policy: Policy) -> None:
    """The first and the last rows of 2^31 weights and more."""
    shape = (33000, 65544, 64)
    if torch.cuda.mem_get_info()[0] < 3 * shape[0] * shape[1]:
        pytest.skip("needs 7 GiB of free memory")
    given = called(policy, shape, "plain", "cuda")
    assert faults(given, 0, 200) == []
    assert faults(given, shape[0] - 200) == []


@pytest.mark.gpu
@pytest.mark.skipif(why_not_on_a_gpu() is not None, reason=str(why_not_on_a_gpu()))
def test_a_cuda_graph_replays_the_operator() -> None:
    policy, shape = Policy("rows", "bfloat16"), (1000, 2056, 200)
    given = called(policy, shape, "diagonals", "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.sbert_kernels_cuda.contrastive_weights(**given)
    given["rows"].copy_(given["rows"].roll(1, 0))
    given["row_factor"].copy_(given["row_factor"].roll(1, 0))
    given["weights"].fill_(float("nan"))
    graph.replay()
    assert faults(given) == []


# -- on a CPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.dtype} {policy.name}")
def test_the_epilogue_on_the_host_passes_the_same_test(policy: Policy, option: str) -> None:
    with cuda_operator.registered():
        for shape in ((129, 150, 8), (1, 300, 64), (1, 1, 8)):
            assert faults(called(policy, shape, option, "cpu")) == [], shape


@pytest.mark.parametrize(
    ("output", "index", "value", "words"),
    [
        ("weights", (7, 8), float("nan"), "1 weights were not written"),
        ("weights", (7, 7), 1e-9, "1 weights of entries that are left out are not zero"),
        ("weights", (9, slice(None)), 0.0, "1 in the worst row"),
        ("row_sums", (1, 9), 0.0, "row_sums is"),
        ("column_sums", (0, 149), float("nan"), "column_sums is nan off"),
    ],
)
def test_the_test_hears_what_is_wrong(output: str, index: Any, value: float, words: str) -> None:
    with cuda_operator.registered():
        policy = Policy("sums" if output == "column_sums" else "rows", "bfloat16", both=output == "column_sums")
        given = called(policy, (129, 150, 8), "plain", "cpu")
        assert faults(given) == []
        given[output][index] = value
    assert words in "; ".join(faults(given))


def test_what_is_written_behind_the_columns_is_heard() -> None:
    with cuda_operator.registered():
        given = called(Policy("rows", "bfloat16"), (129, 150, 8), "plain", "cpu")
    given["weights"]._base[5, 151] = 0.0
    assert faults(given) == ["what lies behind the columns was written to"]
