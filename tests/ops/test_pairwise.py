"""pairwise_similarity: values and gradients, whichever backend serves them."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from sentence_transformers import util
from torch import Tensor

from sbert_kernels import pairwise_similarity
from sbert_kernels.backends import BACKENDS

NAMES = [backend.name for backend in BACKENDS if backend.device in (None, "cpu")]
STOCK = {"cos": util.pairwise_cos_sim, "dot": util.pairwise_dot_score, "angle": util.pairwise_angle_sim}


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    return request.param


def draw(n: int, dim: int, count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dim, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def check(got: list[Tensor], exact: list[Tensor], rtol: float = 1e-9) -> None:
    for value, other in zip(got, exact, strict=True):
        largest = other.detach().abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(value, other, rtol=rtol, atol=rtol * largest + 1e-13)


def test_autocast_changes_nothing(backend: str) -> None:
    """There are no matrix products that it could give its type to."""
    x, y = (v.detach().float() for v in draw(9, 8, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pairwise_similarity(x, [y], list(STOCK), backend=backend)
    for value, outside in zip(inside, pairwise_similarity(x, [y], list(STOCK), backend=backend), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, outside)


@settings(max_examples=60, derandomize=True)
@given(
    n=st.integers(0, 70),
    dim=st.integers(2, 130),
    count=st.integers(1, 3),
    names=st.permutations(sorted(STOCK)).flatmap(lambda names: st.integers(1, 3).map(lambda k: names[:k])),
    needed=st.integers(1, 15),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("name", NAMES)
def test_equals_stock(
    compiled: None, name: str, n: int, dim: int, count: int, names: list[str], needed: int, seed: int
) -> None:
    """For every choice of similarities, columns and embeddings that need a gradient."""
    x, *columns = draw(n, dim, 1 + count, seed)
    leaves = [x, *columns]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(needed >> index & 1))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    exact = [torch.cat([STOCK[similarity](x, y) for y in columns]) for similarity in names]
    got = pairwise_similarity(x, columns, names, backend=name)
    check(list(got), exact)
    if wanted:
        factors = draw(1, n * count, len(names), seed + 1)
        sums = [sum((f[0] * s).sum() for f, s in zip(factors, scores, strict=True)) for scores in (got, exact)]
        check(*(list(torch.autograd.grad(total, wanted)) for total in sums))


@pytest.mark.parametrize("dim", [1, 7, 8])
def test_a_gradient_of_some_of_the_scores_only(backend: str, dim: int) -> None:
    x, y = draw(5, dim, 2)
    cos, dot, angle = pairwise_similarity(x, y, ("cos", "dot", "angle"), backend=backend)
    for scores, similarity in ((cos, "cos"), (dot, "dot"), (angle, "angle")):
        got = torch.autograd.grad(scores.sum(), [x, y], retain_graph=True)
        check(list(got), list(torch.autograd.grad(STOCK[similarity](x, y).sum(), [x, y])))


def test_zero_vectors_and_norms_below_the_least(backend: str) -> None:
    """As torch's normalize has it: below 1e-12 the divisor is a constant, and no gradient flows through it."""
    x, y = (v.detach() for v in draw(4, 6, 2))
    x[0], y[1] = 0, 0
    x[2] *= 1e-13 / x[2].norm()
    x, y = x.requires_grad_(), y.requires_grad_()
    got = pairwise_similarity(x, y, ("cos", "angle"), backend=backend)
    exact = [util.pairwise_cos_sim(x, y), util.pairwise_angle_sim(x, y)]
    check(list(got), exact)
    for value, other in zip(got, exact, strict=True):
        for mine, known in zip(
            *(torch.autograd.grad(v.sum(), [x, y], retain_graph=True) for v in (value, other)), strict=True
        ):
            for row, expected in zip(mine, known, strict=True):
                check([row], [expected])


