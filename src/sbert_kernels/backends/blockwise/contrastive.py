"""The contrastive operation in row blocks of torch ops: any device, any dtype, three matrix products, no N x M matrix.

For a block of B rows R and all columns C, unit vectors where the similarity is cosine:

    z = scale R C^T                                        # [B, D] @ [D, M] -> [B, M], the only large buffer
    e = exp(z - shift), l = sum_j e_j                      # softmax statistics, in place
    dR  = (scale / l) (e C)                                # [B, M] @ [M, D] -> [B, D]
    dC += e^T ((scale / l) R)                              # [M, B] @ [B, D] -> [M, D]

The loss is a scalar, so these are its gradients up to one factor, and the backward pass multiplies by that factor.
Both products take e as it is: its row factor 1 / l goes to the thin side, which is D wide where e is M wide.

Cosine bounds the logits by scale + hardness. Up to `BOUNDED_LOGIT` (see `problems/contrastive.py`), one constant shift
serves all rows, and no maximum is searched for. A block with rows whose sums vanish so far from the bound is computed
again; those rows then have the shift that logits without such a bound have: the row maximum.

The row's own positive never goes through e. Its entry is excluded like others are, and its part of loss and gradient
is added row-wise from its own dot product: the loss is log(1 + l_others / e_positive) and the gradient -l_others / l,
both without the cancellation of 1 - p at p near 1.

Matryoshka prefixes are passes of their own, the widest first, over the same buffers and gradient accumulators.

Memory: one block of z (its size from a byte budget), unit copies of the inputs, the gradients. Products, accumulators,
softmax statistics and loss are fp32 (fp64 for fp64 inputs), under autocast too: half-precision inputs are widened once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ... import settings
from ...problems.contrastive import LEAST_EXPONENT, ContrastiveProblem, ContrastiveResult, Needs, Term, weight_sum

# Larger blocks gain nothing, but a matrix product packs all its columns anew for each block, so one of few rows loses.
TARGET_BLOCK_BYTES = 32 * settings.MIB
MIN_BLOCK_ROWS = 256
# Rows at a time in passes over the [., D] operands.
OPERAND_ROWS = 4096


def contrastive(problem: ContrastiveProblem, needs: Needs) -> ContrastiveResult:
    """Returns loss and gradients of the contrastive operation."""
    return _Pass(problem, needs).run()


class _Operand:
    """A set of vectors: a prefix of their values as the products use them, and the accumulator of their gradient."""

    def __init__(
        self, parts: tuple[Tensor, ...], problem: ContrastiveProblem, cosine: bool, need: bool, lift: float = 1.0
    ) -> None:
        self.parts, self.cosine, self.need, self.eps = parts, cosine, need, problem.eps
        self.lift = lift  # the gradient of the values is so many times as large; finish() divides by it
        self.dtype = torch.promote_types(parts[0].dtype, problem.dtype)
        self.total: Tensor | None = None  # (rows, D): the gradient of all prefixes so far
        self.values = parts[0].new_empty(0)  # (rows, d) for the prefix of d entries that was begun
        self.gradient: Tensor | None = None  # (rows, d), of these values: a view of the total, where it piles up
        self.before: Tensor | None = None  # (rows, 1): g . x of what lay there when the prefix was begun

    def begin(self, dim: int) -> None:
        """Hold the first ``dim`` entries; prefixes come from the widest down."""
        values = [_prefix(part.detach(), dim).to(self.dtype) for part in self.parts]
        self.values = values[0].contiguous() if len(values) == 1 else torch.cat(values)
        if self.cosine:
            norms = torch.linalg.vector_norm(self.values, dim=1, keepdim=True)
            self.below_eps = norms < self.eps  # (rows, 1)
            self.norms = norms.clamp_(min=self.eps)  # (rows, 1)
            # In place where the values are a copy already.
            out = self.values if self.values.data_ptr() != self.parts[0].data_ptr() else None
            self.values = torch.div(self.values, self.norms, out=out)
        if not self.need:
            return
        first = self.total is None
        if self.total is None:
            self.total = self.values.new_zeros(len(self.values), self.parts[0].shape[1])
        self.gradient = _prefix(self.total, dim)
        self.before = None
        if self.cosine and not first:
            # What wider prefixes have left here is to come out of finish() unchanged.
            self.gradient.mul_(self.norms * self.lift)
            self.before = torch.cat([self._radial(self.gradient, rows) for rows in self._row_blocks()])

    def finish(self) -> None:
        """Carry the gradient of this prefix through its norm, in place: dx = (g - (g . x) x) / |x|."""
        if self.gradient is not None and self.cosine:
            for rows in self._row_blocks():
                radial = self._radial(self.gradient, rows)
                if self.before is not None:
                    radial -= self.before[rows]
                self.gradient[rows].addcmul_(self.values[rows], radial, value=-1).div_(self.norms[rows] * self.lift)
        self.values = self.values.new_empty(0)  # before the next prefix holds other values

    def _radial(self, gradient: Tensor, rows: slice) -> Tensor:
        """Returns g . x, (rows, 1); 0 below eps, where the divisor is a constant and nothing flows through it."""
        products = gradient[rows] * self.values[rows]
        return products.sum(dim=1, keepdim=True).masked_fill_(self.below_eps[rows], 0)

    def _row_blocks(self) -> Iterator[slice]:
        return (slice(begin, begin + OPERAND_ROWS) for begin in range(0, len(self.values), OPERAND_ROWS))


@dataclass
class _Block:
    """One term's logits for one block of rows, later exponentiated in place."""

    term: Term
    z: Tensor  # (B, columns)
    positive: Tensor | None = None  # (B,): similarity of the positive pair, which z leaves out
    duplicates: Tensor | None = None  # (B, columns) bool: duplicate positives
    duplicate_logits: Tensor | float = 0.0  # (B,): their sum


