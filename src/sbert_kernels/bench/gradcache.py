"""Benchmark: a training step of a transformer through the gradient cache, sentence-transformers' engine beside ours.

A step is forward and backward of in-batch negatives over (summary, body) docstring pairs, from features that are
tokenized already and gradients that are None, of MiniLM in training mode with its dropout. Case "text" has rows of
every length; in "equal" all rows have one, so that packing by length has nothing to save; "few" has so few that they
fit into memory without a cache; "trainer" is a whole run of the SentenceTransformerTrainer, without dropout, so that
both loss curves are comparable.

Each case checks parity first, on the loss and the gradients of the model's parameters without dropout, and is not timed
without it. A step takes minutes on a laptop: each runs in a process of its own, after a warm-up on a few pairs, which
gives its time and its peak extra memory at once. The processes take turns in the order A B A B; all of them together
take about half an hour on two cores.

"First pass" and "second pass" are the tokens that the model is given, padding included; those whose graphs were kept
are missing from the second. "Floor" is the time of the real tokens' matrix products alone, at the rate of a plain GEMM:
one forward, two forwards' worth of backward, and the share of another that the second pass repeats. On the CPU only.

    python -m sbert_kernels bench gradcache [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sbert_kernels import machine
from sbert_kernels.bench import harness
from sbert_kernels.bench.cases.gradcache import CASES, QUICK, QUICK_STEPS, Case
from sbert_kernels.bench.peers import (
    PARITY_LIMIT,
    features_of,
    gradient_difference,
    loss_and_gradients,
    make_step,
)
from sbert_kernels.bench.report import Report, StackedChart
from sbert_kernels.bench.training import mixed_rows, read_pairs
from sbert_kernels.workloads import requirements
from sbert_kernels.workloads.recipes import LEARNING_RATES, OURS, STOCK
from sbert_kernels.workloads.requirements import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from sbert_kernels.workloads.texts import Pair

CACHED, UNCACHED = "CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"
WARMUP_PAIRS = 4
GEMM_ROWS = 4096
GIB = 2**30
# Rows of nearly equal length hold nearly the same: one of each multiple of this many tokens is measured.
LENGTH_STEP = 32


@dataclass(frozen=True)
class Contender:
    """Names a loss of a library (the name of a module), and its options."""

    library: str
    options: Mapping[str, int] = field(default_factory=dict)
    loss: str = CACHED


@dataclass
class Tokens:
    """Counts what a model was given. `squares` is the sum of the rows' lengths squared, which attention works in."""

    first: int = 0  # in the loss's forward, padding included
    second: int = 0  # in its backward
    real: int = 0  # without padding, in the first pass
    squares: int = 0


@dataclass(frozen=True)
class Outcome:
    """Holds what a process brings back besides time and memory: the loss of each step, the tokens of all."""

    losses: list[float]
    tokens: Tokens


def run(args: argparse.Namespace) -> None:
    """Runs the cases, prints the table, writes the report; exits non-zero after it if a case failed parity."""
    if args.steps is not None and args.steps < 1:
        raise SystemExit(f"argument --steps: got {args.steps}, wanted at least 1")
    cases = {name: _sized(case, args) for name, case in harness.begin(args, CASES).items()}
    try:
        requirements.require_packages()
        pairs = read_pairs(args.quick)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error

    from sbert_kernels.workloads.training import quiet_libraries

    quiet_libraries()
    data = f"{len(pairs.pairs):,} pairs from {pairs.source}"
    rate = gemm_rate(build_model(CASES["text"]))
    report = Report(
        f"Gradient cache, MiniLM: forward + backward{', quick run' if args.quick else ''}",
        "gradcache",
        machine.facts() | {"dtype": "float32", "data": data, "GEMM GFLOP/s": rate / 1e9},
        f"{machine.line(torch.float32)}\n{data}; a GEMM runs at {rate / 1e9:,.0f} GFLOP/s",
        charts=(
            StackedChart(
                "seconds, median: the floor, and what is above it",
                {"floor": "floor s", "above": "above floor s"},
                ("case", "contender"),
            ),
            StackedChart("MiB, peak extra memory", {"peak": "peak extra MiB"}, ("case", "contender")),
        ),
    )
    print(report.machine_line)
    failed = []
    with tqdm(cases.items(), file=sys.stderr) as progress:
        for name, case in progress:
            found = _run_case(name, case, pairs.pairs, args, rate, progress.set_description)
            if not all("s" in row for row in found):
                failed.append(name)
            report.rows += found
    harness.finish(report, args.output, failed)


