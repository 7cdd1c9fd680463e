"""Matrix products with fp32 sums: the vendor's, through torch, wherever they do what was asked for.

Where they do not, one plain kernel takes their place: fp32 operands in a precision that torch was not set to (tf32 or
products in three parts while torch is set to fp32, or fp32 while it is set to tf32), and half precision on ROCm, whose
products round their sums to it. One kernel for all of these: no copies of split operands, and no setting of the
process that another thread might see changed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....values import float32_matmul_precision
from ..launching import INTERPRETED, cdiv, launch
from ..targets import Target
from . import tiles
from .epilogue import product
from .precision import MatmulPrecision


@triton.jit(do_not_specialize=["m"])
def matrix_product(
    a,  # (m, k)
    a_row_stride,
    a_column_stride,
    b,  # (k, n)
    b_row_stride,
    b_column_stride,
    out,  # (m, n) fp32
    out_stride,
    m,
    n,
    k,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes a @ b, or adds it to what is there."""
    blocks, b_blocks = tl.cdiv(m, BLOCK_A), tl.cdiv(n, BLOCK_B)
    pid = tl.program_id(0)
    first_block = pid // (GROUP * b_blocks) * GROUP
    in_group = tl.minimum(blocks - first_block, GROUP)
    row = (first_block + pid % (GROUP * b_blocks) % in_group) * BLOCK_A + tl.arange(0, BLOCK_A)
    column = pid % (GROUP * b_blocks) // in_group * BLOCK_B + tl.arange(0, BLOCK_B)
    row_inside, column_inside = (row < m)[:, None], (column < n)[None, :]
    found = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for begin in range(0, k, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        a_at = row.to(tl.int64)[:, None] * a_row_stride + d.to(tl.int64)[None, :] * a_column_stride
        b_at = d.to(tl.int64)[:, None] * b_row_stride + column.to(tl.int64)[None, :] * b_column_stride
        a_tile = tl.load(a + a_at, mask=row_inside & (d < k)[None, :], other=0.0)
        b_tile = tl.load(b + b_at, mask=(d < k)[:, None] & column_inside, other=0.0)
        # [BLOCK_A, BLOCK_D] @ [BLOCK_D, BLOCK_B] -> [BLOCK_A, BLOCK_B]
        found = product(a_tile, b_tile, found, PRECISION, OPERAND, WIDEN)
    to = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    inside = row_inside & column_inside
    if ADD:
        found += tl.load(to, mask=inside, other=0.0)
    tl.store(to, found, mask=inside)


def vendor_multiplies(precision: MatmulPrecision, target: Target) -> bool:
    """Returns True if torch's products are what this precision asks for."""
    if precision.dtype == torch.float32:
        # Where there is no tf32, torch's products of float32 are just that whatever it is set to.
        full = target.backend == "cuda" and "tf32" not in target.gpu.formats
        full = full or float32_matmul_precision("cuda") == "highest"
        return precision.name == ("float32" if full else "tf32")
    return target.backend != "hip"


def multiply(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    add: bool,
    precision: MatmulPrecision,
    vendor: bool,
    target: Target,
) -> None:
    """Writes a @ b to ``out`` (m, n) fp32, or adds it: [m, k] @ [k, n] -> [m, n].

    Args:
        out: Rows of numbers side by side.
        a: (m, k), in the precision's type.
        b: (k, n), in the precision's type.
        add: ``out`` is added to.
        precision: How numbers are multiplied.
        vendor: What `vendor_multiplies` says.
        target: Of the kernel that runs otherwise.
    """
    if not vendor:
        _by_kernel(out, a, b, add, precision, target)
    elif a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif INTERPRETED and out.device.type == "cpu":  # which has no products of half precision with fp32 sums
        torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)
    elif not add:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif accumulates(out.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=torch.float32))


@cache
def accumulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns True if torch adds a product of half precision to an fp32 matrix in one go, as later versions do.

    The first call tries it, with a product of 8 x 8 numbers.
    """
    if device.type == "meta":
        return True
    one, out = torch.ones(8, 8, dtype=dtype, device=device), torch.zeros(8, 8, device=device)
    try:
        torch.addmm(out, one, one, out_dtype=torch.float32, out=out)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return True


def _by_kernel(out: Tensor, a: Tensor, b: Tensor, add: bool, precision: MatmulPrecision, target: Target) -> None:
    config = tiles.product_config(target, precision)
    constants: dict[str, Any] = precision.constants()
    launch(
        matrix_product,
        (cdiv(len(out), config["BLOCK_A"]) * cdiv(out.shape[1], config["BLOCK_B"]),),
        config=config,
        a=a,
        a_row_stride=a.stride(0),
        a_column_stride=a.stride(1),
        b=b,
        b_row_stride=b.stride(0),
        b_column_stride=b.stride(1),
        out=out,
        out_stride=out.stride(0),
        m=len(out),
        n=out.shape[1],
        k=a.shape[1],
        ADD=add,
        **constants,
    )
