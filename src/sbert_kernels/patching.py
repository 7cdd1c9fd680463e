"""patch() and unpatch(): let a training script that imports sentence-transformers' losses get the fused ones."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any

STOCK_LOSSES = "sentence_transformers.sentence_transformer.losses"


class Patch(AbstractContextManager["Patch"]):
    """What :func:`patch` replaced: stock class by stock name. As a context manager, undone at the end of the block."""

    def __init__(self, replaced: dict[str, type], owner: bool) -> None:
        self.replaced = replaced
        # A nested patch() must not undo the one around it.
        self._owner = owner

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owner:
            unpatch()

    def __repr__(self) -> str:
        return f"Patch({', '.join(self.replaced)})"


# (object, attribute, value before) of every rebinding in force, in the order made; and what the Patch reports.
_undo: list[tuple[Any, str, Any]] = []
_replaced: dict[str, type] = {}


def patch() -> Patch:
    """Rebind the stock losses of sentence-transformers to the drop-ins of :mod:`sbert_kernels.losses`.

    The names are rebound in every module of sentence-transformers that holds them: the package, the defining
    submodule, and modules that imported them. While patched, the drop-ins also carry the stock classes' import path,
    so that model cards and pickles come out as with stock, and a pickled loss loads where this package is not
    installed. Idempotent. Call it before the script's own ``from sentence_transformers... import SomeLoss``: names
    bound earlier stay stock, which is warned about.

    Returns:
        The :class:`Patch`, whose ``replaced`` maps each name to the stock class that was replaced.
    """
    if _undo:
        return Patch(dict(_replaced), owner=False)
    import_module(STOCK_LOSSES)
    losses = import_module(".losses", __package__)
    missing, early = [], []
    for name in losses.__all__:
        fused = getattr(losses, name)
        stock = _stock_base(fused, name)
        if stock is None or getattr(sys.modules[STOCK_LOSSES], name, None) is not stock:
            missing.append(name)
            continue
        _replaced[name] = stock
        for module in _modules_holding(name, stock):
            if _is_within(module, "sentence_transformers"):
                _rebind(module, name, fused)
            elif not _is_within(module, __package__):
                early.append(f"{module.__name__}.{name}")
        _rebind(fused, "__module__", stock.__module__)
    if missing:
        warnings.warn(f"sbert_kernels.patch() did not find these stock losses: {missing}.", stacklevel=2)
    if early:
        warnings.warn(
            f"sbert_kernels.patch() came after these imports, which stay stock: {early}. Call it first.", stacklevel=2
        )
    return Patch(dict(_replaced), owner=True)


def unpatch() -> None:
    """Undo :func:`patch` exactly. Losses built while patched stay what they are. Does nothing when not patched."""
    while _undo:
        target, attribute, value = _undo.pop()
        setattr(target, attribute, value)
    _replaced.clear()


def _stock_base(fused: type, name: str) -> type | None:
    """The stock class that a drop-in stands for: its first base of the same name."""
    return next((base for base in fused.__mro__[1:] if base.__name__ == name), None)


def _modules_holding(name: str, value: Any) -> Iterator[ModuleType]:
    for module in list(sys.modules.values()):
        # Through __dict__: getattr would wake modules that load lazily.
        if isinstance(module, ModuleType) and vars(module).get(name) is value:
            yield module


def _is_within(module: ModuleType, package: str) -> bool:
    return module.__name__ == package or module.__name__.startswith(package + ".")


def _rebind(target: Any, attribute: str, value: Any) -> None:
    _undo.append((target, attribute, getattr(target, attribute)))
    setattr(target, attribute, value)
