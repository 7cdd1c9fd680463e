"""The jobs of `bench gpu` in the order in which they run: what says most in the least time comes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sbert_kernels import settings
from sbert_kernels.bench.cases import contrastive, ranking
from sbert_kernels.bench.cases.contrastive import FOUR_DIRECTIONS, MNR, SYMMETRIC

PARITY_ROWS = 1000  # no multiple of any tile
SMALL_ROWS = 512  # divides by 16, as the large sizes do; kernels are compiled for that
MATRYOSHKA = (768, 512, 256, 128, 64)
NOT_RUN = "not run"  # begins the cell of a contender that there was no time for
OURS_COLUMN = {"parity": "ours error"}  # of a row; else it is "ours ms"
# Seconds that have to be left for a job to begin, where nothing alike has been timed yet.
LEAST_SECONDS = {
    "parity": 2.0,
    "backends": 5.0,
    "host": 2.0,
    "contrastive": 5.0,
    "weights": 4.0,
    "losses": 4.0,
    "training": 15.0,
    "sigmoid": 5.0,
}


@dataclass(frozen=True)
class Training:
    """Describes whole steps of a transformer with random weights: its size, and the gradient cache's mini-batch."""

    name: str
    hidden: int
    layers: int
    heads: int
    mini_batch: int
    pairs: int = 1024
    max_tokens: int = 256  # of a text


BERT_BASE = Training("BERT-base", 768, 12, 12, 64)
MINILM = Training("MiniLM", 384, 6, 12, 64)
Case = contrastive.Case | ranking.Case | Training


@dataclass(frozen=True)
class Job:
    """Describes one row of a report.

    Attributes:
        kind: One of KINDS.
        case: What is computed.
        peers: Other libraries are timed, too.
        compiled: Stock under torch.compile is timed, too: compiling it takes as long as many other rows.
        mask: Every two rows have the same document, which is no negative.
        autocast: The embeddings are float32 and the loss runs under autocast to bfloat16.
        way: How the weights are made; None: as the library chooses.
        backend: Whose kernels compute ours; None: those of the first backend that serves it.
        peer: The row is about this library alone.
    """

    kind: str
    case: Case
    peers: bool = False
    compiled: bool = False
    mask: bool = False
    autocast: bool = False
    way: str | None = None
    backend: str | None = None
    peer: str | None = None

    @property
    def precision(self) -> str:
        """Returns the precision of float32 products, as torch.set_float32_matmul_precision has it."""
        return getattr(self.case, "precision", "highest")

    @property
    def in_batch(self) -> contrastive.Case:
        """Returns the case of a job of the in-batch loss; raises TypeError for another one."""
        if not isinstance(self.case, contrastive.Case):
            raise TypeError(f"case: got {self.name}, wanted an in-batch loss")
        return self.case

    @property
    def rows(self) -> int:
        """Returns the number of pairs."""
        case = self.case
        if isinstance(case, Training):
            return case.pairs
        return case.rows if isinstance(case, ranking.Case) else case.batch

    @property
    def dim(self) -> int:
        """Returns the number of dimensions of an embedding; 1 where there are none."""
        return (self.case.hidden if isinstance(self.case, Training) else self.case.dim) or 1

    @property
    def columns(self) -> dict[str, Any]:
        """Returns the columns that every row of a report begins with."""
        case = self.case
        if isinstance(case, Training):
            return {"case": self.name, "N": case.pairs, "mini-batch": case.mini_batch, "dtype": "autocast bfloat16"}
        return {"case": self.name, "N": self.rows, "D": case.dim, "dtype": self.dtype}

    @property
    def dtype(self) -> str:
        """Returns the type that the products have, which may be another one than the embeddings'."""
        return "autocast bfloat16" if self.autocast else str(getattr(self.case, "dtype", "float32"))

    @property
    def name(self) -> str:
        """Returns the size, the type and the options in one line."""
        case = self.case
        if isinstance(case, Training):
            return f"{case.name}, {case.pairs} pairs, mini-batches of {case.mini_batch}"
        if isinstance(case, ranking.Case):
            return f"{'+'.join(case.losses)} {case.size} {case.dtype}"
        return f"N={case.batch} D={case.dim} {self.likeness}"

    @property
    def likeness(self) -> str:
        """Returns what jobs have in common whose times tell of one another: all but N and D."""
        case = self.case
        if isinstance(case, Training):
            return case.name
        if isinstance(case, ranking.Case):
            return f"{'+'.join(case.losses)} {case.dtype}"
        kind = case.dtype if case.dtype != "float32" else f"float32 {case.precision}"
        options = [case.loss.removesuffix("EmbedLoss")] if case.guided else []
        options += [f"{case.negatives} negatives"] if case.negatives else []
        options += [f"{key} {value}" for key, value in case.options.items() if key not in SYMMETRIC]
        options += [f"{case.terms} directions"] if case.terms > 1 and not case.guided else []
        options += ["mask"] if self.mask else []
        options += [f"prefixes {','.join(map(str, case.dims))}"] if case.dims else []
        options += [f"by {by}" for by in (self.way, self.backend) if by]
        options += [f"of {self.peer}"] if self.peer else []
        return ", ".join([f"{kind} under autocast" if self.autocast else str(kind), *options])


