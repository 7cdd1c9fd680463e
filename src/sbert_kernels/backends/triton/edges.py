"""What touches each embedding once, before and after the sweeps: norms and own pairs; the gradient through the norm.

`prepare` reads queries and documents once for the norms of all prefixes and the similarities of the own pairs.
`finish` reads a gradient and its vector, and writes the gradient: with G that of the dot products (norms as factors),

    dx = g (a G + sum_k [d < d_k] (q_k f_k f'_k x' - b_k f_k^2 x)),    b_k = (G_k + q_k f_k f'_k x') . x

where x' is the own pair's other half, q_k the gradient of its similarity, f = 1 / norm, and b_k the part along x, which
the norm takes away (not where the norm is below its least value: there the divisor is a constant).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _norms(squares, factors, index, inside, eps, ABSENT_IS_ZERO: tl.constexpr):
    norms = tl.sqrt(squares)
    inverse = 1.0 / tl.maximum(norms, eps)
    if ABSENT_IS_ZERO:
        inverse = tl.where(norms == 0.0, 0.0, inverse)
    tl.store(factors + index, inverse, mask=inside)
    return inverse


@triton.jit(do_not_specialize=["m", "n", "offset"])
def prepare(
    documents,  # (M, D)
    documents_stride,
    queries,  # (N, D); None: norms only
    queries_stride,
    m,
    n,
    offset,  # the document of query 0
    eps,
    document_factors,  # (K, M) fp32; None: dot products
    query_factors,  # (K, N)
    own,  # (K, N): similarity of each query and its document
    DIMS: tl.constexpr,
    ABSENT_IS_ZERO: tl.constexpr,  # a zero vector has factor 0, which fp16 can hold, instead of 1 / eps
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    K: tl.constexpr = len(DIMS)
    index = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = index < m
    x = documents + index.to(tl.int64)[:, None] * documents_stride
    query = index - offset
    paired = inside & (query >= 0) & (query < n)
    if queries is not None:
        y = queries + query.to(tl.int64)[:, None] * queries_stride
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    query_squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    dots = tl.zeros((BLOCK_ROWS,), tl.float32)
    for k in tl.static_range(K):
        for begin in range(DIMS[k - 1] if k > 0 else 0, DIMS[k], BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            a = tl.load(x + d[None, :], mask=inside[:, None] & (d < DIMS[k])[None, :], other=0.0).to(tl.float32)
            squares += tl.sum(a * a, 1)
            if queries is not None:
                b = tl.load(y + d[None, :], mask=paired[:, None] & (d < DIMS[k])[None, :], other=0.0).to(tl.float32)
                query_squares += tl.sum(b * b, 1)
                dots += tl.sum(a * b, 1)
        s = dots
        if document_factors is not None:
            f = _norms(squares, document_factors + k * m, index, inside, eps, ABSENT_IS_ZERO)
            if queries is not None:
                s = dots * f * _norms(query_squares, query_factors + k * n, query, paired, eps, ABSENT_IS_ZERO)
        if queries is not None:
            tl.store(own + k * n + query, s, mask=paired)


@triton.jit(do_not_specialize=["partner_factors_stride", "rows", "n", "offset"])
def finish(
    gradient,  # (rows, width) fp32, in place
    gradient_stride,
    row_coefficient,  # (rows,): multiplies the gradient found so far; None: 1
    x,  # (rows, D)
    x_stride,
    factors,  # (K, rows) fp32; None: dot products
    partners,  # (n, D), of rows offset .. offset + n; None: there are no own pairs
    partners_stride,
    partner_factors,  # (K, .)
    partner_factors_stride,
    pull,  # (K, n): gradient of the own similarity
    own,  # (K, n): the own similarity
    along,  # (K, rows): G_k . x; None, for one prefix: it is computed here
    rows,
    n,
    offset,
    eps,
    factor,
    factor_tensor,  # () fp32; None: 1
    DIMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    K: tl.constexpr = len(DIMS)
    index = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = index < rows
    pair = index - offset
    paired = inside & (pair >= 0) & (pair < n)
    g = gradient + index.to(tl.int64)[:, None] * gradient_stride
    vectors = x + index.to(tl.int64)[:, None] * x_stride
    if partners is not None:
        others = partners + pair.to(tl.int64)[:, None] * partners_stride
    if factor_tensor is not None:
        factor *= tl.load(factor_tensor)
    before = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if row_coefficient is not None:
        before = tl.load(row_coefficient + index, mask=inside, other=0.0)

    found = tl.zeros((BLOCK_ROWS,), tl.float32)
    if factors is not None and along is None:
        for begin in range(0, DIMS[0], BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            mask = inside[:, None] & (d < DIMS[0])[None, :]
            a = tl.load(vectors + d[None, :], mask=mask, other=0.0).to(tl.float32)
            found += tl.sum(tl.load(g + d[None, :], mask=mask, other=0.0) * a, 1)
        found *= before
    for begin in range(0, DIMS[K - 1], BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < DIMS[K - 1])[None, :]
        result = tl.load(g + d[None, :], mask=mask, other=0.0) * before[:, None]
        a = tl.load(vectors + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if partners is not None:
            b = tl.load(others + d[None, :], mask=mask & paired[:, None], other=0.0).to(tl.float32)
        for k in tl.static_range(K):
            strength = tl.zeros((BLOCK_ROWS,), tl.float32)
            through = tl.zeros((BLOCK_ROWS,), tl.float32)
            if partners is not None:
                strength = tl.load(pull + k * n + pair, mask=paired, other=0.0)
            if factors is not None:
                f = tl.load(factors + k * rows + index, mask=inside, other=0.0)
                parallel = found
                if along is not None:
                    parallel = tl.load(along + k * rows + index, mask=inside, other=0.0)
                if partners is not None:
                    parallel += strength * tl.load(own + k * n + pair, mask=paired, other=0.0)
                    strength *= f * tl.load(partner_factors + k * partner_factors_stride + pair, mask=paired, other=0.0)
                through = parallel * f * f
                through = tl.where(f * eps < 1.0 - 1e-6, through, 0.0)
            change = -through[:, None] * a
            if partners is not None:
                change += strength[:, None] * b
            result += tl.where((d < DIMS[k])[None, :], change, 0.0)
        tl.store(g + d[None, :], result * factor, mask=mask)
