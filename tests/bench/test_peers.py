"""What the benchmarks of losses compare gradients with."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import util

from sbert_kernels.bench import contrastive, ranking
from sbert_kernels.bench.peers import gradient_difference, without_to_dense
from sbert_kernels.workloads.recipes import STOCK


def test_a_gradient_of_roundings_is_compared_on_the_scale_of_the_whole():
    large, small = torch.tensor([1.0, 0.0]), torch.tensor([1e-9])
    assert gradient_difference([large, small], [large, -small]) < 1e-5
    assert gradient_difference([large, small], [large, small + 0.1]) > 1
    assert gradient_difference([large, 1e-2 * large], [large, 1.1e-2 * large]) == pytest.approx(0.1, rel=1e-5)


def test_the_cosines_that_are_compiled_are_those_of_stock():
    """Stock's own end in an operation that has no gradient when some versions of torch compile it."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 8, generator=generator) for _ in range(2))
    case = contrastive.Case("MultipleNegativesRankingLoss", 5, 5, dims=(8, 4), dim=8)
    matryoshka = without_to_dense(contrastive.make_loss(STOCK, case))
    pairs = without_to_dense(ranking.make_loss(STOCK, ranking.Case(("CoSENTLoss",), 5)))
    for found, stock in (
        (matryoshka.loss.similarity_fct, util.cos_sim),
        (pairs.similarity_fct, util.pairwise_cos_sim),
    ):
        assert found is not stock
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x, y = a.to(dtype), b.to(dtype)
            assert found(x, y).dtype == stock(x, y).dtype
            torch.testing.assert_close(found(x, y), stock(x, y))
    given = ranking.make_loss(STOCK, ranking.Case(("CoSENTLoss",), 5, dim=None))
    assert without_to_dense(given).similarity_fct is ranking.given_scores
