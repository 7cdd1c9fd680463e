"""gather_across_devices of the ranking losses: two and three gloo processes equal one process on the union.

Their batches are uneven, and only scores and labels travel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor, nn

from sbert_kernels import losses, ranking_loss
from support.gradients import step
from support.numbers import assert_close

# Of each rank; stock's gradient cache, which embeds no batch without rows, gets some everywhere.
ROWS, CACHED_ROWS = (5, 0, 8), (5, 3, 8)
DIM = 6


def rows_of(world: int, name: str = "") -> tuple[int, ...]:
    return (CACHED_ROWS if name.startswith("cached") else ROWS)[-world:]


def union(world: int, name: str = "") -> tuple[list[Tensor], Tensor]:
    """Features and labels of all ranks' rows; few different labels."""
    generator = torch.Generator().manual_seed(0)
    rows = sum(rows_of(world, name))
    features = [torch.randn(rows, DIM, generator=generator, dtype=torch.float64) for _ in range(3)]
    return features, torch.randint(0, 4, (rows,), generator=generator).double() / 4


class Linear(nn.Sequential):
    """A model with a parameter; the same on every rank."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(DIM, DIM, dtype=torch.float64))
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self[0](features["embedding"])}


# name -> (loss, columns, whether there are labels)
CASES = {
    "cosent": (lambda module, **o: module.CoSENTLoss(Linear(), **o), 2, True),
    "angle": (lambda module, **o: module.AnglELoss(Linear(), scale=50.0, **o), 2, True),
    "triplets": (lambda module, **o: module.AnglELoss(Linear(), **o), 3, False),
    "triplets with labels": (lambda module, **o: module.AnglELoss(Linear(), **o), 3, True),
    "cached": (lambda module, **o: cached(module, "CoSENTLoss", **o), 2, True),
    "cached triplets": (lambda module, **o: cached(module, "AnglELoss", **o), 3, False),
}


def cached(module: Any, name: str, **options: Any) -> nn.Module:
    if module is stock:
        return getattr(stock, name)(Linear())
    return getattr(losses, f"Cached{name}")(Linear(), mini_batch_size=2, **options)


# What the last rank makes of its scores, labels and weights, all float64, before it gives them.
DISAGREEMENTS = {
    "labels": lambda scores, labels, weights: (scores, labels.long(), weights),
    "scores": lambda scores, labels, weights: (scores.half(), labels, weights),
    "weights": lambda scores, labels, weights: (scores, labels, weights.float()),
    "no weights": lambda scores, labels, weights: (scores, labels, None),
}


def run(loss: nn.Module, features: list[Tensor], labels: Tensor | None) -> list[Tensor]:
    """Returns the value of a loss, and the gradients of its parameters and of its model's."""
    return step(loss, [{"embedding": column} for column in features], labels)