def small(job: Job) -> Job | None:
    """Returns a job on few rows that needs the same kernels; None for one that needs none of its own."""
    if job.kind in ("training", "sigmoid"):
        return None
    if job.peer is not None:
        return job
    rows = PARITY_ROWS if job.kind == "parity" else SMALL_ROWS
    if isinstance(job.case, ranking.Case):
        return replace(job, case=replace(job.case, rows=min(rows, job.case.rows)), peers=False)
    if isinstance(job.case, contrastive.Case):
        return replace(job, case=replace(job.case, batch=rows), peers=False, compiled=False)
    return None


def in_batch(rows: int, dim: int, dtype: str = "bfloat16", **values: Any) -> contrastive.Case:
    """Returns a case of the in-batch-negatives loss."""
    return contrastive.Case(MNR, rows, rows, dim=dim, dtype=dtype, **values)


def gist(rows: int, dim: int, dtype: str = "bfloat16") -> contrastive.Case:
    """Returns a case of the in-batch loss with a guide."""
    return contrastive.Case("GISTEmbedLoss", rows, rows, dim=dim, dtype=dtype, scale=100.0, terms=3)


def symmetric(rows: int, dim: int, dtype: str = "bfloat16") -> contrastive.Case:
    """Returns a case of the in-batch loss in both directions."""
    return in_batch(rows, dim, dtype, options=SYMMETRIC, terms=2)


FLOAT32: dict[str, Any] = {"dtype": "float32"}
HIGH: dict[str, Any] = {**FLOAT32, "precision": "high"}
SCALE_100: dict[str, Any] = {"options": {"scale": 100.0}, "scale": 100.0}
FOUR: dict[str, Any] = {"options": {"directions": FOUR_DIRECTIONS}, "terms": 4}


def plan(peers: Sequence[str] = (), quick: bool = False, backends: Sequence[str | None] = ("triton",)) -> list[Job]:
    """Returns the jobs, those first that say most in the least time.

    Args:
        peers: The names of the other libraries.
        quick: A part of them.
        backends: Whose kernels there are; of several, the sizes of the project's goals come first, timed by each.
    """
    main = [Job("contrastive", in_batch(rows, 768), peers=True) for rows in (1024, 4096, 16384, 65536)]
    first = _main_parity()
    if len(backends) > 1:
        others = [replace(job, backend=backends[-1]) for job in first[:1]]
        first[1:1] = [*others, *_by_each_backend()]
    first += [Job("host", in_batch(rows, 768)) for rows in (64, 256, 1024, 4096)]
    # Of the first size that they are timed at, so that their kernels are compiled once.
    checks = [Job("parity", in_batch(1024, 768), peer=peer) for peer in peers]
    if quick:
        return [*first, *checks, *main]

    def timed(rows: int, dim: int = 768, peers: bool = False, autocast: bool = False, **values: Any) -> Job:
        return Job("contrastive", in_batch(rows, dim, **values), peers=peers, autocast=autocast)

    def loss(case: Case, peers: bool = False) -> Job:
        return Job("losses", case, peers=peers)

    def pairs(rows: int, dtype: str = "bfloat16") -> list[Job]:
        return [loss(ranking.Case((name,), rows, dim=768, dtype=dtype)) for name in (ranking.COSENT, ranking.ANGLE)]

    matryoshka = {rows: loss(in_batch(rows, MATRYOSHKA[0], dims=MATRYOSHKA), peers=True) for rows in (16384, 65536)}
    return [
        *first,
        *checks,
        *main,
        *(timed(16384, **kind) for kind in (FLOAT32, HIGH, {"dtype": "float16"})),
        timed(16384, autocast=True, **FLOAT32),
        *_weights(),
        *pairs(8192),
        loss(symmetric(16384, 768), peers=True),
        loss(gist(4096, 768)),
        matryoshka[16384],
        *(Job("training", model) for model in (MINILM, BERT_BASE)),
        timed(262144, peers=True),
        *(Job("contrastive", in_batch(rows, 768), compiled=True) for rows in (8192, 32768)),
        *(timed(rows, 384, peers=True) for rows in (1024, 4096, 16384, 65536, 262144)),
        *(timed(rows, autocast=True, **FLOAT32) for rows in (1024, 65536)),
        *pairs(256),
        *pairs(65536),
        *pairs(65536, "float32"),
        *(Job("training", replace(model, mini_batch=size)) for size in (256, 16) for model in (MINILM, BERT_BASE)),
        Job("sigmoid", in_batch(16384, 768)),
        *(loss(case) for case in (symmetric(65536, 768), gist(16384, 768))),
        matryoshka[65536],
        *(timed(rows, **kind) for kind in (HIGH, {"dtype": "float16"}, FLOAT32) for rows in (1024, 4096)),
        *_more_parity(),
        *(timed(65536, **kind) for kind in ({"dtype": "float16"}, HIGH, FLOAT32)),
        Job("sigmoid", in_batch(65536, 768)),
    ]


