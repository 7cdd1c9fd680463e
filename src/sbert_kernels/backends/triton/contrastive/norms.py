"""The kernels that read each embedding once, before and after the sweeps: norms, positive pairs, and their gradients.

`norms_forward` reads queries and documents once, for the norms of all prefixes and the similarities of positive pairs.
`norms_backward` turns the gradient G of plain dot products into that of the embeddings, in place:

    dx = g (a G + sum_k [d < d_k] (q_k f_k f'_k x' - b_k f_k^2 x)),    b_k = (G_k + q_k f_k f'_k x') . x

where x' is the other vector of the positive pair, q_k the gradient of its similarity (d_positive), f = 1 / norm, and
b_k the radial part, which the norm removes (not where the norm is below eps: there the divisor is a constant).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _norms(squares, inverse_norms, index, inside, eps, ZERO_NORM_GIVES_ZERO: tl.constexpr):
    """Stores and returns 1 / max(norm, eps) of each row, from its sum of squares."""
    norms = tl.sqrt(squares)
    inverse = 1.0 / tl.maximum(norms, eps)
    if ZERO_NORM_GIVES_ZERO:
        inverse = tl.where(norms == 0.0, 0.0, inverse)
    tl.store(inverse_norms + index, inverse, mask=inside)
    return inverse


@triton.jit(do_not_specialize=["m", "n", "offset"])
def norms_forward(
    documents,  # (M, D)
    documents_stride,
    queries,  # (N, D); None: norms only
    queries_stride,
    m,
    n,
    offset,  # the document of query 0
    eps,
    document_inverse_norms,  # (K, M) fp32; None: dot products
    query_inverse_norms,  # (K, N)
    positive,  # (K, N): similarity of each query and its document
    DIMS: tl.constexpr,
    ZERO_NORM_GIVES_ZERO: tl.constexpr,  # not 1 / eps, which fp16 cannot hold
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes the inverse norms of documents and queries, and the similarity of each query and its document."""
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
        if document_inverse_norms is not None:
            f = _norms(squares, document_inverse_norms + k * m, index, inside, eps, ZERO_NORM_GIVES_ZERO)
            if queries is not None:
                to = query_inverse_norms + k * n
                s = dots * f * _norms(query_squares, to, query, paired, eps, ZERO_NORM_GIVES_ZERO)
        if queries is not None:
            tl.store(positive + k * n + query, s, mask=paired)


@triton.jit(do_not_specialize=["partner_inverse_norms_stride", "rows", "n", "offset"])
def norms_backward(
    gradient,  # (rows, width) fp32, in place
    gradient_stride,
    row_coefficient,  # (rows,): it and the inverse norm multiply the gradient that is there; None: both are in it
    x,  # (rows, D)
    x_stride,
    inverse_norms,  # (K, rows) fp32; None: dot products
    partners,  # (n, D), of rows offset .. offset + n; None: no positive pairs
    partners_stride,
    partner_inverse_norms,  # (K, .)
    partner_inverse_norms_stride,
    d_positive,  # (K, n): gradient of the positive similarity
    positive,  # (K, n): the positive similarity
    radial,  # (K, rows): G_k . x; None, for one prefix: it is computed here
    rows,
    n,
    offset,
    eps,
    factor,
    factor_tensor,  # () fp32; None: 1
    LIFT: tl.constexpr,  # the gradient that is there is times 2^LIFT
    DIMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Finishes a gradient, in place.

    Multiplies it by its row's factors, adds the positive pairs, takes the radial part away, and multiplies by the
    common factor.
    """
    K: tl.constexpr = len(DIMS)
    index = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = index < rows
    pair = index - offset
    paired = inside & (pair >= 0) & (pair < n)
    g = gradient + index.to(tl.int64)[:, None] * gradient_stride
    vectors = x + index.to(tl.int64)[:, None] * x_stride
    if partners is not None:
        partner_vectors = partners + pair.to(tl.int64)[:, None] * partners_stride
    if factor_tensor is not None:
        factor *= tl.load(factor_tensor)
    # One factor after the other: their product may leave fp32 where the gradient does not.
    before = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    norm_factor = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if row_coefficient is not None:
        before = tl.load(row_coefficient + index, mask=inside, other=0.0)
        if inverse_norms is not None:
            norm_factor = tl.load(inverse_norms + index, mask=inside, other=0.0)

    norm_factor *= 2.0**-LIFT

    found = tl.zeros((BLOCK_ROWS,), tl.float32)
    if inverse_norms is not None and radial is None:
        for begin in range(0, DIMS[0], BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            mask = inside[:, None] & (d < DIMS[0])[None, :]
            a = tl.load(vectors + d[None, :], mask=mask, other=0.0).to(tl.float32)
            found += tl.sum(
                tl.load(g + d[None, :], mask=mask, other=0.0) * before[:, None] * norm_factor[:, None] * a, 1
            )
    for begin in range(0, DIMS[K - 1], BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < DIMS[K - 1])[None, :]
        result = tl.load(g + d[None, :], mask=mask, other=0.0) * before[:, None] * norm_factor[:, None]
        a = tl.load(vectors + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if partners is not None:
            b = tl.load(partner_vectors + d[None, :], mask=mask & paired[:, None], other=0.0).to(tl.float32)
        for k in tl.static_range(K):
            strength = tl.zeros((BLOCK_ROWS,), tl.float32)
            through = tl.zeros((BLOCK_ROWS,), tl.float32)
            if partners is not None:
                strength = tl.load(d_positive + k * n + pair, mask=paired, other=0.0)
            if inverse_norms is not None:
                f = tl.load(inverse_norms + k * rows + index, mask=inside, other=0.0)
                radial_k = found
                if radial is not None:
                    radial_k = tl.load(radial + k * rows + index, mask=inside, other=0.0)
                if partners is not None:
                    radial_k += strength * tl.load(positive + k * n + pair, mask=paired, other=0.0)
                    partner_f = partner_inverse_norms + k * partner_inverse_norms_stride + pair
                    strength *= f * tl.load(partner_f, mask=paired, other=0.0)
                through = radial_k * f * f
                through = tl.where(f * eps < 1.0 - 1e-6, through, 0.0)
            change = -through[:, None] * a
            if partners is not None:
                change += strength[:, None] * b
            result += tl.where((d < DIMS[k])[None, :], change, 0.0)
        tl.store(g + d[None, :], result * factor, mask=mask)
