"""Benchmark: forward and backward of the contrastive losses from embeddings, against the stock classes.

It runs what users run: the real class, its real forward, loss.backward(). The model is a stub that returns embeddings
which exist already, so that the loss alone is on the clock. Each case checks parity first and is not timed without it;
then times stock, torch.compile(stock) and ours in one process, and the matrix products that the case can't do without;
then reads the peak extra memory of stock and of ours, each in a process of its own.

    python -m sbert_kernels bench contrastive [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sbert_kernels import machine
from sbert_kernels.bench import harness
from sbert_kernels.bench.cases.contrastive import CASES, LARGE, PEERS, QUICK_BATCH, Case
from sbert_kernels.bench.peers import Embedded, compiled, gradients_of, largest_error
from sbert_kernels.bench.report import Chart, Report
from sbert_kernels.workloads.recipes import OURS, STOCK

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(case: Case) -> torch.dtype:
    """Returns the type of embeddings that a case names; raises ValueError if it leaves that to the command line."""
    if case.dtype is None:
        raise ValueError(f"dtype: got None, wanted one of {', '.join(DTYPES)}")
    return DTYPES[case.dtype]


def run(args: argparse.Namespace) -> None:
    """Runs the cases, prints the table, writes the report; exits non-zero after it if a case failed parity."""
    cases = harness.begin(args, CASES, LARGE)
    device = harness.device_of(args)
    dtype = DTYPES[args.dtype or ("bfloat16" if device == "cuda" else "float32")]
    report = Report(
        f"Contrastive losses: forward + backward{', quick run' if args.quick else ''}",
        "contrastive",
        machine.facts() | {"dtype": str(dtype).removeprefix("torch.")},
        machine.line(dtype),
        charts=(
            Chart("ms, median (times ours)", {"ours": "ours ms", "stock": "stock ms", "torch.compile": "compiled ms"}),
            Chart("MiB, peak extra memory (times ours)", {"ours": "ours MiB", "stock": "stock MiB"}),
        ),
    )
    print(report.machine_line)
    failed = []
    with tqdm(cases.items(), file=sys.stderr) as progress:
        for name, case in progress:
            if device == "cuda":
                case = replace(case, batch=case.cuda_batch)
            if args.quick:
                case = replace(case, batch=min(case.batch, QUICK_BATCH), uncompiled=case.uncompiled or "quick run")
            with machine.matmul_precision(case.precision):
                row = _run_case(
                    name,
                    case,
                    DTYPES[case.dtype] if case.dtype else dtype,
                    device,
                    args.repeats * case.rounds,
                    progress.set_description,
                )
            if case.timed and "ours ms" not in row:
                failed.append(name)
            report.rows.append(row)
    harness.finish(report, args.output, failed)


def _run_case(
    name: str, case: Case, dtype: torch.dtype, device: str, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "case": f"{name} N={case.batch} D={case.dim}",
        "dtype": str(dtype).removeprefix("torch."),
        "precision": f"autocast {case.autocast}" if case.autocast else case.precision,
    }
    notes = []
    if case.timed:
        say(f"{name}: parity")
        compared = replace(case, batch=min(case.batch, QUICK_BATCH)) if case.alone else case
        error, stock_error, limit = _parity(compared, dtype, device)
        row["parity"] = error
        if dtype != torch.float32 or case.autocast:
            row["stock's own error"] = stock_error
        if not error <= limit:
            return row | {"note": f"not timed: parity error {error:.2g}, wanted at most {limit:.2g}"}
        say(f"{name}: time")
        timings, why_not = _timings(case, dtype, device, repeats)
        notes += [why_not] if why_not else []
        for peer in PEERS:
            timing = timings.get(peer, machine.Timing())
            row[f"{peer} ms"] = timing.error or timing.median_s * 1e3
            row[f"{peer} samples ms"] = [seconds * 1e3 for seconds in timing.samples]
        ours = timings["ours"].median_s
        for peer in PEERS[:-1]:
            row[f"{peer}/ours"] = timings.get(peer, machine.Timing()).median_s / ours
        say(f"{name}: matrix products")
        products = _product_seconds(case, dtype, device, repeats)
        row |= {"products ms": products * 1e3, "ours/products": ours / products}
    for library in case.memory:
        peer = "ours" if library == OURS else "stock"
        say(f"{name}: memory of {peer}")
        result = machine.run_in_process(prepare, library, case, dtype, device)
        row[f"{peer} MiB"] = result.cell
        if not case.timed and not result.error:
            notes.append(f"{peer} took {result.seconds:.2f} s, loss {result.value:.6f}")
    row["gradients MiB"] = (2 + case.negatives) * case.batch * case.dim * dtype.itemsize / machine.MIB
    return row | {"note": "; ".join(notes)}


# -- what is run ------------------------------------------------------------------------------------------------------


def make_loss(library: str, case: Case) -> nn.Module:
    """Returns the loss of the case out of a library (the name of a module), on a model that returns its inputs."""
    losses = importlib.import_module(library)
    loss_class = getattr(losses, case.loss)
    if case.dims:
        model = Embedded("embedding", dim=case.dim)
        return losses.MatryoshkaLoss(model, loss_class(model, **case.options), case.dims)
    if not case.guided:
        return loss_class(Embedded("embedding"), **case.options)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    # GIST's constructor compares the tokenizers of model and guide; nothing is ever tokenized.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
    return loss_class(Embedded("embedding", tokenizer), Embedded("guide", tokenizer), **case.options)


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> list[dict[str, Tensor]]:
    """Returns columns (anchor, positive, *negatives) of embeddings (N, D), with positives as in the midst of training.

    Random columns of unit length have cosines of variance 1/D, hence logsumexp_j(scale * s_ij) is about
    log(M) + scale^2 / (2 D); the positives get the noise that puts their logits there, for a loss near log 2.
    The guide's positives are noisier, so that it excludes some negatives.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(case.batch, case.dim, device=device, generator=generator)

    def columns(cosine: float) -> list[Tensor]:
        anchor = draw()
        noise = math.sqrt(cosine**-2 - 1)
        return [x.to(dtype) for x in (anchor, anchor + noise * draw(), *(draw() for _ in range(case.negatives)))]

    candidates = case.terms * (1 + case.negatives) * case.batch
    cosine = min(0.9, math.log(candidates) / case.scale + case.scale / (2 * case.dim))
    inputs = [{"embedding": embedding} for embedding in columns(cosine)]
    if case.guided:
        for column, guide in zip(inputs, columns(3 / math.sqrt(case.dim)), strict=True):
            column["guide"] = guide
    return inputs