@dataclass
class _Exponentials:
    """Statistics of one softmax for one block of rows."""

    others: Tensor  # (B,): sum of exp(logit - shift), positives apart
    positive: list[Tensor]  # each (B,): exp(logit - shift) of the positives
    total: Tensor  # (B,): of all


class _Pass:
    """One call: operands, buffers and the loop over row blocks."""

    def __init__(self, problem: ContrastiveProblem, needs: Needs) -> None:
        self.problem, self.needs = problem, needs
        self.softmaxes = problem.softmaxes()
        self.terms = [term for terms in self.softmaxes for term in terms]
        cosine = problem.cosine
        # On a GPU, seeing whether there are rows to be done again would wait for it.
        bounded = problem.bounded and (problem.device.type == "cpu" or not problem.sums_may_vanish)
        self.shift = problem.shift if bounded else None  # of all rows, or of each row its own
        self.least_sum = math.exp(LEAST_EXPONENT) if bounded and problem.sums_may_vanish else 0.0
        # With a constant shift, 1 / l may lie anywhere in exp(-83) .. exp(53). Times this power of two, exp(15), it is
        # in the middle of what fp32 holds.
        self.lift = 2.0**22 if bounded else 1.0
        self.queries = _Operand((problem.queries,), problem, cosine, needs.queries, self.lift)
        self.documents = _Operand(problem.documents, problem, cosine, needs.documents, self.lift)
        self.all_queries = self.queries
        if problem.all_queries is not None and any(term.columns_are_queries for term in self.terms):
            self.all_queries = _Operand((problem.all_queries,), problem, cosine, needs.all_queries, self.lift)
        self.operands = list({id(o): o for o in (self.queries, self.documents, self.all_queries)}.values())
        self.guides: list[_Operand] = []  # of queries, of documents; none without a guide
        if problem.guide_queries is not None:
            for parts in ((problem.guide_queries,), problem.guide_documents):
                self.guides.append(_Operand(parts, problem, cosine=True, need=False))
                self.guides[-1].begin(problem.guide_queries.shape[1])
        self.scale = problem.scale.factor(problem.dtype, problem.device)
        self.grad = any(needs)

    def run(self) -> ContrastiveResult:
        problem, needs = self.problem, self.needs
        n, device = len(problem.queries), problem.queries.device
        weights = problem.weights
        if weights is None:
            share = torch.full((n,), 1 / n, dtype=problem.dtype, device=device)
        else:
            weights = weights.detach().to(problem.dtype)
            share = weights / weight_sum(weights)
        losses = torch.zeros(n, dtype=problem.dtype, device=device)
        self.scale_gradient = torch.zeros((), dtype=problem.dtype, device=device)

        rows = self._block_rows(n)
        self.buffers = {
            term: torch.empty(rows * term.columns, dtype=self.queries.dtype, device=device) for term in self.terms
        }
        if self.guides:
            self.guide_buffer = self.guides[0].values.new_empty(rows * max(term.columns for term in self.terms))
        for dim, weight in zip(reversed(problem.dims), reversed(problem.dim_weights), strict=True):
            for operand in self.operands:
                operand.begin(dim)
            prefix_share = share * weight
            for begin in range(0, n, rows):
                block = slice(begin, min(begin + rows, n))
                losses[block].add_(self._block(block, prefix_share[block]), alpha=weight)
            for operand in self.operands:
                operand.finish()

        loss = (share * losses).sum()
        return ContrastiveResult(
            loss=loss,
            queries=self.queries.total,
            documents=self.documents.total,
            all_queries=self._all_queries_gradient(),
            scale=self.scale_gradient / self.lift if needs.scale else None,
            weights=(losses - loss) / weight_sum(weights) if needs.weights and weights is not None else None,
        )

    def _all_queries_gradient(self) -> Tensor | None:
        if not self.needs.all_queries:
            return None
        if self.all_queries is self.queries:  # no direction looks at the other ranks' queries
            return torch.zeros_like(self.problem.query_columns, dtype=self.problem.dtype)
        return self.all_queries.total

    def _block_rows(self, n: int) -> int:
        element = self.queries.dtype.itemsize
        every, widest = sum(term.columns for term in self.terms), max(term.columns for term in self.terms)
        row_bytes = every * element
        if self.guides:  # similarities of one term, and what they exclude
            row_bytes += widest * (element + 1)
        if any(term.duplicates != "keep" for term in self.terms):  # a mask for each term, and what one mask selects
            row_bytes += every + widest * element
        budget = settings.block_bytes() // row_bytes
        return max(1, min(n, budget, max(MIN_BLOCK_ROWS, TARGET_BLOCK_BYTES // row_bytes)))

    def _block(self, block: slice, share: Tensor) -> Tensor:
        """Returns the losses of the rows in ``block``, (B,), and adds their part of every gradient."""
        own_documents = slice(block.start + self.problem.row_offset, block.stop + self.problem.row_offset)
        losses = torch.zeros_like(share)
        for terms in self.softmaxes:
            losses += self._softmax(terms, block, own_documents, share / len(self.softmaxes)) / len(self.softmaxes)
        return losses

    def _sides(self, term: Term, block: slice, own_documents: slice) -> tuple[_Operand, slice, _Operand]:
        """Returns the row operand, its rows of this block, and the column operand."""
        rows = (self.queries, block) if term.rows_are_queries else (self.documents, own_documents)
        return *rows, self.all_queries if term.columns_are_queries else self.documents

    def _positive_columns(self, term: Term, block: slice) -> slice:
        return slice(term.own_column + block.start, term.own_column + block.stop)

    def _logits(self, term: Term, block: slice, own_documents: slice) -> _Block:
        """Returns z of one term, with -inf where the softmax must not look: exclusions, and the positive."""
        problem = self.problem
        rows, index, columns = self._sides(term, block, own_documents)
        # All entries are multiplied by the most common factor; then the diagonals that need another are corrected.
        hard_factor = self.scale + term.hardness
        factor = hard_factor if term.hard_everywhere else self.scale
        n = block.stop - block.start
        z = self.buffers[term][: n * term.columns].view(n, term.columns)
        # [B, D] @ [D, columns] -> [B, columns]
        torch.mm(rows.values[index] * factor, columns.values[: term.columns].T, out=z)
        result = _Block(term, z)
        if term.positive is not None:
            pairs = rows.values[index] * columns.values[self._positive_columns(term, block)]
            result.positive = pairs.sum(dim=1)  # [B, D] . [B, D] -> [B]

        ids = problem.column_ids(term)
        if ids is not None:
            begin = term.own_column + block.start
            duplicates = ids[begin : begin + n, None] == ids[None, :]  # (B, columns)
            _diagonal(duplicates, term.own_column, block).fill_(False)
            if term.duplicates == "positive":
                result.duplicates = duplicates
                if term.hard_everywhere:
                    z.copy_(torch.where(duplicates, z * (self.scale / factor), z))
            else:
                z.masked_fill_(duplicates, -torch.inf)
        for start in term.hardness_exceptions:
            entries = _diagonal(z, start, block)
            corrected = entries * ((self.scale if term.hard_everywhere else hard_factor) / factor)
            if result.duplicates is not None:
                corrected = torch.where(_diagonal(result.duplicates, start, block), entries, corrected)
            entries.copy_(corrected)
        if term.guided:
            guide = self._guide(term, block, own_documents)
            if term is self.terms[0]:  # query_to_doc, as in every problem
                # Out of the product itself: a copy of the positive ties with it, whatever the product rounds to.
                self.threshold = problem.guide_threshold(_diagonal(guide, term.own_column, block).clone())
            excluded = guide > self.threshold[:, None]
            if result.duplicates is not None:
                excluded &= ~result.duplicates
            z.masked_fill_(excluded, -torch.inf)
        if result.duplicates is not None:
            result.duplicate_logits = torch.where(result.duplicates, z, 0).sum(dim=1)
        for start in term.excluded if term.positive is None else (term.positive,):
            _diagonal(z, start, block).fill_(-torch.inf)
        return result

    def _guide(self, term: Term, block: slice, own_documents: slice) -> Tensor:
        """Returns the cosine of the guide's vectors for one term, (B, columns)."""
        queries, documents = self.guides
        rows = queries.values[block] if term.rows_are_queries else documents.values[own_documents]
        columns = queries if term.columns_are_queries else documents
        similarity = self.guide_buffer[: len(rows) * term.columns].view(len(rows), term.columns)
        # [B, G] @ [G, columns] -> [B, columns]
        return torch.mm(rows, columns.values[: term.columns].T, out=similarity)

    def _exponentiate(self, parts: list[_Block], positive: list[Tensor], shift: float | Tensor) -> _Exponentials:
        """Makes exp(z - shift) of z in place, and returns what a softmax over these terms needs to know of it.

        ``positive`` are the positives' logits, each (B,); the shift is one of all rows, or (B,).
        """
        others = torch.zeros_like(positive[0])
        for part in parts:
            if isinstance(shift, Tensor):
                part.z.sub_(shift[:, None])
            elif shift != 0:
                part.z.sub_(shift)
            others += part.z.exp_().sum(dim=1)
        positive_exp = [(logit - shift).exp() for logit in positive]
        return _Exponentials(others, positive_exp, others + sum(positive_exp))

    def _softmax(self, terms: tuple[Term, ...], block: slice, own_documents: slice, share: Tensor) -> Tensor:
        """Returns the losses of one softmax over the given terms, (B,), and adds the gradients that follow from them.

        ``share`` (B,) is the weight of each row in the loss.
        """
        parts = [self._logits(term, block, own_documents) for term in terms]
        positive = [self.scale * part.positive for part in parts if part.positive is not None]  # each (B,)
        shift = _largest(parts, positive) if self.shift is None else self.shift
        found = self._exponentiate(parts, positive, shift)
        if self.least_sum > 0:
            vanished = found.total < self.least_sum  # (B,)
            if vanished.any():
                parts.clear()  # before there are other masks
                parts = [self._logits(term, block, own_documents) for term in terms]
                shift = torch.where(vanished, _largest(parts, positive), shift)
                found = self._exponentiate(parts, positive, shift)
        others, positive_exp, total = found.others, found.positive, found.total

        count = torch.full_like(share, len(positive))  # positives of each row
        duplicate_logits = torch.zeros_like(share)
        for part in parts:
            if part.duplicates is not None:
                count += part.duplicates.sum(dim=1)
                duplicate_logits += part.duplicate_logits
        mean_positive = (reduce(torch.add, positive) + duplicate_logits) / count
        # logsumexp less the positive's logit, exact where the others are few or far below
        excess = reduce(torch.logaddexp, [logit - positive[0] for logit in (*positive, others.log() + shift)])
        losses = excess + (positive[0] - mean_positive)
        if not self.grad:
            return losses

        share = share * (self.scale * self.lift)
        coefficient = share / total
        for part in parts:
            if part.duplicates is not None:
                part.z.sub_(part.duplicates * (total / count)[:, None])
            self._accumulate(part, block, own_documents, coefficient[:, None])
        for index, part in enumerate(part for part in parts if part.positive is not None):
            # total * (p - 1 / count) of the positive, without subtracting nearly equal numbers
            rest = others + sum(positive_exp[:index] + positive_exp[index + 1 :])
            d_positive = coefficient * ((count - 1) * positive_exp[index] - rest) / count
            # Where an infinite logit leaves the positive no share, that product is 0 * inf.
            d_positive = torch.where(total.isinf(), share * (positive_exp[index] / total - 1 / count), d_positive)
            self._add_positive(part, block, own_documents, d_positive)
        return losses

    def _accumulate(self, part: _Block, block: slice, own_documents: slice, coefficient: Tensor) -> None:
        """Adds the two gradient products of one term."""
        rows, index, columns = self._sides(part.term, block, own_documents)
        values = columns.values[: part.term.columns]
        if rows.gradient is not None or self.needs.scale:
            gradient = torch.mm(part.z, values).mul_(coefficient)  # [B, columns] @ [columns, D] -> [B, D]
            if rows.gradient is not None:
                rows.gradient[index] += gradient
            if self.needs.scale:  # sum_j dz_j s_j = (sum_j dz_j c_j) . r
                self.scale_gradient += (gradient * rows.values[index]).sum() / self.scale
        if columns.gradient is not None:
            # [columns, B] @ [B, D] -> [columns, D]
            columns.gradient[: part.term.columns].addmm_(part.z.T, rows.values[index] * coefficient)

    def _add_positive(self, part: _Block, block: slice, own_documents: slice, d_positive: Tensor) -> None:
        """Adds the gradient of the positive pairs, row-wise; ``d_positive`` (B,) is that of their similarity."""
        rows, index, columns = self._sides(part.term, block, own_documents)
        partners = self._positive_columns(part.term, block)
        assert part.positive is not None  # the caller looks
        if rows.gradient is not None:
            rows.gradient[index].addcmul_(d_positive[:, None], columns.values[partners])
        if columns.gradient is not None:
            columns.gradient[partners].addcmul_(d_positive[:, None], rows.values[index])
        if self.needs.scale:
            self.scale_gradient += (d_positive * part.positive).sum() / self.scale


def _largest(parts: list[_Block], positive: list[Tensor]) -> Tensor:
    """Returns the largest logit of each row, (B,), as a shift; ``positive`` are those of the positives, each (B,)."""
    largest = reduce(torch.maximum, [part.z.amax(dim=1) for part in parts] + positive)
    # Of an infinite maximum the largest number: exp(x - inf) would make no number of every x.
    return largest.masked_fill(largest == -math.inf, 0).clamp(max=torch.finfo(largest.dtype).max)


def _prefix(matrix: Tensor, dim: int) -> Tensor:
    """Returns the first ``dim`` columns."""
    return matrix if dim == matrix.shape[1] else matrix[:, :dim]


def _diagonal(matrix: Tensor, start: int, block: slice) -> Tensor:
    """Returns a view of the entries (i, start + i) of a matrix that holds the rows of ``block``."""
    begin = start + block.start
    return matrix[:, begin : begin + len(matrix)].diagonal()
