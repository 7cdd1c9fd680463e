"""Checks the names, losses and weights of a WeightedLoss: the losses must be able to share one encoding."""

from __future__ import annotations

import inspect
import math
from numbers import Real
from typing import Any

from torch import Tensor, nn

from .._stock import uses_gradient_cache
from ..logs import described
from ..values import dry
from ._components import ADDED
from ._from_embeddings import encoders_of, parameters_of, takes_labels
from ._scale import learnable

# Names that the Trainer itself logs or counts beside the terms of a loss.
TAKEN = frozenset({"loss", "steps", "epoch", "grad_norm", "learning_rate", ADDED})


def check_name(name: Any) -> None:
    """Raises ValueError unless a loss can have this name, in the logs and in a ModuleDict."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"losses must be named by strings that are not empty and hold no '.', got {name!r}.")
    if name in TAKEN or hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name):
        raise ValueError(f"losses cannot have the name {name!r}, which has a meaning to the Trainer or to torch.")


def check_weight(name: str, weight: Any) -> None:
    """Raises TypeError or ValueError unless a weight is a finite number, or a tensor of one that can be learned."""
    if isinstance(weight, Tensor) and weight.numel() == 1:
        if learnable(weight) and not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"the weight of losses[{name!r}] is a tensor that requires a gradient but no nn.Parameter, so that no "
                "optimizer would find it: give nn.Parameter(weight)."
            )
        if dry(weight):
            return
        weight = weight.item()
    if not isinstance(weight, Real):
        raise TypeError(
            f"the weight of losses[{name!r}] must be a number or a tensor of one element, got {described(weight)}."
        )
    if not math.isfinite(weight):
        raise ValueError(f"the weight of losses[{name!r}] must be finite, got {weight}.")


def check_loss(name: str, loss: Any, model: nn.Module, owner: str) -> None:
    """Raises TypeError or ValueError unless a loss needs the embeddings of ``model`` and the labels, and nothing else.

    A loss that reads the tokens too is found out only when it is computed.
    """
    if not isinstance(loss, nn.Module):
        raise TypeError(
            f"losses[{name!r}] must be (loss, weight) with a loss that is an nn.Module, got {described(loss)}."
        )
    what = f"losses[{name!r}] is a {type(loss).__name__}"
    parameters = parameters_of(loss)
    if parameters is None and _wraps(loss, model):
        raise ValueError(f"{what}, which wraps another loss: put it around the {owner} instead.")
    encoders = encoders_of(loss, model)
    others = [key for key in encoders if loss._modules[key] is not model]
    if getattr(loss, "model", model) is not model or (others and others == encoders):
        raise ValueError(f"{what} of another model: build it with the model that {owner} gets.")
    if uses_gradient_cache(loss):
        raise ValueError(
            f"{what}, which keeps a gradient cache of its own: {_without_cache(loss)}, and mini_batch_size= to "
            f"{owner}, which keeps one for all."
        )
    if takes_labels(loss):
        return
    if others:
        raise ValueError(
            f"{what}, which encodes the texts with a second model ({others[0]}); {owner} has the embeddings of one."
        )
    if len(encoders) > 1:
        raise ValueError(f"{what}, which encodes the texts twice ({', '.join(encoders)}); {owner} does it once.")
    if parameters is None and not encoders:
        raise ValueError(
            f"{what}, which has neither compute_loss_from_embeddings(embeddings, labels) nor the model as an "
            "attribute, so that nothing tells what it is for given embeddings."
        )
    # The second of two arguments is what its forward makes of the labels (EmbedDistillLoss: the teacher's embeddings).
    if parameters is not None and not (len(parameters) == 2 and encoders):
        raise ValueError(
            f"{what}, whose compute_loss_from_embeddings takes ({', '.join(parameters)}); wanted are (embeddings, "
            "labels)."
        )


def _wraps(loss: nn.Module, model: nn.Module) -> bool:
    """Returns True if a loss was given another loss of the same model.

    A loss with a gradient cache that has made its inner loss itself does not count.
    """
    children = [(key, child) for key, child in loss._modules.items() if child is not None and child is not model]
    inner = [key for key, child in children if model in child._modules.values()]
    arguments = inspect.signature(type(loss).__init__).parameters
    return any(not uses_gradient_cache(loss) or key in arguments for key in inner)


def _without_cache(loss: nn.Module) -> str:
    """Returns what the user has to do to get the same loss without a gradient cache."""
    options = inspect.signature(type(loss).__init__).parameters
    if "use_mini_batched_version" in options:
        return "give it use_mini_batched_version=False"
    if "mini_batch_size" in options and options["mini_batch_size"].default is None:
        return "leave its mini_batch_size and mini_batch_num_tokens out"
    return f"give {type(loss).__name__.removeprefix('Cached')}, the loss without one, instead"