def _by_each_backend() -> list[Job]:
    """Returns the jobs that compare the backends, at the sizes of the project's goals."""
    sizes = [in_batch(65536, 768), in_batch(262144, 768), in_batch(1024, 768), in_batch(65536, 384)]
    return [Job("backends", case) for case in (*sizes, symmetric(65536, 768))]


def _main_parity() -> list[Job]:
    """Returns the parity jobs of the most usual losses."""
    rows, dim = PARITY_ROWS, 384

    def parity(case: Case, **values: Any) -> Job:
        return Job("parity", case, **values)

    return [
        parity(in_batch(rows, dim)),
        parity(in_batch(rows, dim, **FLOAT32)),
        parity(in_batch(rows, dim, **HIGH)),
        parity(in_batch(rows, dim, dtype="float16")),
        parity(in_batch(rows, dim, **FLOAT32), autocast=True),
        parity(in_batch(rows, dim, **SCALE_100)),
        parity(symmetric(rows, dim)),
        parity(gist(rows, dim)),
        parity(in_batch(rows, dim, dims=(384, 128, 64))),
        *(parity(ranking.Case((loss,), rows, dtype="bfloat16")) for loss in (ranking.COSENT, ranking.ANGLE)),
    ]


def _more_parity() -> list[Job]:
    """Returns the parity jobs of options, of both ways of making the weights, and of other types."""
    rows, dim = PARITY_ROWS, 384
    kinds: tuple[dict[str, Any], ...] = ({}, FLOAT32)
    jobs = [Job("parity", in_batch(rows, dim, **kind), way=way) for kind in kinds for way in settings.WEIGHTS]
    for kind in kinds:
        jobs += [Job("parity", in_batch(rows, dim, **kind, **options)) for options in ({"negatives": 3}, FOUR)]
        jobs.append(Job("parity", in_batch(rows, dim, **kind), mask=True))
    jobs += [Job("parity", in_batch(rows, dim, **FLOAT32, **more)) for more in (SCALE_100, {"dims": (384, 128, 64)})]
    jobs += [Job("parity", case) for case in (symmetric(rows, dim, "float32"), gist(rows, dim, "float32"))]
    jobs += [Job("parity", in_batch(rows, dim, **HIGH, negatives=3))]
    jobs += [Job("parity", ranking.Case((loss,), rows)) for loss in (ranking.COSENT, ranking.ANGLE)]
    return jobs


def _weights() -> list[Job]:
    """Returns the jobs that compare the two ways of making the weights."""
    kinds: tuple[dict[str, Any], ...] = ({"dtype": "bfloat16"}, FLOAT32, {"dtype": "bfloat16", **SCALE_100})
    jobs = [Job("weights", in_batch(rows, 768, **kind)) for rows in (16384, 4096) for kind in kinds]
    jobs += [Job("weights", in_batch(65536, dim)) for dim in (768, 384)]
    return jobs