def make_step(
    loss: nn.Module, case: Case, inputs: list[dict[str, Tensor]]
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Returns a call that runs forward and backward and returns the loss, and the leaves whose `.grad` it fills."""
    device = inputs[0]["embedding"].device.type

    def surroundings() -> AbstractContextManager[Any]:
        return torch.autocast(device, DTYPES[case.autocast]) if case.autocast else nullcontext()

    if case.cached:  # the loss stage of the gradient cache: leaves of one mini-batch each, backward inside
        size = case.options["mini_batch_size"]
        calculate_loss: Callable[..., Tensor] = getattr(loss, "calculate_loss")  # noqa: B009 - not of nn.Module
        reps = [[x.clone().requires_grad_() for x in column["embedding"].split(size)] for column in inputs]
        leaves = [leaf for column in reps for leaf in column]

        def forward_backward() -> Tensor:
            with surroundings():
                return calculate_loss(reps, None, with_backward=True)
    else:
        features = [column | {"embedding": column["embedding"].clone().requires_grad_()} for column in inputs]
        leaves = [column["embedding"] for column in features]

        def forward_backward() -> Tensor:
            with surroundings():
                value = loss(features, None)
            value.backward()
            return value.detach()

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        return forward_backward()

    return step, leaves


def prepare(library: str, case: Case, dtype: torch.dtype, device: str) -> Callable[[], float]:
    """Imports, warms up on a tiny batch, makes the inputs; returns the call that `run_in_process` meters."""
    torch.set_float32_matmul_precision(case.precision)
    loss = make_loss(library, case)
    tiny = replace(case, batch=64)
    make_step(loss, tiny, make_inputs(tiny, dtype, device))[0]()
    step, _ = make_step(loss, case, make_inputs(case, dtype, device))
    return lambda: step().item()


# -- what is measured -------------------------------------------------------------------------------------------------


def _parity(case: Case, dtype: torch.dtype, device: str) -> tuple[float, float, float]:
    """Returns (error of ours, error of stock in this dtype, limit), against stock in float32 on the rounded inputs.

    The reference is outside of autocast.

    An error is the largest, over the loss and the gradient of each column, of |x - reference| / |reference| in the
    Euclidean norm: one wrong row in a batch of a million shows, one guide's exclusion on a knife's edge does not.
    """
    inputs = make_inputs(case, dtype, device)
    exact = [{key: value.float() for key, value in column.items()} for column in inputs]
    reference = _loss_and_gradients(STOCK, replace(case, autocast=None), exact)
    errors = {}
    for library in (STOCK, OURS):
        errors[library] = largest_error(_loss_and_gradients(library, case, inputs), reference)
    low_precision = dtype != torch.float32 or case.autocast or torch.get_float32_matmul_precision() == "medium"
    return errors[OURS], errors[STOCK], max(2e-2, errors[STOCK]) if low_precision else 1e-3


def _loss_and_gradients(library: str, case: Case, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    step, leaves = make_step(make_loss(library, case), case, inputs)
    value = step()
    gradients = torch.cat(gradients_of(leaves)).float().chunk(len(inputs))
    return [value.float(), *gradients]


def _timings(case: Case, dtype: torch.dtype, device: str, repeats: int) -> tuple[dict[str, machine.Timing], str | None]:
    """Returns the seconds of each of `PEERS` that there is; and why one is missing, if it is worth a note."""
    inputs = make_inputs(case, dtype, device)
    ours = make_step(make_loss(OURS, case), case, inputs)[0]
    if case.alone:
        return machine.measure({"ours": ours}, repeats=repeats), "stock cannot run it: parity of a small batch"
    contenders: dict[str, Callable[[], Tensor]] = {"stock": make_step(make_loss(STOCK, case), case, inputs)[0]}
    if dtype != torch.float32 or case.autocast:
        # Most who train in low precision have a loss in float32 to compare with.
        wide = [{key: value.float() for key, value in column.items()} for column in inputs]
        contenders["stock float32"] = make_step(make_loss(STOCK, case), replace(case, autocast=None), wide)[0]
    why_not = f"not compiled: {case.uncompiled}" if case.uncompiled else None
    if not case.uncompiled:
        step, why_not = compiled(make_loss(STOCK, case), lambda loss: make_step(loss, case, inputs)[0])
        contenders |= {"compiled": step} if step else {}
    return machine.measure(contenders | {"ours": ours}, repeats=repeats), why_not


def _product_seconds(case: Case, dtype: torch.dtype, device: str, repeats: int) -> float:
    """Returns the seconds of the matrix products of one step, as plain GEMMs: similarities, dR and dC for each term.

    A guide adds one product a term: its own similarities. Narrower prefixes of a MatryoshkaLoss add none.
    """
    dtype = DTYPES[case.autocast] if case.autocast else dtype
    rows, columns, dim = case.batch, case.batch * (1 + case.negatives), case.dim
    similarities = machine.gemm_seconds(rows, columns, dim, dtype, repeats, device)  # [N, D] @ [D, M]
    row_gradient = machine.gemm_seconds(rows, dim, columns, dtype, repeats, device)  # [N, M] @ [M, D]
    column_gradient = machine.gemm_seconds(columns, dim, rows, dtype, repeats, device)  # [M, N] @ [N, D]
    return case.terms * (similarities * (2 if case.guided else 1) + row_gradient + column_gradient)
