"""How embeddings are multiplied: the number format of the operands, and what a matrix product makes of them."""

from __future__ import annotations

import logging
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from .... import settings
from ....logs import log_once
from ....values import float32_matmul_precision
from ..launching import INTERPRETED
from ..targets import Target

logger = logging.getLogger(__name__)

_BY_TORCH = {"highest": "float32", "high": "tf32", "medium": "bfloat16"}
_INPUT_PRECISION = {"float32": "ieee", "tf32": "tf32", "tf32x3": "tf32x3", "bfloat16x3": "bf16x3", "bfloat16": "ieee"}
_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# The format of the tensor cores that a precision runs on.
_FORMAT = {"tf32x3": "tf32", "bfloat16x3": "bfloat16"}
# fp16 weights are written times 2^LIFT: at most 1, they would fall below its smallest number early.
FP16_LIFT = 12


@dataclass(frozen=True)
class MatmulPrecision:
    """Holds the number format of the operands and how they are multiplied."""

    name: str  # "float32", "tf32", "tf32x3", "bfloat16x3", "bfloat16" or "float16"
    dtype: torch.dtype  # of the operands in memory that the vendor's products read, and of the weights
    fma: bool  # not by tensor cores

    @property
    def lift(self) -> int:
        """Weights are stored times 2^lift, so that their type holds them."""
        return FP16_LIFT if self.dtype == torch.float16 else 0

    @property
    def split(self) -> bool:
        """True if a product of fp32 operands is three products of tf32 or bf16 parts of them."""
        return self.name in ("tf32x3", "bfloat16x3")

    @property
    def rate(self) -> str:
        """The name of the peak rate in `targets.Gpu` that it runs at."""
        if self.fma:
            return "fp32"
        return "half" if self.dtype != torch.float32 else "tf32"

    def constants(self) -> dict[str, Any]:
        """Returns the constexpr of a sweep."""
        return {
            "PRECISION": _INPUT_PRECISION.get(self.name, "ieee"),
            "OPERAND": _TL[self.dtype],
            "WIDEN": INTERPRETED and self.dtype == torch.bfloat16,
        }


# The guide's products: which columns it excludes must not depend on how the embeddings are multiplied.
FULL = MatmulPrecision("float32", torch.float32, fma=True)


def choose_precision(
    dtypes: Set[torch.dtype], target: Target, prefixes: int = 1, autocast: torch.dtype | None = None
) -> MatmulPrecision:
    """Returns the precision for embeddings of these types: half precision if all are alike in it, else that of fp32.

    SBERT_KERNELS_MATMUL decides for float32 embeddings if it is set; then autocast, as if all embeddings were of its
    type; then torch.set_float32_matmul_precision(). A precision that the target lacks is replaced by one that is no
    less exact, and a line in the log says so where the setting has asked for it.
    """
    formats = target.gpu.formats
    asked_for = settings.get("matmul")
    if autocast is not None and asked_for is None:
        dtypes = {autocast}
    # Weights over the small norms of short prefixes leave fp16's range; tf32 has as many digits, and a wider range.
    if len(dtypes) == 1 and torch.float32 not in dtypes and not (dtypes == {torch.float16} and prefixes > 1):
        dtype = next(iter(dtypes))
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.float16 or name in formats:
            return MatmulPrecision(name, dtype, fma=name not in formats)
        return MatmulPrecision("float32", torch.float32, fma=True)
    name = asked_for or _BY_TORCH[float32_matmul_precision("cuda")]
    if dtypes == {torch.float16}:
        name = "tf32"
    wanted = name
    if name in ("tf32", "tf32x3") and "tf32" not in formats:
        name = "bfloat16x3"
    if _FORMAT.get(name, name) not in formats:
        name = "float32"
    if name != wanted == asked_for:
        log_once(
            logger,
            f"SBERT_KERNELS_MATMUL={asked_for!r}: this GPU has no such products, so that {name} takes its place.",
        )
    if name == "bfloat16":
        return MatmulPrecision(name, torch.bfloat16, fma=False)
    return MatmulPrecision(name, torch.float32, fma=_FORMAT.get(name, name) not in formats)
