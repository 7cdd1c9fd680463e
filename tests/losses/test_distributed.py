"""gather_across_devices: two gloo processes equal one process on the union of their batches, by few collectives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor, nn

from sbert_kernels import losses
from support.contrastive import ALL_DIRECTIONS
from support.embedded import Embedded
from support.gradients import embedding_gradients
from support.numbers import assert_close

WORLD, ROWS, DIM = 2, 5, 6
STEPS = ("closure", "after an exception", "inside FSDP")


def union() -> list[dict[str, Tensor]]:
    """Columns of all ranks' rows; the texts repeat across ranks."""
    generator = torch.Generator().manual_seed(0)
    rows = WORLD * ROWS
    return [
        {
            "embedding": torch.randn(rows, DIM, generator=generator, dtype=torch.float64),
            "guide": torch.randn(rows, 4, generator=generator, dtype=torch.float64),
            "input_ids": torch.randint(0, 4, (rows, 1), generator=generator),
        }
        for _ in range(3)
    ]


def rows_of(columns: list[dict[str, Tensor]], rows: slice) -> list[dict[str, Tensor]]:
    """Returns these rows of every feature of every column."""
    return [{key: value[rows] for key, value in column.items()} for column in columns]


def gist(module: Any, gather: bool) -> nn.Module:
    loss = module.GISTEmbedLoss.__new__(module.GISTEmbedLoss)
    nn.Module.__init__(loss)
    loss.model, loss.guide = Embedded(dimension=DIM), Embedded("guide", dimension=DIM)
    loss.temperature, loss.margin, loss.margin_strategy = 0.1, 0.1, "absolute"
    loss.contrast_anchors, loss.contrast_positives, loss.must_retokenize = False, True, False
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    loss.gather_across_devices = gather
    return loss


def plain(module: Any, gather: bool, **options: Any) -> nn.Module:
    return module.MultipleNegativesRankingLoss(
        Embedded(dimension=DIM), gather_across_devices=gather, directions=ALL_DIRECTIONS, **options
    )


def matryoshka(module: Any, inner: nn.Module) -> nn.Module:
    return module.MatryoshkaLoss(inner.model, inner, [2, 6, 3], [1.0, 0.5, 2.0])


class Total(nn.Module):
    """The sum of the terms of a loss, as the Trainer takes it; or something else that is made of its value."""

    def __init__(self, loss: nn.Module, made: Callable[[Any], Tensor] = lambda terms: sum(terms.values())) -> None:
        super().__init__()
        self.loss, self.made = loss, made

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        return self.made(self.loss(features, labels))


def objective(gather: bool) -> nn.Module:
    """AnglE's three terms, on triplets."""
    return Total(losses.AnglEObjective(Embedded(dimension=DIM), gather_across_devices=gather))


def cached(gather: bool, columns: list[dict[str, Tensor]], mini_batch_size: int) -> list[Tensor]:
    loss = losses.CachedMultipleNegativesRankingLoss(
        Embedded(dimension=DIM),
        gather_across_devices=gather,
        directions=ALL_DIRECTIONS,
        mini_batch_size=mini_batch_size,
    )
    reps = [[x.clone().requires_grad_() for x in column["embedding"].split(mini_batch_size)] for column in columns]
    value = loss.calculate_loss(reps, with_backward=True)
    return [value, *(torch.cat([part.grad for part in column]) for column in reps)]


def several_losses(rank: int, mine: list[dict[str, Tensor]]) -> list[Tensor | None]:
    """Gradients of the scales of three losses after a step in which each rank ran one of its own, and none the last."""
    scales = [nn.Parameter(torch.tensor([9.0], dtype=torch.float64)) for _ in range(3)]
    of_data_sets = [plain(losses, False, scale=scale) for scale in scales]
    embedding_gradients(of_data_sets[rank], mine)
    torch.optim.SGD([scales[2], scales[0], scales[1]], lr=0.0).step()
    return [scale.grad for scale in scales]