def worker(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)

    def rows_of_rank(name: str = "") -> slice:
        rows = rows_of(world, name)
        return slice(sum(rows[:rank]), sum(rows[: rank + 1]))

    counted: list[int] = []
    original = dist.all_gather

    def counting(parts: list[Tensor], value: Tensor) -> Any:
        counted.append(value.numel())
        return original(parts, value)

    dist.all_gather = counting
    results: dict[str, Any] = {}
    for name, (make, columns, labelled) in CASES.items():
        features, labels = union(world, name)
        mine = rows_of_rank(name)
        counted.clear()
        results[name] = run(
            make(losses, gather_across_devices=True),
            [column[mine] for column in features[:columns]],
            labels[mine] if labelled else None,
        )
        results[f"{name} travelled"] = list(counted)
    (scores, other, _), labels = union(world)
    mine = rows_of_rank()
    leaves = [scores[mine, 0].clone(), other[mine, 0].exp(), torch.tensor(7.0, dtype=torch.float64)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    values, weights, scale = leaves
    value = ranking_loss(values, labels[mine], weights=weights, scale=scale, gather_across_devices=True)
    value.backward()
    results["operation"] = [value.detach(), *(leaf.grad for leaf in leaves)]
    large = (labels[mine] * 4).long() + 2**60
    results["integers"] = [ranking_loss(scores[mine, 0], large, gather_across_devices=True)]
    results["booleans"] = [ranking_loss(scores[mine, 0], labels[mine] > 0.4, gather_across_devices=True)]
    for name, gather in (("scale", True), ("scale alone", False), ("cached scale", True)):
        scale = nn.Parameter(torch.tensor(9.0, dtype=torch.float64))
        features, labels = union(world, name)
        cls = losses.CachedCoSENTLoss if name.startswith("cached") else losses.CoSENTLoss
        own = rows_of_rank(name)
        run(
            cls(Linear(), scale, gather_across_devices=gather),
            [column[own] for column in features[:2]],
            labels[own],
        )
        torch.optim.SGD([scale], lr=0.0).step()
        results[name] = [scale.grad]
    (scores, other, _), labels = union(world)
    for name, change in DISAGREEMENTS.items():
        columns = scores[mine, 0], labels[mine], other[mine, 0].exp()
        values, order, weights = change(*columns) if rank == world - 1 else columns
        try:
            ranking_loss(values, order, weights=weights, gather_across_devices=True)
        except ValueError as error:
            results[f"{name} disagree"] = str(error)
    try:
        whole = (4 * labels[mine]).to(torch.uint64 if rank == world - 1 else torch.int64)
        ranking_loss(scores[mine, 0], whole, gather_across_devices=True)
    except ValueError as error:
        results["unsigned"] = str(error)
    try:
        unordered = labels[mine].where(torch.tensor(rank < world - 1), torch.nan)
        ranking_loss(scores[mine, 0], unordered, gather_across_devices=True)
    except ValueError as error:
        results["not a number"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, run_ranks: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    return run_ranks(__file__, request.param)


@pytest.mark.parametrize("name", CASES)
def test_the_ranks_equal_the_union(ranks: list[dict[str, Any]], name: str) -> None:
    """The loss on each rank, and the mean of the gradients over the ranks, as data-parallel training takes it."""
    make, columns, labelled = CASES[name]
    features, labels = union(len(ranks), name)
    expected = run(make(stock), features[:columns], labels if labelled else None)
    for results in ranks:
        assert_close(results[name][:1], expected[:1])
    mean = [torch.stack(parts).mean(dim=0) for parts in zip(*(results[name] for results in ranks), strict=True)]
    assert_close(mean, expected, replayed=name.startswith("cached"))


@pytest.mark.parametrize("name", CASES)
def test_two_numbers_a_pair_travel(ranks: list[dict[str, Any]], name: str) -> None:
    """In two collectives, the first of which says how many; padded to the most pairs of a rank."""
    pairs = max(rows_of(len(ranks), name)) * (CASES[name][1] - 1)
    for results in ranks:
        assert results[f"{name} travelled"] == [5, 2 * pairs]


def test_the_operation_gathers_weights_and_keeps_the_scale_its_own(ranks: list[dict[str, Any]]) -> None:
    (scores, other, _), labels = union(len(ranks))
    leaves = [scores[:, 0].clone(), other[:, 0].exp(), torch.tensor(7.0, dtype=torch.float64)]
    values, weights, scale = (leaf.requires_grad_() for leaf in leaves)
    value = ranking_loss(values, labels, weights=weights, scale=scale)
    value.backward()
    for index, leaf in ((1, values), (2, weights)):
        assert_close([torch.cat([results["operation"][index] for results in ranks]) / len(ranks)], [leaf.grad])
    for results in ranks:
        assert_close([results["operation"][0], results["operation"][3]], [value.detach(), scale.grad])


def test_large_integers_stay_what_they_are(ranks: list[dict[str, Any]]) -> None:
    (scores, _, _), labels = union(len(ranks))
    for results in ranks:
        assert_close(results["integers"], [ranking_loss(scores[:, 0], labels)])


def test_booleans_are_labels(ranks: list[dict[str, Any]]) -> None:
    (scores, _, _), labels = union(len(ranks))
    for results in ranks:
        assert_close(results["booleans"], [ranking_loss(scores[:, 0], labels > 0.4)])


def scale_gradient(features: list[Tensor], labels: Tensor) -> Tensor:
    scale = nn.Parameter(torch.tensor(9.0, dtype=torch.float64))
    run(losses.CoSENTLoss(Linear(), scale), features[:2], labels)
    return scale.grad


@pytest.mark.parametrize("name", ["scale", "cached scale"])
def test_a_learnable_scale_has_the_gradient_of_the_union_on_every_rank(ranks: Any, name: str) -> None:
    expected = scale_gradient(*union(len(ranks), name))
    for results in ranks:
        assert_close(results[name], [expected])


def test_a_learnable_scale_is_averaged_without_gathering(ranks: Any) -> None:
    """Also where a rank has no pair: it takes part with a gradient of zero."""
    features, labels = union(len(ranks))
    parts = zip(*(column.split(rows_of(len(ranks))) for column in (*features, labels)), strict=True)
    expected = torch.stack([scale_gradient(list(columns), own) for *columns, own in parts]).mean()
    for results in ranks:
        assert_close(results["scale alone"], [expected])


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_every_rank_learns_who_disagrees(ranks: list[dict[str, Any]], name: str) -> None:
    """One that did not would wait for the others for ever."""
    for results in ranks:
        assert "needs the same types on every rank, got [" in results[f"{name} disagree"]
        assert results[f"{name} disagree"] == ranks[0][f"{name} disagree"]
    odd = {"labels": "labels: torch.int64", "scores": "scores: torch.float16", "weights": "weights: torch.float32"}
    assert odd.get(name, "weights: None") in results[f"{name} disagree"]


def test_every_rank_learns_what_is_wrong(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "labels must be numbers that can be ordered" in results["not a number"]
        assert "labels: torch.uint64" in results["unsigned"]


def test_without_a_process_group_it_changes_nothing() -> None:
    features, labels = union(2)
    assert_close(
        run(losses.CoSENTLoss(Linear(), gather_across_devices=True), features[:2], labels),
        run(losses.CoSENTLoss(Linear()), features[:2], labels),
    )


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
