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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sbert_kernels.bench import harness
from sbert_kernels.bench.peers import OURS, STOCK, Embedded, compiled, largest_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUICK_BATCH = 256


@dataclass(frozen=True)
class Case:
    """One line of the report: a loss class (named alike in both libraries), its options and the size of its inputs."""

    loss: str
    batch: int
    cuda_batch: int
    dim: int = 384
    negatives: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 20.0  # what the options make of it; the inputs are drawn for it
    terms: int = 1
    dims: tuple[int, ...] = ()  # in a MatryoshkaLoss with these prefixes
    dtype: str | None = None  # of the embeddings, where it is not --dtype
    precision: str = "highest"  # of float32 products, as torch.set_float32_matmul_precision has it
    alone: bool = False  # stock cannot run it: parity is that of a small batch, and only ours is timed
    rounds: int = 1  # how many for each of --repeats: short calls need more samples
    uncompiled: str | None = None  # why torch.compile is no peer here
    timed: bool = True
    memory: tuple[str, ...] = (STOCK, OURS)

    @property
    def guided(self) -> bool:
        return "GIST" in self.loss

    @property
    def cached(self) -> bool:
        return self.loss.startswith("Cached")


MNR = "MultipleNegativesRankingLoss"
FOUR_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
UNTRACEABLE = "the loss stage runs a backward for each of its mini-batches, which torch.compile can't trace"
CASES = {
    "mnr": Case(MNR, 8192, 32768),
    "mnr-high": Case(MNR, 8192, 32768, precision="high"),
    "mnr-medium": Case(MNR, 8192, 32768, precision="medium"),
    "mnr-bfloat16": Case(MNR, 8192, 32768, dtype="bfloat16"),
    "negatives": Case(MNR, 2048, 8192, dim=768, negatives=3),
    "mnr-512": Case(MNR, 512, 4096, rounds=4),
    "mnr-64": Case(MNR, 64, 512, rounds=20),
    "directions": Case(MNR, 4096, 16384, options={"directions": FOUR_DIRECTIONS}, terms=4, precision="high"),
    "symmetric": Case(MNR, 4096, 16384, options=SYMMETRIC, terms=2),
    "gist": Case("GISTEmbedLoss", 512, 2048, scale=100.0, terms=3),
    "gist-large": Case("GISTEmbedLoss", 8192, 32768, scale=100.0, terms=3, alone=True, memory=(OURS,)),
    "matryoshka": Case(MNR, 8192, 32768, dim=512, dims=(512, 256, 128, 64, 32), precision="high"),
    "matryoshka-bfloat16": Case(MNR, 8192, 32768, dim=512, dims=(512, 256, 128, 64, 32), dtype="bfloat16"),
    "cached": Case(
        f"Cached{MNR}",
        8192,
        32768,
        dim=768,
        options={"mini_batch_size": 64},
        precision="high",
        uncompiled=UNTRACEABLE,
    ),
    "memory": Case(MNR, 16384, 65536, timed=False),
    "memory-large": Case(MNR, 65536, 262144, dim=768, timed=False, memory=(OURS,)),
}
LARGE = ("memory-large",)
PEERS = ("stock", "stock float32", "compiled", "ours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on CUDA")
    quick = f"batches of {QUICK_BATCH} at most, no compiled peer"
    takes = "three minutes on two cores"
    harness.add_arguments(parser, quick=quick, repeats=5, cases=CASES, large=LARGE, large_takes=takes)


def run(args: argparse.Namespace) -> None:
    """Runs the cases, prints the table, writes the report; exits non-zero after it if a case failed parity."""
    cases = harness.begin(args, CASES, LARGE)
    dtype = DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")]
    report = harness.Report(
        f"Contrastive losses: forward + backward{', quick run' if args.quick else ''}",
        "contrastive",
        harness.machine() | {"dtype": str(dtype).removeprefix("torch.")},
        harness.machine_line(dtype),
        charts=(
            harness.Chart(
                "ms, median (times ours)", {"ours": "ours ms", "stock": "stock ms", "torch.compile": "compiled ms"}
            ),
            harness.Chart("MiB, peak extra memory (times ours)", {"ours": "ours MiB", "stock": "stock MiB"}),
        ),
    )
    print(report.machine_line)
    failed = []
    with tqdm(cases.items(), file=sys.stderr) as progress:
        for name, case in progress:
            if args.device == "cuda":
                case = replace(case, batch=case.cuda_batch)
            if args.quick:
                case = replace(case, batch=min(case.batch, QUICK_BATCH), uncompiled=case.uncompiled or "quick run")
            with harness.matmul_precision(case.precision):
                row = _run_case(
                    name,
                    case,
                    DTYPES[case.dtype] if case.dtype else dtype,
                    args.device,
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
        "precision": case.precision,
    }
    notes = []
    if case.timed:
        say(f"{name}: parity")
        compared = replace(case, batch=min(case.batch, QUICK_BATCH)) if case.alone else case
        error, stock_error, limit = _parity(compared, dtype, device)
        row["parity"] = error
        if dtype != torch.float32:
            row["stock's own error"] = stock_error
        if not error <= limit:
            return row | {"note": f"not timed: parity error {error:.2g}, wanted at most {limit:.2g}"}
        say(f"{name}: time")
        timings, why_not = _timings(case, dtype, device, repeats)
        notes += [why_not] if why_not else []
        for peer in PEERS:
            timing = timings.get(peer, harness.Timing())
            row[f"{peer} ms"] = timing.error or timing.median_s * 1e3
            row[f"{peer} samples ms"] = [seconds * 1e3 for seconds in timing.samples]
        ours = timings["ours"].median_s
        for peer in PEERS[:-1]:
            row[f"{peer}/ours"] = timings.get(peer, harness.Timing()).median_s / ours
        say(f"{name}: matrix products")
        products = _product_seconds(case, dtype, device, repeats)
        row |= {"products ms": products * 1e3, "ours/products": ours / products}
    for library in case.memory:
        peer = "ours" if library == OURS else "stock"
        say(f"{name}: memory of {peer}")
        result = harness.run_in_process(prepare, library, case, dtype, device)
        row[f"{peer} MiB"] = result.cell
        if not case.timed and not result.error:
            notes.append(f"{peer} took {result.seconds:.2f} s, loss {result.value:.6f}")
    row["gradients MiB"] = (2 + case.negatives) * case.batch * case.dim * dtype.itemsize / harness.MIB
    return row | {"note": "; ".join(notes)}