def _sized(case: Case, args: argparse.Namespace) -> Case:
    if args.quick:
        case = replace(case, pairs=QUICK["pairs"], length=QUICK["length"], mini_batch=QUICK["mini_batch"])
        case = replace(case, steps=case.steps and QUICK_STEPS)
    return replace(case, steps=case.steps and (args.steps or case.steps))


def _run_case(
    name: str, case: Case, pairs: Sequence[Pair], args: argparse.Namespace, rate: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    title = f"{name} N={case.pairs} L={case.length}{f', {case.steps} steps' if case.steps else ''}"
    rows: dict[str, dict[str, Any]] = {peer: {"case": title, "contender": peer} for peer in case.peers}
    model = build_model(case)
    # The Trainer loads a batch ahead, in the last step as in any other.
    texts = select_rows(model, case, pairs, case.pairs * (case.steps + 1 if case.steps else 1))

    say(f"{name}: parity")
    errors = _parity(model, case, texts[: case.tried_pairs])
    for peer, (loss, gradient) in errors.items():
        rows[peer] |= {"loss difference": loss, "gradient difference": gradient}
    if not all(error <= PARITY_LIMIT for pair in errors.values() for error in pair):  # nan is no parity either
        note = f"not timed: the contenders differ by more than {PARITY_LIMIT:.2g}"
        return [row | {"note": note} for row in rows.values()]

    meter = _in_this_process if args.quick else machine.run_in_process
    contenders, notes = _contenders(model, case, texts[: case.pairs]), dict.fromkeys(case.peers, "")
    if "stock by tokens" in case.peers:
        say(f"{name}: stock's budgets of tokens")
        contenders["stock by tokens"], notes["stock by tokens"] = _best_by_tokens(case, texts, args.output, meter)
    results: dict[str, list[machine.ProcessResult]] = {peer: [] for peer in case.peers}
    if "stock uncached" in case.peers:
        needed = _uncached_bytes(model, texts[: case.pairs])
        if needed > (_ram_bytes() or math.inf):  # the system would end more than this process
            results["stock uncached"].append(machine.ProcessResult(error=machine.OUT_OF_MEMORY))
            notes["stock uncached"] = f"not tried: its activations alone take {needed / GIB:,.0f} GiB"
    for i in range(args.repeats):
        for peer, contender in contenders.items():
            if not any(result.error for result in results[peer]):
                say(f"{name}: {peer}, {i + 1} of {args.repeats}")
                results[peer].append(meter(prepare, contender, case, texts, args.output))
    stock = results["stock"]
    for peer, row in rows.items():
        row |= {"options": ", ".join(f"{key}={value:,}" for key, value in contenders[peer].options.items())}
        row |= _measured(results[peer], stock, bool(case.steps), lambda tokens: flops(model, tokens) / rate)
        row["note"] = notes[peer]
    return list(rows.values())


def _measured(
    results: Sequence[machine.ProcessResult],
    stock: Sequence[machine.ProcessResult],
    curves: bool,
    floor_of: Callable[[Tokens], float],
) -> dict[str, Any]:
    """Returns the numbers of a row, from the processes of a contender and those of stock."""
    error = next((result.error for result in results if result.error), None)
    if error:
        return {"s": error, "peak extra MiB": error}
    timing, stock_timing = (machine.Timing(tuple(r.seconds for r in rs if not r.error)) for rs in (results, stock))
    seconds, tokens = timing.median_s, results[0].value.tokens
    floor = floor_of(tokens)
    row = {
        "s": seconds,
        "stock/this": stock_timing.median_s / seconds,
        "floor s": floor,
        "above floor s": seconds - floor,
        "this/floor": seconds / floor,
        "real tokens": tokens.real,
        "first pass": tokens.first,
        "second pass": tokens.second,
        "real tokens/s": tokens.real / seconds,
        "samples s": list(timing.samples),
        "losses": results[0].value.losses,
        "peak extra MiB": max((r.cell for r in results if r.cell is not None), default=None),
    }
    if curves and results is not stock and not stock[0].error:
        from sbert_kernels.workloads.steps import Recording, difference

        row["loss curves differ"] = difference(*(Recording(rs[0].value.losses, []) for rs in (stock, results)))
    return row


# -- what is run ------------------------------------------------------------------------------------------------------


def build_model(case: Case) -> SentenceTransformer:
    """Returns the model in training mode; without dropout where the Trainer's loss curves are compared."""
    from sbert_kernels.workloads import models

    model = models.minilm_model()
    model.max_seq_length = case.length
    return (models.without_dropout(model) if case.steps else model).train()


def select_rows(model: SentenceTransformer, case: Case, pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Returns so many rows in a mixed order, repeated where there are too few."""
    if case.equal:
        lengths = [column["attention_mask"].sum(dim=1) for column in features_of(model, pairs)]
        full = torch.stack(lengths).eq(case.length).all(dim=0).tolist()
        pairs = [pair for pair, fills in zip(pairs, full, strict=True) if fills]
        if not pairs:
            raise SystemExit(f"error: no pair has {case.length} tokens on both sides, wanted some for case equal")
    return mixed_rows(pairs, count)


def _contenders(model: SentenceTransformer, case: Case, pairs: Sequence[Pair]) -> dict[str, Contender]:
    """Returns the peers of the case on a batch of these pairs; one may keep half of the batch's activations."""
    rows = {"mini_batch_size": case.mini_batch}
    by_tokens = {"mini_batch_num_tokens": case.tokens[1]}
    found = {
        "stock": Contender(STOCK, rows),
        "stock by tokens": Contender(STOCK, by_tokens),
        "stock uncached": Contender(STOCK, loss=UNCACHED),
        "ours": Contender(OURS, rows),
        "ours by tokens": Contender(OURS, by_tokens),
    }
    if "ours, half kept" in case.peers:
        lengths = torch.cat([column["attention_mask"].sum(dim=1) for column in features_of(model, pairs)])
        budget = activation_bytes(model, lengths.tolist()) // 2
        found["ours, half kept"] = Contender(OURS, rows | {"activation_budget": budget})
    return {peer: found[peer] for peer in case.peers}


def make_loss(contender: Contender, model: SentenceTransformer) -> nn.Module:
    """Returns the loss of a contender on a model."""
    return getattr(importlib.import_module(contender.library), contender.loss)(model, **contender.options)


def prepare(contender: Contender, case: Case, pairs: Sequence[Pair], output: Path) -> Callable[[], Outcome]:
    """Imports, builds the model, warms up on a few pairs; returns the call that `run_in_process` meters."""
    from sbert_kernels.workloads import training

    training.quiet_libraries()
    model = build_model(case)
    loss = make_loss(contender, model)
    make_step(model, [loss], features_of(model, pairs[:WARMUP_PAIRS]))()
    model.zero_grad(set_to_none=True)  # the gradients count
    tokens = count_tokens(model, loss)
    if case.steps:
        settings = training.Settings(case.pairs, case.steps, LEARNING_RATES["minilm"], 0, output)
        train = training.prepare(model, loss, pairs, settings)
        return lambda: Outcome(train().losses, tokens)
    step = make_step(model, [loss], features_of(model, pairs[: case.pairs]))
    return lambda: Outcome([step().item()], tokens)


def _in_this_process(target: Callable[..., Callable[[], Any]], *args: Any) -> machine.ProcessResult:
    """Does as `run_in_process`, but in this process, where the peak of memory cannot be metered."""
    call = target(*args)
    values: list[Any] = []
    timing = machine.measure({"call": lambda: values.append(call())}, repeats=1, warmup=0)["call"]
    return machine.ProcessResult(values[0] if values else None, error=timing.error, seconds=timing.median_s)


# -- what is measured -------------------------------------------------------------------------------------------------


def _parity(model: SentenceTransformer, case: Case, pairs: Sequence[Pair]) -> dict[str, tuple[float, float]]:
    """Returns the relative differences of loss and gradients of each of ours from stock's, without dropout."""
    features = features_of(model, pairs)
    contenders = _contenders(model, case, pairs)
    model.eval()
    found = {}
    for peer, contender in contenders.items():
        if peer == "stock" or contender.library == OURS:
            found[peer] = loss_and_gradients(model, make_step(model, [make_loss(contender, model)], features))
    model.zero_grad(set_to_none=True)
    model.train()
    stock_loss, stock_gradients = found.pop("stock")
    return {
        peer: ((abs(loss - stock_loss) / abs(stock_loss)).item(), gradient_difference(stock_gradients, gradients))
        for peer, (loss, gradients) in found.items()
    }


def _best_by_tokens(
    case: Case, pairs: Sequence[Pair], output: Path, meter: Callable[..., machine.ProcessResult]
) -> tuple[Contender, str]:
    """Returns stock with the budget that is the fastest on a part of the batch, and a note on the other budgets."""
    few = replace(case, pairs=2 * case.mini_batch)
    tried = {}
    for tokens in case.tokens:
        contender = Contender(STOCK, {"mini_batch_num_tokens": tokens})
        tried[tokens] = meter(prepare, contender, few, pairs, output).seconds
    best = min(tried, key=lambda tokens: (math.isnan(tried[tokens]), tried[tokens]))
    seconds = ", ".join(f"{tokens:,}: {seconds:.2g} s" for tokens, seconds in tried.items())
    return Contender(STOCK, {"mini_batch_num_tokens": best}), f"the best on {few.pairs} pairs ({seconds})"


def count_tokens(model: SentenceTransformer, loss: nn.Module) -> Tokens:
    """Counts what the model is given from here on, by hooks on it and on the loss."""
    tokens = Tokens()
    inside: list[bool] = []  # holds something while the loss's forward runs

    def encoded(module: nn.Module, inputs: tuple[dict[str, Tensor], ...]) -> None:
        mask = inputs[0]["attention_mask"]
        if not inside:  # the loss's forward is over
            tokens.second += mask.numel()
            return
        lengths = mask.sum(dim=1)
        tokens.first += mask.numel()
        tokens.real += int(lengths.sum())
        tokens.squares += int(lengths.square().sum())

    model.register_forward_pre_hook(encoded)
    loss.register_forward_pre_hook(lambda *_: inside.append(True))
    loss.register_forward_hook(lambda *_: inside.clear())
    return tokens


def activation_bytes(model: SentenceTransformer, lengths: Iterable[int]) -> int:
    """Returns the bytes that autograd holds of an encoding of unpadded rows of these lengths, each rounded up."""
    longest = model.max_seq_length
    assert longest is not None  # build_model sets it
    rounded = Counter(min(longest, math.ceil(length / LENGTH_STEP) * LENGTH_STEP) for length in lengths)
    return sum(count * _row_bytes(model, length) for length, count in rounded.items())


def _row_bytes(model: SentenceTransformer, length: int) -> int:
    features = model.preprocess(["a " * (length - 2)])  # and the two special tokens
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}  # bytes by address: many saved tensors are views of one storage

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = model(features)["sentence_embedding"]  # while it lives, no address is used twice
    assert graph.requires_grad
    return sum(held.values())


def _uncached_bytes(model: SentenceTransformer, pairs: Sequence[Pair]) -> int:
    """Returns the bytes of activations of a step without a cache, which pads each column to its longest row."""
    widths = [column["input_ids"].shape for column in features_of(model, pairs)]
    return activation_bytes(model, [width for rows, width in widths for _ in range(rows)])


def _ram_bytes() -> float | None:
    gib = machine.facts()["ram_gib"]
    return gib and gib * GIB


def transformer_of(model: SentenceTransformer) -> Any:
    """Returns the transformer of transformers inside a model."""
    return model[0].model


def flops(model: SentenceTransformer, tokens: Tokens) -> float:
    """Returns the FLOP of the matrix products that a step on these tokens cannot do without, padding aside."""
    transformer = transformer_of(model)
    weights = sum(weight.numel() for weight in transformer.encoder.parameters() if weight.ndim == 2)
    attention = transformer.config.num_hidden_layers * transformer.config.hidden_size
    forward = 2 * weights * tokens.real + 4 * attention * tokens.squares
    return forward * (3 + tokens.second / tokens.first)


def gemm_rate(model: SentenceTransformer) -> float:
    """Returns the FLOP a second of the model's widest layer, as a plain product of matrices."""
    config = transformer_of(model).config
    shape = (GEMM_ROWS, config.intermediate_size, config.hidden_size)
    return 2 * math.prod(shape) / machine.gemm_seconds(*shape, torch.float32)
