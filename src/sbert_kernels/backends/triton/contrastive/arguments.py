"""Groups of kernel parameters that travel together: Triton takes a tuple as one parameter, and reads it by name.

A pointer that is None takes its code out of the kernel when it is compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Side(NamedTuple):
    """The rows or the columns of a term."""

    vectors: Any  # (n, D)
    stride: Any
    inverse_norms: Any  # (K, .) fp32, 1 / norm of each prefix; None: similarities are dot products
    norms_stride: Any  # from one prefix to the next


class Rule(NamedTuple):
    """What turns a similarity of a term into a logit, or excludes it."""

    scale: Any
    scale_tensor: Any  # () fp32; None: it is `scale`
    hardness: Any
    excluded: Any  # the first excluded column of row 0, and how far the next one is from it
    excluded_stride: Any
    exceptions: Any  # the same of the diagonals that are exceptions from HARD_EVERYWHERE
    exceptions_stride: Any
    row_ids: Any  # (rows,) int64, the id of each row's own column
    column_ids: Any  # (columns,) int64
    own_column: Any  # the column that row 0's duplicates are duplicates of; it is none itself


class Guide(NamedTuple):
    """The guide's similarities of the rows and columns of a term, and the threshold above which it excludes."""

    dots: Any  # (rows, columns) fp32; None: no guide
    stride: Any
    row_inverse_norms: Any  # (rows,)
    column_inverse_norms: Any  # (columns,)
    threshold: Any  # (rows,)


class Known(NamedTuple):
    """What is known of each row: at first a constant, and all else once its statistics are complete."""

    shift: Any  # subtracted from all logits while neither maximum nor logsumexp is known; natural units
    logsumexp: Any  # (K, .) fp32, base 2; None: not known yet, so that weights are divided by their sum later
    coefficient: Any  # (K, .): multiplies the weights of a row; None: 1
    positive_share: Any  # (K, .): 1 / number of positives of a row
    stride: Any  # from one prefix to the next


class Sums(NamedTuple):
    """Outputs that sum up a row over the columns of one program, and a column over the rows of one program."""

    maximum: Any  # (splits, K, n): base 2, of the logits; None: a constant is subtracted instead
    total: Any  # (splits, K, n): sum of e
    similarity_total: Any  # (splits, K, n): sum of e s
    duplicate_count: Any  # (splits, K, n): how many columns are duplicates of the positive
    duplicate_similarity_total: Any  # (splits, K, n): the sum of their s
    row_radial: Any  # (splits, K, n): the radial part of the rows' gradient, sum of w (row . column)
    column_radial: Any  # (blocks of rows, K, m): that of the columns' gradient, over one block of rows


NO_SUMS = Sums(*[None] * len(Sums._fields))
NO_GUIDE = Guide(None, 0, None, None, None)
