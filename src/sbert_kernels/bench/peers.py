"""What the benchmarks of losses share: a model without an encoder, steps of one with an encoder, errors."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from sentence_transformers import util
from torch import Tensor, nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Of a model's loss and gradients in float32: rounding differs by parts in a hundred thousand; what is wrong in a loss
# shows in percents.
PARITY_LIMIT = 1e-3
# The bias of attention's keys cancels in its softmax: all its gradient is rounding, and is compared on the scale of the
# whole gradient's instead of its own. The share is that of float32's roundings where they add up, sqrt(2^-24).
LEAST_SHARE = 2**-12


class Embedded(nn.Sequential):
    """Looks like a SentenceTransformer to the losses; its forward returns embeddings that exist already."""

    max_seq_length = 512

    def __init__(self, key: str, tokenizer: Any = None, dim: int | None = None) -> None:
        super().__init__(nn.Identity())  # the losses look at model[0]
        self.key = key
        self.tokenizer = tokenizer
        self.dim = dim

    def get_embedding_dimension(self) -> int | None:
        """Returns the dimension that the constructor was given."""
        return self.dim

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the embeddings that stand under the key of this model."""
        return {"sentence_embedding": features[self.key]}


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cosines (N, M) of rows."""
    return torch.mm(F.normalize(a, dim=-1), F.normalize(b, dim=-1).T)


def _pair_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cosines (N,) of pairs of rows."""
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)


def without_to_dense(loss: nn.Module) -> nn.Module:
    """Replaces stock's cosines in a loss by the same cosines of dense embeddings, and returns the loss.

    Stock's end in `Tensor.to_dense`, which does nothing to a dense tensor, but under torch.compile of torch 2.11 its
    result has no gradient: "element 0 of tensors does not require grad". torch 2.13 is right again.
    """
    for module in loss.modules():
        stock = getattr(module, "similarity_fct", None)
        if stock not in (util.cos_sim, util.pairwise_cos_sim):
            continue
        half = torch.ones(1, 1, dtype=torch.bfloat16)
        dense = _cosines if stock is util.cos_sim else _pair_cosines
        widens = stock(half, half).dtype == torch.float32  # some versions of stock multiply half precision in float32
        setattr(module, "similarity_fct", _widened(dense) if widens else dense)  # noqa: B010 - not of nn.Module
    return loss


def _widened(similarity: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a similarity of embeddings that are brought to float32 first, unless they are wider."""

    def of_wide(a: Tensor, b: Tensor) -> Tensor:
        a, b = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (a, b))
        return similarity(a, b)

    return of_wide


def compiled(
    loss: nn.Module, make_step: Callable[[nn.Module], Callable[[], Tensor]]
) -> tuple[Callable[[], Tensor] | None, str | None]:
    """Returns the step of stock's loss under torch.compile, compiled already; or None and why there is none."""
    torch.compiler.reset()  # or the shapes of an earlier case would make this one's dynamic
    wrapped = torch.compile(without_to_dense(loss))
    assert isinstance(wrapped, nn.Module)
    step = make_step(wrapped)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks of the compiler on stock's code
            step()
    except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, say
        return None, f"not compiled: {str(error).strip().splitlines()[0]}"
    return step, None


def gradients_of(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Returns the `.grad` of each leaf; raises ValueError if one has none."""
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    if len(gradients) < len(leaves):
        raise ValueError(f"leaves: {len(leaves) - len(gradients)} of {len(leaves)} have no gradient")
    return gradients


def largest_error(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Returns the largest |x - reference| / |reference| in the Euclidean norm; nan if any is."""
    return torch.stack([(x - y).norm() / y.norm() for x, y in zip(found, reference, strict=True)]).max().item()


# -- steps of a model with an encoder ---------------------------------------------------------------------------------


def features_of(model: SentenceTransformer, rows: Sequence[Sequence[str]]) -> list[dict[str, Tensor]]:
    """Returns the tokenized columns of rows of texts, each padded to its longest."""
    return [model.preprocess(list(column)) for column in zip(*rows, strict=True)]


def make_step(
    model: SentenceTransformer,
    losses: Sequence[nn.Module],
    features: Sequence[dict[str, Tensor]],
    labels: Tensor | None = None,
) -> Callable[[], Tensor]:
    """Returns a call that runs forward and backward of the sum of the losses, from gradients that are None.

    It leaves the gradients in the model and returns the detached loss.
    """

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        columns = [dict(column) for column in features]  # models write their outputs into them
        values = [loss(columns, labels) for loss in losses]
        terms = [term for value in values for term in (value.values() if isinstance(value, dict) else (value,))]
        total = reduce(operator.add, terms)  # as the Trainer adds
        total.backward()
        return total.detach()

    return step


def loss_and_gradients(model: SentenceTransformer, step: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Returns the loss of a step of the model, and the gradient of each of its parameters."""
    value = step()
    # A parameter of which the embeddings do not depend (a pooler's) has none, on either side.
    return value, [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]


def gradient_difference(stock: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    """Returns the largest |ours - stock| / |stock| of a parameter's gradient, see `LEAST_SHARE`; nan if any is."""
    norms = torch.stack([gradient.norm() for gradient in stock])
    differences = torch.stack([(x - y).norm() for x, y in zip(ours, stock, strict=True)])
    return (differences / norms.clamp_min(LEAST_SHARE * norms.norm())).max().item()
