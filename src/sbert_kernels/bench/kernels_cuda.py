"""The CUDA kernels as items of `bench kernels`: each policy of their operator, beside what else makes the same matrix.

That is the vendor's product with results in the operands' type and in float32, which weighs nothing, and the sweep of
the Triton kernels. A kernel's operations are those of its product, 2 M N D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sbert_kernels.backends import BACKENDS
from sbert_kernels.bench.cases.kernels import CUDA, Case, Products, chosen
from sbert_kernels.bench.kernels import Item, Shape
from sbert_kernels.bench.kernels_triton import TritonKernels


@dataclass(frozen=True)
class Policy:
    """Says what the operator writes, and of what: with the type and ids it is a kernel of its own.

    Attributes:
        writes: "rows" (weights, and the sums of their rows), "sums" (sums alone) or "known" (weights, whose sums are
            known).
        dtype: The type of the vectors, and of the weights.
        ids: Entries of equal ids are left out.
        both: The sums of columns as well, or weights of both directions.
    """

    writes: str
    dtype: str
    ids: bool = False
    both: bool = False

    @property
    def name(self) -> str:
        """Returns it in words."""
        options = [self.writes, *(["ids"] if self.ids else []), *(["both directions"] if self.both else [])]
        return f"contrastive_weights ({', '.join(options)})"


# Those first that most losses take. Of each type, what is compiled.
POLICIES = (
    Policy("rows", "bfloat16"),
    Policy("known", "bfloat16", both=True),
    Policy("sums", "bfloat16", both=True),
    Policy("rows", "bfloat16", ids=True),
    Policy("sums", "bfloat16"),
    Policy("known", "bfloat16"),
    Policy("sums", "bfloat16", ids=True, both=True),
    Policy("known", "float16", both=True),
    Policy("sums", "float16", both=True),
    Policy("known", "float16", ids=True),
    Policy("sums", "float16", ids=True),
)


def arguments(
    policy: Policy, rows: int, columns: int, dim: int, device: str, *, scale: float = 20.0, **options: Any
) -> dict[str, Any]:
    """Returns the arguments of a call of the operator by their names, with outputs that hold no numbers yet (NaN).

    The diagonal is left out, as that of the positives. ``options`` take the place of what is here.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, policy.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, float("nan"), device=device, dtype=dtype)

    vectors, column_vectors = draw(rows, dim).to(dtype), draw(columns, dim).to(dtype)
    height, width = _tile(device)
    found: dict[str, Any] = {
        "rows": vectors,
        "columns": column_vectors,
        "row_factor": 1 / vectors.float().norm(dim=1),
        "column_factor": 1 / column_vectors.float().norm(dim=1),
        "scale": scale,
        "shift": 0.0,
        "excluded": [0, 0, 1],
        "special": [0, 0, 0],
        "special_ratio": 1.0,
        "row_ids": None,
        "column_ids": None,
        "own_column": 0,
        "row_coefficient": None,
        "column_coefficient": None,
        "weights": None,
        "row_sums": None,
        "column_sums": None,
    }
    if policy.ids:
        found["row_ids"] = torch.randint(rows, (rows,), device=device, generator=generator)
        found["column_ids"] = torch.randint(rows, (columns,), device=device, generator=generator)
    if policy.writes != "sums":
        found["weights"] = empty(rows, -(-columns // 8) * 8, dtype=dtype)[:, :columns]
    if policy.writes == "known":
        found["row_coefficient"] = draw(rows).abs() + 0.1
        found["column_coefficient"] = draw(columns).abs() + 0.1 if policy.both else None
    else:
        found["row_sums"] = empty(-(-columns // width), rows)
        found["column_sums"] = empty(-(-rows // height), columns) if policy.both else None
    return found | options


def _tile(device: str) -> tuple[int, int]:
    """Returns how many rows and columns a sum is taken of."""
    if device == "cpu":  # where something stands for the library in tests
        return 128, 128
    height, width = torch.ops.sbert_kernels_cuda.tile()
    return int(height), int(width)


class CudaKernels:
    """Hands out the policies; raises RuntimeError where the library does not serve. For tests a device may be named."""

    def __init__(self, device: str = "cuda", cases: Sequence[Products] = CUDA) -> None:
        backend = next(backend for backend in BACKENDS if backend.name == "cuda")
        there = device != "cuda" or torch.cuda.is_available()
        why_not = backend.why_not_on(device, True) if there else "torch sees no GPU"
        if why_not is not None:
            raise RuntimeError(f"the CUDA kernels are not there: {why_not}")
        self.device, self.cases = device, cases
        self._triton = TritonKernels(device, ())
        self.seconds, self.peaks = self._triton.seconds, self._triton.peaks

    def items(self, quick: bool) -> Iterator[Item]:
        """Yields every policy of each shape, after the vendor's products, and before Triton's sweep."""
        for case in chosen(self.cases, quick):
            assert isinstance(case, Products)
            yield from _vendors(case, self.device)
            for policy in POLICIES:
                if policy.dtype == case.dtype:
                    yield _item(policy, case, self.device)
            yield from self._sweeps(case)

    def _sweeps(self, case: Case) -> Iterator[Item]:
        for item in TritonKernels(self.device, [case], ways=("sweep",)).items(quick=False):
            if item.kernel.partition(" ")[0] == "sweep":
                yield item


def _item(policy: Policy, case: Products, device: str) -> Item:
    given = arguments(policy, case.rows, case.columns, case.dim, device, scale=case.scale)
    moved = sum(value.numel() * value.itemsize for value in given.values() if isinstance(value, Tensor))
    return Item(
        kernel=policy.name,
        shape=case.name,
        dtype=case.kind,
        call=lambda: torch.ops.sbert_kernels_cuda.contrastive_weights(**given),
        moved=float(moved),
        products=((case.rows, case.columns, case.dim),),
        product_dtype=getattr(torch, case.dtype),
        rate="half",
    )


def _vendors(case: Products, device: str) -> Iterator[Item]:
    """Yields the vendor's product with results in the operands' type and in float32."""
    shape: Shape = (case.rows, case.columns, case.dim)
    dtype = getattr(torch, case.dtype)
    a, b = (torch.randn(n, case.dim, device=device).to(dtype) for n in (case.rows, case.columns))
    for out_dtype in (dtype, torch.float32):
        if out_dtype != dtype and not device.startswith("cuda"):
            continue  # only a GPU has it
        out = torch.empty(case.rows, case.columns, device=device, dtype=out_dtype)

        def call(out: Tensor = out, out_dtype: torch.dtype = out_dtype) -> Tensor:
            if out_dtype == dtype:
                return torch.mm(a, b.T, out=out)
            return torch.mm(a, b.T, out_dtype=out_dtype, out=out)

        name = f"vendor: product, results in {str(out_dtype).removeprefix('torch.')}"
        moved = float(sum(x.numel() * x.itemsize for x in (a, b, out)))
        yield Item(name, case.name, case.kind, call, moved, (shape,), dtype, "half")
