"""patch() and unpatch(): give a training script that imports sentence-transformers' losses the fused ones."""

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

# The packages that export the stock losses.
STOCK_LOSSES = (
    "sentence_transformers.sentence_transformer.losses",
    "sentence_transformers.sparse_encoder.losses",
)


class Patch(AbstractContextManager["Patch"]):
    """Tells what :func:`patch` has replaced. As a context manager it undoes that at the end of the block.

    Attributes:
        replaced: The stock classes that were replaced, by their names.
    """

    def __init__(self, replaced: dict[str, type]) -> None:
        self.replaced = replaced

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The Patch of a nested patch(), or of one that was undone since, is not in force.
        if _in_force and _in_force[0] is self:
            unpatch()

    def __repr__(self) -> str:
        return f"Patch({', '.join(self.replaced)})"


# (object, attribute, value before, value set) of every rebinding in force, in the order that they were made.
_undo: list[tuple[Any, str, Any, Any]] = []
# The Patch that holds them, or nothing.
_in_force: list[Patch] = []


def patch() -> Patch:
    """Replaces the stock losses of sentence-transformers by the drop-ins of :mod:`sbert_kernels.losses`.

    Their names are rebound in every module of sentence-transformers that holds them: the package, the module that
    defines the class, and modules that have imported it. One line of the log, of level INFO, says how many, and
    :func:`is_patched` says whether. A second call does nothing, but for rebinding what has become stock's again since
    (by ``importlib.reload``).

    Call it before the script's own ``from sentence_transformers... import SomeLoss``. Names, subclasses and losses that
    were made earlier stay stock's; for names and subclasses there is a warning. Call it at the top level of the script,
    not under ``if __name__ == "__main__"``: a new process (``spawn``, joblib, Ray, Lightning's ``ddp_spawn``) imports
    the script again, and without the call its losses are stock's.

    While patched, the drop-ins have the import path of the stock classes. So model cards look as with stock, and a
    pickled loss loads where this package is not installed or not patched: there it is a loss of stock's class, which
    computes the same. A loss that stock's class would compute differently (it has an option that stock does not have,
    a learnable scale, or is a part of a WeightedLoss) is pickled as the class of this package instead.

    Returns:
        The :class:`Patch`, whose ``replaced`` holds the stock classes that were replaced, by their names.

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
    # Before anything is changed, since a warning may be turned into an error.
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
    _in_force.append(Patch({name: stock for fused in drop_ins.values() for name, stock in _stock_class_of(fused)}))
    return _in_force[0]


def is_patched(loss: Any = None) -> bool:
    """Returns True if :func:`patch` is in force, or if a loss is one of this package.

    Args:
        loss: A loss, or the class of one. While patched, a loss of this package prints as stock's class does, so ask
            here. Whether it comes from :func:`patch` or from ``sbert_kernels.losses`` makes no difference. Of a loss
            that wraps another only the wrapper is looked at. None asks about patch() itself: the answer is False also
            if a name of sentence-transformers has become stock's again (by ``importlib.reload``).

    Raises:
        TypeError: It is neither a loss nor a class.
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
    """Undoes :func:`patch`; does nothing if it is not in force. Losses that were built while patched stay as they are.

    A name that something else has rebound in the meantime is left alone.
    """
    while _undo:
        target, attribute, before, now = _undo.pop()
        if getattr(target, attribute, None) is now:
            setattr(target, attribute, before)
    _in_force.clear()


def _drop_ins() -> dict[tuple[str, str], type]:
    """Returns each drop-in by the path of the stock class that it stands for."""
    return {_path(stock): fused for fused in _losses_of_ours() for _, stock in _stock_class_of(fused)}


def _losses_of_ours() -> list[type]:
    """Returns the classes that :mod:`sbert_kernels.losses` itself holds, without those that it takes from stock."""
    losses = import_module(".losses", __package__)  # before stock's, because it checks the version
    return [value for name, value in vars(losses).items() if name in losses.__all__]


def _stock_class_of(fused: type) -> list[tuple[str, type]]:
    """Returns [(name, the stock class that a drop-in stands for)], or [] if stock has no such loss.

    It is the first base of the same name.
    """
    return [(base.__name__, base) for base in fused.__mro__[1:] if base.__name__ == fused.__name__][:1]


def _path(cls: type) -> tuple[str, str]:
    """Returns the module and name of a class. They stay the same when its module is reloaded."""
    return cls.__module__, cls.__name__


def _made_early(held: list[tuple[ModuleType, str, type]], stock: set[type]) -> list[str]:
    """Returns the names and subclasses of stock classes that are neither sentence-transformers' nor of this package."""
    found = {f"{module.__name__}.{attribute}": module.__name__ for module, attribute, cls in held if cls in stock}
    for cls in stock:
        subclasses: list[type] = cls.__subclasses__()
        found |= {f"{subclass.__module__}.{subclass.__qualname__}": subclass.__module__ for subclass in subclasses}
    known = ("sentence_transformers", __package__)
    return sorted(name for name, module in found.items() if not any(_is_within(module, package) for package in known))


def _bindings(paths: Collection[tuple[str, str]]) -> Iterator[tuple[ModuleType, str, type]]:
    """Yields (module, attribute, class) wherever a loaded module holds a stock class of these paths, under any name."""
    names = {name for _, name in paths}
    for module in {id(module): module for module in list(sys.modules.values())}.values():  # some modules have two names
        if isinstance(module, ModuleType):
            # Through __dict__, because getattr would load the submodules of lazy modules.
            for attribute, value in list(vars(module).items()):
                # Not isinstance: some objects compute their __class__, and warn about it.
                if not issubclass(type(value), type) or value.__name__ not in names:
                    continue
                if _path(value) in paths and not _is_drop_in(value):
                    yield module, attribute, value


def _is_drop_in(cls: type) -> bool:
    """Returns True for a class of :mod:`sbert_kernels.losses`, which has stock's path while patched."""
    losses = sys.modules[f"{__package__}.losses"]
    return vars(losses).get(cls.__name__) is cls


def _is_within(name: str, package: str) -> bool:
    """Returns True if a module is a package or lies inside of it."""
    return name == package or name.startswith(package + ".")


def _rebind(target: Any, attribute: str, value: Any) -> None:
    """Sets an attribute, and notes how to undo it."""
    _undo.append((target, attribute, getattr(target, attribute), value))
    setattr(target, attribute, value)
