"""patch() and unpatch(): let a training script that imports sentence-transformers' losses get the fused ones."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

STOCK_LOSSES = (
    "sentence_transformers.sentence_transformer.losses",
    "sentence_transformers.sparse_encoder.losses",
)


class Patch(AbstractContextManager["Patch"]):
    """What :func:`patch` replaced: stock class by stock name. As a context manager, undone at the end of the block."""

    def __init__(self, replaced: dict[str, type]) -> None:
        self.replaced = replaced

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Not that of a nested patch(), nor of one that was undone since: they are not in force.
        if _in_force and _in_force[0] is self:
            unpatch()

    def __repr__(self) -> str:
        return f"Patch({', '.join(self.replaced)})"


# (object, attribute, value before, value set) of every rebinding in force, in the order made; and the Patch of them.
_undo: list[tuple[Any, str, Any, Any]] = []
_in_force: list[Patch] = []


def patch() -> Patch:
    """Rebind the stock losses of sentence-transformers to the drop-ins of :mod:`sbert_kernels.losses`.

    The names are rebound in every module of sentence-transformers that holds them: the package, the defining
    submodule, and modules that imported them. One line of the log, of level INFO, says how many; so does
    :func:`is_patched`. Called again it does nothing, except that it rebinds what is stock's again since (by
    ``importlib.reload``). Call it before the script's own ``from sentence_transformers... import SomeLoss``: names and
    subclasses made earlier stay stock, which is warned about. Losses built earlier stay stock, too.

    Call it at the top level of the script, not under ``if __name__ == "__main__"``: a process that is started anew
    (``spawn``, joblib, Ray, Lightning's ``ddp_spawn``) imports the script again, and without the call its losses are
    stock's.

    While patched, the drop-ins carry the stock classes' import path, so that model cards come out as with stock, and a
    pickled loss loads where this package is not installed, or not patched; it is then a loss of stock's, which computes
    the same. A loss that stock's class would not compute the same (an option that stock does not have, a learnable
    scale, a part of a WeightedLoss) is pickled as the class of this package, and stays that everywhere.

    Returns:
        The :class:`Patch`, whose ``replaced`` maps each name to the stock class that was replaced.

    Raises:
        ImportError: sentence-transformers is not installed, or too old.
    """
    drop_ins = _drop_ins()
    packages = [import_module(package) for package in STOCK_LOSSES]
    if _in_force:
        missing = {path for path, fused in drop_ins.items() if fused.__name__ not in _in_force[0].replaced}
    else:
        exported = [value for package in packages for value in vars(package).values() if isinstance(value, type)]
        missing = set(drop_ins) - {_path(cls) for cls in exported}
    drop_ins = {path: fused for path, fused in drop_ins.items() if path not in missing}
    held = list(_bindings(drop_ins))
    ours = [binding for binding in held if _is_within(binding[0].__name__, "sentence_transformers")]
    if _in_force and not ours:
        return Patch(_in_force[0].replaced)
    replaced = {cls for _, _, cls in ours}
    early = _made_early(held, replaced)
    # Before anything is changed: a warning may be an error.
    if missing and not _in_force:
        names = sorted(name for _, name in missing)
        warnings.warn(f"sbert_kernels.patch() did not find these stock losses: {names}.", stacklevel=2)
    if early:
        warnings.warn(
            f"sbert_kernels.patch() came after these were made, which stay stock: {early}. Call it first.", stacklevel=2
        )
    for module, attribute, stock in ours:
        _rebind(module, attribute, drop_ins[_path(stock)])
    logger.info(
        "sbert_kernels.patch() replaced %d losses of sentence-transformers%s, under %d names.",
        len({_path(cls) for cls in replaced}),
        ", which had become stock's again" if _in_force else "",
        len(ours),
    )
    if _in_force:
        return Patch(_in_force[0].replaced)
    for (home, _), fused in drop_ins.items():
        _rebind(fused, "__module__", home)
    _in_force.append(Patch({fused.__name__: _stock_base(fused) for fused in drop_ins.values()}))
    return _in_force[0]


def is_patched(loss: Any = None) -> bool:
    """Whether :func:`patch` is in force, or whether a loss is one of the fused ones.

    Args:
        loss: A loss, or the class of one. A fused one prints as stock's class while patched, so this is how to tell;
            it may have come by :func:`patch` or by an import from ``sbert_kernels.losses``. Of a loss that wraps
            another, only the wrapper is looked at. None asks about the names that sentence-transformers holds now:
            false as well if one of them is stock's again (``importlib.reload``), until patch() is called again.

    Raises:
        TypeError: Neither a loss nor a class.
    """
    if loss is None:
        return bool(_in_force) and not any(
            _is_within(module.__name__, "sentence_transformers")
            for module, _, _ in _bindings({_path(stock) for stock in _in_force[0].replaced.values()})
        )
    from torch import nn

    cls = loss if isinstance(loss, type) else type(loss)
    if not issubclass(cls, nn.Module):
        raise TypeError(f"loss must be a loss (an nn.Module) or the class of one, got {loss!r}.")
    return issubclass(cls, tuple(_losses_of_ours()))


def unpatch() -> None:
    """Undo :func:`patch`. Losses built while patched stay what they are. Does nothing when not patched.

    A name that something else has rebound in the meantime is left alone.
    """
    while _undo:
        target, attribute, before, now = _undo.pop()
        if getattr(target, attribute, None) is now:
            setattr(target, attribute, before)
    _in_force.clear()


def _drop_ins() -> dict[tuple[str, str], type]:
    """Each drop-in by the path of the stock class that it stands for."""
    return {_path(_stock_base(fused)): fused for fused in _losses_of_ours() if _stock_base(fused) is not None}


def _losses_of_ours() -> list[type]:
    """The classes of :mod:`sbert_kernels.losses`, without those of stock's that it hands out beside them."""
    losses = import_module(".losses", __package__)  # before stock's: it says which version is wanted
    return [value for name, value in vars(losses).items() if name in losses.__all__]