@pytest.mark.parametrize("similarities", [("cos", "dot", "angle"), ("cos",), ("angle",)])
@pytest.mark.parametrize("name", ["cpu", "blockwise"])
def test_a_row_that_is_not_a_number_spoils_no_other(compiled: None, name: str, similarities: tuple[str, ...]) -> None:
    x, y = (v.detach() for v in draw(4, 6, 2))
    x[1, 3], y[2, 0] = torch.nan, torch.inf
    x, y = x.requires_grad_(), y.requires_grad_()
    scores = pairwise_similarity(x, y, similarities, backend=name)
    torch.stack(scores).sum().backward()
    for rows in (*scores, x.grad.sum(dim=1), y.grad.sum(dim=1)):
        assert rows[[0, 3]].isfinite().all()
        assert rows[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_are_float32_and_gradients_of_the_embeddings_type(backend: str, dtype: torch.dtype) -> None:
    """The scores exact to a rounding of float32, the gradients to one of their own type."""
    x, y, z = (v.detach().to(dtype).requires_grad_() for v in draw(9, 33, 3))
    scores = pairwise_similarity(x, [y, z], ("cos", "angle"), backend=backend)
    wide = [v.detach().double().requires_grad_() for v in (x, y, z)]
    exact = pairwise_similarity(wide[0], wide[1:], ("cos", "angle"), backend="reference")
    check([s.double() for s in scores], list(exact), rtol=1e-6)
    assert all(s.dtype == torch.float32 for s in scores)
    mine = torch.autograd.grad(sum(s.sum() for s in scores), [x, y, z])
    known = torch.autograd.grad(sum(s.sum() for s in exact), wide)
    assert all(gradient.dtype == dtype for gradient in mine)
    check([gradient.double() for gradient in mine], list(known), rtol=2 * torch.finfo(dtype).eps)


def test_mixed_types(backend: str) -> None:
    x, y = (v.detach() for v in draw(5, 8, 2))
    x, y = x.bfloat16().requires_grad_(), y.float().requires_grad_()
    (scores,) = pairwise_similarity(x, y, "cos", backend=backend)
    scores.sum().backward()
    assert (scores.dtype, x.grad.dtype, y.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(scores, util.pairwise_cos_sim(x.float(), y))


def views(x: Tensor) -> dict[str, Tensor]:
    """The same rows in other places in memory."""
    return {
        "transposed": x.T.contiguous().T,
        "sliced": torch.cat([x, x], dim=1)[:, : x.shape[1]],
        "every other row": x.repeat_interleave(2, dim=0)[::2],
        "every other column": x.repeat_interleave(2, dim=1)[:, ::2],
    }


@pytest.mark.parametrize("view", ["transposed", "sliced", "every other row", "every other column"])
def test_embeddings_lie_anywhere(backend: str, view: str) -> None:
    x, y = draw(6, 9, 2)
    exact = pairwise_similarity(x, y, ("cos", "angle"), backend=backend)
    got = pairwise_similarity(views(x)[view], views(y)[view], ("cos", "angle"), backend=backend)
    check(list(got), list(exact))
    check(*(list(torch.autograd.grad(s[0].sum() + s[1].square().sum(), [x, y])) for s in (got, exact)))


def test_one_row_may_stand_for_all(backend: str) -> None:
    x, y = draw(1, 9, 1)[0], draw(6, 9, 1, seed=1)[0]
    got = pairwise_similarity(x.expand(6, 9), y, "cos", backend=backend)[0]
    exact = pairwise_similarity(x.repeat(6, 1), y, "cos", backend=backend)[0]
    check(*(list(torch.autograd.grad(s.sum(), [x, y])) for s in (got, exact)))


def test_a_tensor_may_be_its_own_partner(backend: str) -> None:
    (x,) = draw(6, 9, 1)
    got, exact = pairwise_similarity(x, [x, 2 * x], "dot", backend=backend)[0], torch.cat([(x * x), 2 * (x * x)]).sum(1)
    check([got, *torch.autograd.grad(got.sum(), x)], [exact, *torch.autograd.grad(exact.sum(), x)])


def test_embeddings_changed_before_the_backward_pass_are_noticed(backend: str) -> None:
    x, y = draw(6, 9, 2)
    moved = x * 1
    (scores,) = pairwise_similarity(moved, y, "cos", backend=backend)
    moved.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_results_are_bitwise_the_same_with_any_number_of_threads(compiled: None) -> None:
    x, y, z = (v.detach().float().requires_grad_() for v in draw(3000, 65, 3))
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scores = pairwise_similarity(x, [y, z], ("cos", "angle"), backend="cpu")
            seen.append([*scores, *torch.autograd.grad(sum(s.sum() for s in scores), [x, y, z])])
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_operators_are_well_formed(compiled: None) -> None:
    """Schemas; and of the operators that a graph or a dry run sees, fake kernels and symbolic shapes."""
    import sbert_kernels.ops._traced as traced
    from sbert_kernels.backends import choose

    for operation in ("pairwise", "ranking"):
        assert choose(operation).backend.name == "cpu"
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    scores, labels = torch.randn(5), torch.rand(5)
    scale, weights = torch.tensor(3.0), torch.rand(5)
    compiled_ops = torch.ops.sbert_kernels
    real: list[tuple[Any, tuple[Any, ...]]] = [
        (compiled_ops.pairwise.default, (x, [y], [True, False, True])),
        (compiled_ops.pairwise_backward.default, (x, [y], scores, None, scores, [True, False])),
        (compiled_ops.ranking.default, (scores, labels, None, 20.0, [True, True, False])),
    ]
    for operator, arguments in real:
        torch.library.opcheck(operator, arguments, test_utils="test_schema")
    seen: list[tuple[Any, tuple[Any, ...]]] = [
        (traced._pairwise, (x, [y], "cos,angle", None)),
        (traced._pairwise_gradients, (x, [y], "cos", [scores], None, [True, True])),
        (traced._ranking_loss, (scores, labels, 20.0, None, None, None, [True, False, False])),
        (traced._ranking_loss, (scores, labels, 1.0, scale, weights, "blockwise", [True, True, True])),
    ]
    for operator, arguments in seen:
        torch.library.opcheck(operator, arguments)
