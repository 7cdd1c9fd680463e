"""What a plan of a call holds: everything that is decided about it before anything runs.

`planner` makes it, `run` and `softmax` execute it. It holds no tensor, and is hashable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ....problems.contrastive import Needs, Term
from ..launching import Config
from ..targets import Target
from .memory import Buffer
from .precision import MatmulPrecision

# exp(60) * 1e9 columns times an inverse weight of 1e12 is 1e47, whose inverse is no number of fp32. Times 2^43 = 1e13
# it is one, and so is the largest factor, exp(53), times that.
ROW_LIFT = 43


@dataclass(frozen=True)
class OperandPlan:
    """Says how a set of vectors is brought into the form that the kernels read, and what becomes of its gradient."""

    rows: int
    row_stride: int  # from one row to the next, in numbers
    dtype: torch.dtype  # the vectors are converted to it
    unit_length: bool  # the vectors are divided by their norms first, as fp16 weights times inverse norms may overflow
    cosine: bool  # the inverse norms are computed
    need: bool  # the gradient is computed
    radial: bool  # the radial part of each prefix's gradient is kept: `norms_backward` finds that of one prefix only
    # The gradient comes from the rows of one term alone, each chunk writes its own part, and the last kernel multiplies
    # by the rows' factors. Otherwise chunks add to it.
    rows_alone: bool = False
    zeroed: bool = False  # it is set to zero first: the first chunk does not write all of it


@dataclass(frozen=True)
class Diagonals:
    """Describes diagonals at equal distances: the columns of row 0 are first, first + stride, ..."""

    first: int = 0
    stride: int = 0
    count: int = 0

    @classmethod
    def of(cls, columns: Sequence[int]) -> Diagonals:
        """Returns the diagonals that begin at these columns of row 0."""
        first = columns[0] if columns else 0
        stride = columns[1] - first if len(columns) > 1 else 0
        if any(column != first + k * stride for k, column in enumerate(columns)):
            raise ValueError(f"the kernels know diagonals at equal distances only, got columns {tuple(columns)}.")
        return cls(first, stride, len(columns))


@dataclass(frozen=True)
class SweepPlan:
    """Says how `sweep` or `weigh` is divided: blocks of rows, splits of the columns."""

    config: Config
    blocks: int
    splits: int
    columns_per_program: int

    @property
    def grid(self) -> tuple[int]:
        """How many programs run."""
        return (self.blocks * self.splits,)


@dataclass(frozen=True)
class TermPlan:
    """Holds the rule of a term, and the names of its vectors: "queries", "all_queries" or "documents"."""

    term: Term
    rows: str
    row_begin: int  # where row 0 is among the vectors of that name
    columns: str
    excluded: Diagonals
    hardness_exceptions: Diagonals


@dataclass(frozen=True)
class ChunkPlan:
    """Says how the weights of some rows are written, and how the products with them are taken, term by term."""

    begin: int
    end: int
    sweeps: tuple[SweepPlan, ...]  # one pass, or the first of two
    weights: tuple[SweepPlan, ...]  # the second pass, which writes weights; empty if the first one does, or nobody
    redo: tuple[SweepPlan, ...]  # of rows whose sum vanished beside the constant; empty if none can
    # For each term: its product is the first for the gradient of its columns, and writes all of it instead of adding.
    overwrites: tuple[bool, ...]
    buffers: tuple[Buffer, ...]


@dataclass(frozen=True)
class SoftmaxPlan:
    """Says how the terms of one softmax are computed."""

    terms: tuple[TermPlan, ...]
    add: bool  # its losses are added to those of the softmaxes before it
    divided_later: bool  # the weights' sum, and the rows' factors, come after the products
    chunks: tuple[ChunkPlan, ...]
    positives: tuple[str, ...]  # positive pairs, one or two: "positive", "gathered_positive"
    d_positives: tuple[str | None, str | None]  # where their gradients go; (name, None): both into one
    add_d_positive: bool  # the gradient of the first positive pair is added to that from the softmaxes before it
    radial: bool  # the pass that writes weights finds the radial part of the gradient of each prefix, too


@dataclass(frozen=True)
class Plan:
    """Holds all that is decided about a call."""

    target: Target
    precision: MatmulPrecision
    way: str  # "sweep" or "weigh"
    vendor: bool  # torch's products are what the precision asks for; else a kernel takes their place
    guide_vendor: bool  # the same of the guide's products in fp32
    online: bool  # the first pass finds the maximum of each row on the way, to subtract it; else it is a constant
    needs: Needs
    dims: tuple[int, ...]
    prefix_weights: tuple[float, ...]  # as parts of the largest
    largest_weight: float
    n: int
    width: int  # of the embeddings; entries beyond the longest prefix have no gradient
    row_offset: int
    eps: float
    zero_norm_gives_zero: bool
    queries: OperandPlan
    documents: OperandPlan
    all_queries: OperandPlan | None  # None if they are the queries, or no term's columns
    guide: tuple[OperandPlan, OperandPlan] | None  # queries, documents
    guide_width: int
    softmaxes: tuple[SoftmaxPlan, ...]
    buffers: tuple[Buffer, ...]  # of the whole call
    workspace_bytes: int

    @property
    def row_lift(self) -> int:
        """The rows' factors are held times 2^row_lift, until the products with them are there.

        A sum of exponentials relative to a constant is up to exp(60) times the number of columns; the factor is its
        inverse, and may be times a small weight of the row. Relative to the row's maximum it is at most the number.
        """
        return self.precision.lift or (0 if self.online else ROW_LIFT)

    @cached_property
    def gradient_lift(self) -> int:
        """Gradients are summed up times 2^gradient_lift, which is that of weights and rows, until they are finished."""
        return self.precision.lift + (self.row_lift if self.softmaxes[0].divided_later else 0)

    @property
    def gradients(self) -> bool:
        """True if any embeddings get a gradient."""
        return self.needs.vectors

    @cached_property
    def d_positives(self) -> tuple[str, ...]:
        """The positive pairs whose similarities get a gradient."""
        found = [name for softmax in self.softmaxes for name in softmax.d_positives if name is not None]
        return tuple(dict.fromkeys(found))

    @cached_property
    def rows_alone(self) -> list[str]:
        """The operands whose gradient is to be multiplied by the rows' factors at last."""
        divided_later = self.softmaxes[0].divided_later
        return [name for name, of in self.operands.items() if divided_later and of.rows_alone and of.need]

    @cached_property
    def operands(self) -> dict[str, OperandPlan]:
        """The vectors by name."""
        found = {"queries": self.queries, "documents": self.documents, "all_queries": self.all_queries}
        return {name: operand for name, operand in found.items() if operand is not None}


def joined_dtype(parts: Sequence[Tensor]) -> torch.dtype:
    """Returns the type that parts of a set of vectors are concatenated in: theirs if they are alike, else float32."""
    return parts[0].dtype if len({part.dtype for part in parts}) == 1 else torch.float32