def sharded_optimizer(mine: list[dict[str, Tensor]]) -> list[Tensor]:
    """Gradients of two scales after the step of an optimizer that has each rank step a share of them."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    scales = [nn.Parameter(torch.tensor([9.0], dtype=torch.float64)) for _ in range(2)]
    for loss in [plain(losses, False, scale=scale) for scale in scales]:
        embedding_gradients(loss, mine)
    ZeroRedundancyOptimizer(scales, torch.optim.SGD, lr=0.0).step()
    return [scale.grad for scale in scales]


def after_a_step(rank: int, mine: list[dict[str, Tensor]], case: str) -> Tensor:
    """A scale after a step of SGD that is taken in another way than by backward() and step()."""
    scale = nn.Parameter(torch.tensor([9.0], dtype=torch.float64))
    loss = plain(losses, False, scale=scale)
    optimizer = torch.optim.SGD([scale], lr=1.0)
    if case == "closure":  # as Lightning does

        def closure() -> Tensor:
            optimizer.zero_grad()
            embedding_gradients(loss, mine)
            return torch.zeros(())

        optimizer.step(closure)
    elif case == "after an exception":  # a step that ran out of memory, and the next try
        broken = torch.optim.SGD([scale], lr=1.0)
        embedding_gradients(loss, mine)
        broken.param_groups[0]["lr"] = "none"
        with pytest.raises(TypeError):
            broken.step()
        scale.grad = None
        embedding_gradients(loss, mine)
        optimizer.step()
    else:  # FSDP has the loss inside, and averages itself
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapper = Total(loss, lambda value: value)
        fully_shard(wrapper, mesh=init_device_mesh("cpu", (WORLD,)))
        columns = [{**column, "embedding": column["embedding"].clone().requires_grad_()} for column in mine]
        wrapper(columns, None).backward()
        torch.optim.SGD(wrapper.parameters(), lr=1.0).step()
        return loss.scale.full_tensor().detach()
    return scale.detach()


def refusals(rank: int, mine: list[dict[str, Tensor]]) -> list[str]:
    """What each rank hears where the ranks run different losses, or batches of different shapes."""
    scores = mine[0]["embedding"][:, 0]
    heard = []
    for attempt in (
        lambda: (
            embedding_gradients(plain(losses, True), mine)
            if rank
            else losses.CoSENTLoss(Embedded(dimension=DIM), gather_across_devices=True).rank_scores(scores, scores)
        ),
        lambda: embedding_gradients(plain(losses, True) if rank else gist(losses, True), mine),
        lambda: embedding_gradients(plain(losses, True), mine[: 2 + rank]),
        lambda: embedding_gradients(plain(losses, True), rows_of(mine, slice(4 + rank))),
    ):
        try:
            attempt()
        except ValueError as error:
            heard.append(str(error))
    return heard


def worker(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    mine = rows_of(union(), slice(rank * ROWS, (rank + 1) * ROWS))
    counted: list[int] = []
    original = torch.distributed.nn.all_gather
    torch.distributed.nn.all_gather = lambda *a, **k: counted.append(1) or original(*a, **k)
    results = {
        "plain": embedding_gradients(plain(losses, True), mine),
        "plain stock": embedding_gradients(plain(stock, True), mine),
        "mask": embedding_gradients(plain(losses, True, duplicates="mask"), mine),
        "gist": embedding_gradients(gist(losses, True), mine),
        "gist stock": embedding_gradients(gist(stock, True), mine),
        "matryoshka": embedding_gradients(matryoshka(losses, plain(losses, True)), mine),
        "matryoshka gist": embedding_gradients(matryoshka(losses, gist(losses, True)), mine),
        "matryoshka gist stock": embedding_gradients(matryoshka(stock, gist(stock, True)), mine),
        "objective": embedding_gradients(objective(True), mine),
        "matryoshka stock": embedding_gradients(matryoshka(stock, plain(stock, True)), mine),
    }
    for name, gather in (("scale gathered", True), ("scale alone", False)):
        loss = plain(losses, gather, scale=nn.Parameter(torch.tensor(9.0, dtype=torch.float64)))
        embedding_gradients(loss, mine)
        results[f"{name}, own"] = [loss.scale.grad.clone()]
        torch.optim.SGD([loss.scale], lr=0.0).step()
        results[name] = [loss.scale.grad]
    scale = nn.Parameter(torch.tensor(9.0, dtype=torch.float64))
    loss = losses.CachedMultipleNegativesRankingLoss(Embedded(dimension=DIM), scale, gather_across_devices=True)
    value = loss.calculate_loss([[column["embedding"].clone().requires_grad_()] for column in mine], with_backward=True)
    value.backward()
    torch.optim.SGD([scale], lr=0.0).step()
    results["scale cached"] = [scale.grad]
    results["several losses"] = several_losses(rank, mine)
    results["sharded optimizer"] = sharded_optimizer(mine)
    for case in STEPS:
        results[case] = [after_a_step(rank, mine, case)]
    results["refused"] = refusals(rank, mine)
    collectives = {}
    for size in (1, 5):
        counted.clear()
        results[f"cached {size}"] = cached(True, mine, size)
        collectives[size] = len(counted)
    torch.save((results, collectives), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(run_ranks: Callable[..., list[Any]]) -> list[tuple[dict[str, list[Tensor]], dict[int, int]]]:
    return run_ranks(__file__, WORLD)


def union_of(ranks: Any, name: str) -> list[Tensor]:
    """Mean loss and, as data-parallel training averages them, gradients over the ranks."""
    values, *gradients = zip(*(results[name] for results, _ in ranks), strict=True)
    return [torch.stack(values).mean(), *(torch.cat(column) / WORLD for column in gradients)]


@pytest.mark.parametrize("name", ["plain", "cached 1", "cached 5", "mask", "gist", "matryoshka", "objective"])
def test_two_ranks_equal_the_union(ranks: Any, name: str) -> None:
    losses_of = {
        "mask": lambda: plain(losses, False, duplicates="mask"),
        "gist": lambda: gist(stock, False),
        "objective": lambda: objective(False),
        "matryoshka": lambda: matryoshka(stock, plain(stock, False)),
    }
    loss = losses_of.get(name, lambda: plain(stock, False))()
    assert_close(union_of(ranks, name), embedding_gradients(loss, union()))


@pytest.mark.parametrize("name", ["plain", "gist", "matryoshka", "matryoshka gist"])
def test_each_rank_equals_stock_on_that_rank(ranks: Any, name: str) -> None:
    for results, _ in ranks:
        assert_close(results[name], results[f"{name} stock"])


@pytest.mark.parametrize("name", ["scale gathered", "scale alone", "scale cached"])
def test_a_learnable_scale_gets_the_same_gradient_on_every_rank(ranks: Any, name: str) -> None:
    """The loss is not in the data-parallel wrapper, which averages the gradients of the model alone: the optimizer's
    step does it, and no backward pass, in which other ranks may be with another loss."""
    first, second = (results[name][0] for results, _ in ranks)
    assert torch.equal(first, second)
    assert first != 0
    if name != "scale cached":
        own = [results[f"{name}, own"][0] for results, _ in ranks]
        assert not torch.equal(*own)
        torch.testing.assert_close(first, sum(own) / WORLD)
    if name == "scale gathered":
        loss = plain(losses, False, scale=nn.Parameter(torch.tensor(9.0, dtype=torch.float64)))
        embedding_gradients(loss, union())
        torch.testing.assert_close(first, loss.scale.grad)


def test_losses_that_ranks_ran_by_turns_are_averaged_with_zeros(ranks: Any) -> None:
    """A loss that a rank did not run counts as 0 there; one that none ran is left alone by the optimizer."""
    expected = []
    for rank in range(WORLD):
        loss = plain(losses, False, scale=nn.Parameter(torch.tensor([9.0], dtype=torch.float64)))
        embedding_gradients(loss, rows_of(union(), slice(rank * ROWS, (rank + 1) * ROWS)))
        expected.append(loss.scale.grad / WORLD)
    for results, _ in ranks:
        torch.testing.assert_close(results["several losses"], [*expected, None])


def test_an_optimizer_that_is_sharded_over_ranks_averages_once(ranks: Any) -> None:
    """Its inner step runs for the values of one rank alone, where nobody else would take part."""
    first, second = (results["sharded optimizer"] for results, _ in ranks)
    mean = ranks[0][0]["scale alone"][0].reshape(1)
    torch.testing.assert_close([first, second], [[mean, mean], [mean, mean]])


@pytest.mark.parametrize("case", STEPS)
def test_a_step_of_any_kind_takes_the_mean_over_the_ranks(ranks: Any, case: str) -> None:
    mean = ranks[0][0]["scale alone"][0].reshape(1)
    for results, _ in ranks:
        torch.testing.assert_close(results[case][0], 9.0 - mean, rtol=1e-6, atol=0.0)


def test_every_rank_learns_that_the_ranks_run_different_losses(ranks: Any) -> None:
    """One that did not would wait for the others for ever, or read their numbers as what they are not."""
    told = [results["refused"] for results, _ in ranks]
    assert told[0] == told[1]
    assert "for ['a ranking loss', 'an in-batch loss']" in told[0][0]
    assert "for ['a GIST loss', 'an in-batch loss']" in told[0][1]
    assert "got ['2 columns of [5, 6] torch.float64', '3 columns of [5, 6] torch.float64']" in told[0][2]
    assert "got ['3 columns of [4, 6] torch.float64', '3 columns of [5, 6] torch.float64']" in told[0][3]


def test_collectives_do_not_grow_with_the_number_of_mini_batches(ranks: Any) -> None:
    for _, collectives in ranks:
        assert collectives[1] == collectives[5] == 3


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