# -- what is run ------------------------------------------------------------------------------------------------------


def make_loss(library: str, case: Case) -> nn.Module:
    """The loss of the case out of a library (the name of a module), on a model that returns its inputs."""
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
    """Columns (anchor, positive, *negatives) of embeddings [N, D], with positives as hard as in the middle of training.

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
    """A call that runs forward and backward and returns the detached loss, and the leaves whose `.grad` it fills."""
    if case.cached:  # the loss stage of the gradient cache: leaves of one mini-batch each, backward inside
        size = case.options["mini_batch_size"]
        reps = [[x.clone().requires_grad_() for x in column["embedding"].split(size)] for column in inputs]
        leaves = [leaf for column in reps for leaf in column]

        def forward_backward() -> Tensor:
            return loss.calculate_loss(reps, None, with_backward=True)
    else:
        features = [column | {"embedding": column["embedding"].clone().requires_grad_()} for column in inputs]
        leaves = [column["embedding"] for column in features]

        def forward_backward() -> Tensor:
            value = loss(features, None)
            value.backward()
            return value.detach()

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        return forward_backward()

    return step, leaves


def prepare(library: str, case: Case, dtype: torch.dtype, device: str) -> Callable[[], float]:
    """For `run_in_process`: imports, a warm-up on a tiny batch, the inputs; what it returns is metered."""
    torch.set_float32_matmul_precision(case.precision)
    loss = make_loss(library, case)
    tiny = replace(case, batch=64)
    make_step(loss, tiny, make_inputs(tiny, dtype, device))[0]()
    step, _ = make_step(loss, case, make_inputs(case, dtype, device))
    return lambda: step().item()


# -- what is measured -------------------------------------------------------------------------------------------------


def _parity(case: Case, dtype: torch.dtype, device: str) -> tuple[float, float, float]:
    """(error of ours, error of stock in this dtype, limit), against stock in float32 on the same rounded inputs.

    An error is the largest, over the loss and the gradient of each column, of |x - reference| / |reference| in the
    Euclidean norm: one wrong row in a batch of a million shows, one guide's exclusion on a knife's edge does not.
    """
    inputs = make_inputs(case, dtype, device)
    exact = [{key: value.float() for key, value in column.items()} for column in inputs]
    reference = _loss_and_gradients(STOCK, case, exact)
    errors = {}
    for library in (STOCK, OURS):
        errors[library] = largest_error(_loss_and_gradients(library, case, inputs), reference)
    low_precision = dtype != torch.float32 or torch.get_float32_matmul_precision() == "medium"
    return errors[OURS], errors[STOCK], max(2e-2, errors[STOCK]) if low_precision else 1e-3


def _loss_and_gradients(library: str, case: Case, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    step, leaves = make_step(make_loss(library, case), case, inputs)
    value = step()
    gradients = torch.cat([leaf.grad for leaf in leaves]).float().chunk(len(inputs))
    return [value.float(), *gradients]


def _timings(case: Case, dtype: torch.dtype, device: str, repeats: int) -> tuple[dict[str, harness.Timing], str | None]:
    """Seconds of each of `PEERS` that there is; and why one is missing, if it is worth a note."""
    inputs = make_inputs(case, dtype, device)
    ours = make_step(make_loss(OURS, case), case, inputs)[0]
    if case.alone:
        return harness.measure({"ours": ours}, repeats=repeats), "stock cannot run it: parity of a small batch"
    contenders = {"stock": make_step(make_loss(STOCK, case), case, inputs)[0]}
    if dtype != torch.float32:  # most who train in low precision have a loss in float32 to compare with
        wide = [{key: value.float() for key, value in column.items()} for column in inputs]
        contenders["stock float32"] = make_step(make_loss(STOCK, case), case, wide)[0]
    why_not = f"not compiled: {case.uncompiled}" if case.uncompiled else None
    if not case.uncompiled:
        step, why_not = compiled(make_loss(STOCK, case), lambda loss: make_step(loss, case, inputs)[0])
        contenders |= {"compiled": step} if step else {}
    return harness.measure(contenders | {"ours": ours}, repeats=repeats), why_not


def _product_seconds(case: Case, dtype: torch.dtype, device: str, repeats: int) -> float:
    """Seconds of the matrix products of one step, as plain GEMMs: similarities, dR and dC for each term.

    A guide adds one product a term: its own similarities. Narrower prefixes of a MatryoshkaLoss add none.
    """
    rows, columns, dim = case.batch, case.batch * (1 + case.negatives), case.dim
    similarities = harness.gemm_seconds(rows, columns, dim, dtype, repeats, device)  # [N, D] @ [D, M]
    row_gradient = harness.gemm_seconds(rows, dim, columns, dtype, repeats, device)  # [N, M] @ [M, D]
    column_gradient = harness.gemm_seconds(columns, dim, rows, dtype, repeats, device)  # [M, N] @ [N, D]
    return case.terms * (similarities * (2 if case.guided else 1) + row_gradient + column_gradient)
