"""Decides under which class a drop-in is pickled: under stock's only if stock's class computes the same.

Under ``patch()`` the drop-ins carry stock's import path. So a pickled loss also loads where this package is not
installed, or in a process that has not called ``patch()``; there it is a loss of stock's class. That class would ignore
an option that stock does not have. A loss with such an option is therefore pickled as the class of this package, which
:func:`rebuild` makes again, and loads only where this package is installed. Copies are made the same way.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable
from importlib import import_module
from typing import Any, SupportsIndex

from torch import nn

from ._learned import LearnsValues


class DropIn(LearnsValues):
    """Is the first base of every loss that stands for one of stock's."""

    # True for a part of a loss that stock does not have: such a loss needs its parts to be of this package too.
    _is_part_of_ours: bool = False

    def new_options(self) -> dict[str, Any]:
        """Returns the options that are set and that stock does not have, by name."""
        return {}

    def exceeds_stock(self) -> bool:
        """Returns True if stock's class would compute something else from the attributes of this loss or of a part."""
        # Stock trains a learned scale too, but neither in its gradient cache nor alike on all ranks.
        return bool(self.new_options() or self.learned_values()) or any(
            isinstance(part, DropIn) and part.exceeds_stock() for part in self.children()
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # Before protocol 2 Python has no way to make an object without calling its __init__.
        reduced = super().__reduce_ex__(max(protocol.__index__(), 2))
        cls = type(self)
        if not self._is_part_of_ours and not self.exceeds_stock():
            return reduced
        keep_ours(self.children())
        plain = getattr(copyreg, "__newobj__")  # noqa: B009  what object.__reduce_ex__ returns; no stub knows it
        if isinstance(reduced, str) or reduced[:2] != (plain, (cls,)):  # a subclass has its own way
            return reduced
        drop_in = next(base.__name__ for base in cls.__mro__ if _named(base.__name__) is base)
        return (rebuild, (drop_in, None if _named(cls.__name__) is cls else cls), *reduced[2:])


def keep_ours(parts: Iterable[nn.Module]) -> None:
    """Marks the drop-ins among the parts of a loss, so that they are pickled as classes of this package."""
    for part in parts:
        if isinstance(part, DropIn):
            part._is_part_of_ours = True


def rebuild(drop_in: str, subclass: type | None) -> Any:
    """Returns an empty loss, whose attributes pickle fills in.

    Args:
        drop_in: The name of its class in ``sbert_kernels.losses``.
        subclass: The user's subclass of that class, if the loss is of one.

    Raises:
        TypeError: ``subclass`` was made from stock's class in this process.
    """
    cls: Any = subclass or _named(drop_in)
    if not issubclass(cls, _named(drop_in)):
        raise TypeError(
            f"{cls.__module__}.{cls.__qualname__} was pickled with options that only sbert_kernels.losses.{drop_in} "
            "has, and is here a subclass of sentence-transformers' class, which would drop them: call "
            "sbert_kernels.patch() in this process, too, before the class is defined."
        )
    return cls.__new__(cls)


def _named(name: str) -> Any:
    """Returns what ``sbert_kernels.losses`` itself defines or imports under a name, or None."""
    return vars(import_module(__package__)).get(name)
