"""Comparisons of lists of tensors: a loss and its gradients, against what they should be."""

from __future__ import annotations

import sentence_transformers
import torch
from packaging.version import Version
from torch import Tensor


def assert_close(ours: list[Tensor], exact: list[Tensor], replayed: bool = False) -> None:
    """Fails unless both lists are equal to float64: to 1e-9 of the largest entry of each tensor.

    With ``replayed``, the exact gradients went through stock's gradient cache, which rounds them to float32 before
    sentence-transformers 6.2; the limit is then 1e-6.
    """
    rtol = 1e-6 if replayed and Version(sentence_transformers.__version__) < Version("6.2") else 1e-9
    assert len(ours) == len(exact)
    for value, wanted in zip(ours, exact, strict=True):
        assert value.shape == wanted.shape
        assert (value - wanted).abs().max() <= rtol * wanted.abs().max() + rtol * 1e-6


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> Tensor:
    """Returns |x - exact| / |exact| of each tensor, by Euclidean norms, as a vector."""
    return torch.stack([(x - y).norm() / y.norm() for x, y in zip(found, exact, strict=True)])
