"""patch() and unpatch(): let a training script that imports sentence-transformers' losses get the fused ones."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any

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
    submodule, and modules that imported them. While patched, the drop-ins also carry the stock classes' import path,
    so that model cards and pickles come out as with stock, and a pickled loss loads where this package is not
    installed. Idempotent. Call it before the script's own ``from sentence_transformers... import SomeLoss``: names and
    subclasses made earlier stay stock, which is warned about. Losses built earlier stay stock, too.

    Returns:
        The :class:`Patch`, whose ``replaced`` maps each name to the stock class that was replaced.
    """
    if _undo:
        return Patch(_in_force[0].replaced)
    packages = [import_module(package) for package in STOCK_LOSSES]
    losses = import_module(".losses", __package__)
    fused_of: dict[type, type] = {}
    missing = []
    for name in losses.__all__:
        fused = getattr(losses, name)
        stock = _stock_base(fused, name)
        if stock is None:
            continue  # a loss that stock does not have
        if any(vars(package).get(name) is stock for package in packages):
            fused_of[stock] = fused
        else:
            missing.append(name)
    ours, early = [], []
    for module, attribute, stock in _bindings(fused_of):
        if _is_within(module.__name__, "sentence_transformers"):
            ours.append((module, attribute, stock))
        elif not _is_within(module.__name__, __package__):
            early.append(f"{module.__name__}.{attribute}")
    for stock in fused_of:
        early += [
            f"{cls.__module__}.{cls.__qualname__}"
            for cls in stock.__subclasses__()
            if not any(_is_within(cls.__module__, package) for package in ("sentence_transformers", __package__))
        ]
    # Before anything is changed: a warning may be an error.
    if missing:
        warnings.warn(f"sbert_kernels.patch() did not find these stock losses: {missing}.", stacklevel=2)
    if early:
        warnings.warn(
            f"sbert_kernels.patch() came after these were made, which stay stock: {sorted(set(early))}. Call it first.",
            stacklevel=2,
        )
    for module, attribute, stock in ours:
        _rebind(module, attribute, fused_of[stock])
    for stock, fused in fused_of.items():
        _rebind(fused, "__module__", stock.__module__)
    _in_force.append(Patch({fused.__name__: stock for stock, fused in fused_of.items()}))
    return _in_force[0]


def unpatch() -> None:
    """Undo :func:`patch`. Losses built while patched stay what they are. Does nothing when not patched.

    A name that something else has rebound in the meantime is left alone.
    """
    while _undo:
        target, attribute, before, now = _undo.pop()
        if getattr(target, attribute, None) is now:
            setattr(target, attribute, before)
    _in_force.clear()


def _stock_base(fused: type, name: str) -> type | None:
    """The stock class that a drop-in stands for: its first base of the same name, if it has one."""
    return next((base for base in fused.__mro__[1:] if base.__name__ == name), None)


def _bindings(classes: dict[type, type]) -> Iterator[tuple[ModuleType, str, type]]:
    """(module, attribute, class) wherever an imported module holds one of the classes, under whatever name."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            # Through __dict__: getattr would wake modules that load lazily.
            for attribute, value in list(vars(module).items()):
                # Not isinstance: some objects compute their __class__, and warn about it.
                if issubclass(type(value), type) and value in classes:
                    yield module, attribute, value


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _rebind(target: Any, attribute: str, value: Any) -> None:
    _undo.append((target, attribute, getattr(target, attribute), value))
    setattr(target, attribute, value)
