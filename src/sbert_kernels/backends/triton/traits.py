"""What of a contrastive problem decides how it is computed; all of it is known without waiting for the device."""

from __future__ import annotations

from ... import settings
from ...problems.contrastive import ContrastiveProblem
from .launching import Target
from .operands import Products, choose_products

# Of a chunk's weights: enough rows that reading and writing the columns' gradient once a chunk costs little.
WEIGHTS_BYTES = 512 * settings.MIB


def products_of(problem: ContrastiveProblem, target: Target) -> Products:
    vectors = (problem.queries, *problem.documents, problem.all_queries)
    return choose_products({x.dtype for x in vectors if x is not None}, target, len(problem.dims))


def bounded(problem: ContrastiveProblem) -> bool:
    """True if exp(z) needs no shift, as far as can be known without waiting for the device."""
    return problem.unshifted


def masked(problem: ContrastiveProblem) -> bool:
    """True if ids or hardness tell the entries of a tile apart."""
    return any(term.duplicates != "keep" or term.hardness > 0 for term in problem.terms())


def crowded(problem: ContrastiveProblem, products: Products) -> bool:
    """Whether masks, a guide or products in parts leave fewer registers to a gradient."""
    return masked(problem) or problem.guided or products.split


def chunk_rows(problem: ContrastiveProblem, products: Products, n: int) -> int:
    """Rows whose weights fit into the byte budget; a multiple of 128, which is a block's.

    Smaller chunks stay in L2, but each reads and writes the columns' whole gradient once more; the budget wins as soon
    as a chunk has fewer than some thousand rows.
    """
    row_bytes = products.dtype.itemsize * len(problem.dims) * sum(term.columns for term in problem.terms())
    rows = settings.block_bytes(WEIGHTS_BYTES) // row_bytes
    return max(1, min(n, rows if rows < 128 else rows // 128 * 128))