def _stock_base(fused: type) -> type | None:
    """The stock class that a drop-in stands for, its first base of the same name; None if stock has no such loss."""
    return next((base for base in fused.__mro__[1:] if base.__name__ == fused.__name__), None)


def _path(cls: type) -> tuple[str, str]:
    """Where a class is defined, which stays the same when its module is reloaded; a drop-in takes its stock's."""
    return cls.__module__, cls.__name__


def _made_early(held: list[tuple[ModuleType, str, type]], stock: set[type]) -> list[str]:
    """Names and subclasses of these stock classes that are neither sentence-transformers' nor ours."""
    found = {f"{module.__name__}.{attribute}": module.__name__ for module, attribute, cls in held if cls in stock}
    found |= {f"{sub.__module__}.{sub.__qualname__}": sub.__module__ for cls in stock for sub in cls.__subclasses__()}
    known = ("sentence_transformers", __package__)
    return sorted(name for name, module in found.items() if not any(_is_within(module, package) for package in known))


def _bindings(paths: Collection[tuple[str, str]]) -> Iterator[tuple[ModuleType, str, type]]:
    """(module, attribute, class) wherever an imported module holds a stock class of these paths, under any name."""
    names = {name for _, name in paths}
    for module in {id(module): module for module in list(sys.modules.values())}.values():  # some have two names
        if isinstance(module, ModuleType):
            # Through __dict__: getattr would wake modules that load lazily.
            for attribute, value in list(vars(module).items()):
                # Not isinstance: some objects compute their __class__, and warn about it.
                if not issubclass(type(value), type) or value.__name__ not in names:
                    continue
                if _path(value) in paths and not _is_drop_in(value):
                    yield module, attribute, value


def _is_drop_in(cls: type) -> bool:
    losses = sys.modules[f"{__package__}.losses"]
    return vars(losses).get(cls.__name__) is cls


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _rebind(target: Any, attribute: str, value: Any) -> None:
    _undo.append((target, attribute, getattr(target, attribute), value))
    setattr(target, attribute, value)
