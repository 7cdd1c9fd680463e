"""How a drop-in is pickled: under stock's name only where stock's class computes the same.

Under ``patch()`` the drop-ins carry stock's import path, so that what is pickled loads where this package is not
installed, and in a process that has not called ``patch()``; it is then a loss of stock's. With an option that stock
does not have, that loss would compute something else and say nothing. Such a loss is rebuilt by :func:`rebuild` as what
it is here, which takes this package. Copies are made the same way.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import nn

from ._learned import LearnsValues


class DropIn(LearnsValues):
    """A base of every loss that stands for one of stock's."""

    # A part of a loss that is ours, and that would compute otherwise with a part of stock's.
    _is_part_of_ours: bool = False

    def new_options(self) -> dict[str, Any]:
        """The options that stock does not have, where they are set."""
        return {}

    def exceeds_stock(self) -> bool:
        """Whether stock's class would compute something else from these attributes, or a part's."""
        # Stock trains a learned scale, too, but not in its gradient cache, nor alike on all ranks.
        return bool(self.new_options() or self.learned_values()) or any(
            isinstance(part, DropIn) and part.exceeds_stock() for part in self.children()
        )

    def __reduce_ex__(self, protocol: int) -> Any:
        reduced = super().__reduce_ex__(max(protocol, 2))
        cls = type(self)
        if not self._is_part_of_ours and not self.exceeds_stock():
            return reduced
        keep_ours(self.children())
        if reduced[:2] != (copyreg.__newobj__, (cls,)):  # a subclass has its own way
            return reduced
        drop_in = next(base.__name__ for base in cls.__mro__ if _named(base.__name__) is base)
        return (rebuild, (drop_in, None if _named(cls.__name__) is cls else cls), *reduced[2:])


def keep_ours(parts: Iterable[nn.Module]) -> None:
    """Have the drop-ins among the parts of a loss pickled as what they are, with or without new options."""
    for part in parts:
        if isinstance(part, DropIn):
            part._is_part_of_ours = True


def rebuild(drop_in: str, subclass: type | None) -> Any:
    """An empty loss of the class of that name in ``sbert_kernels.losses``, or of a subclass of it, to be filled.

    Raises:
        TypeError: The class was made from stock's in this process.
    """
    cls = subclass or _named(drop_in)
    if not issubclass(cls, _named(drop_in)):
        raise TypeError(
            f"{cls.__module__}.{cls.__qualname__} was pickled with options that only sbert_kernels.losses.{drop_in} "
            "has, and is here a subclass of sentence-transformers' class, which would drop them: call "
            "sbert_kernels.patch() in this process, too, before the class is defined."
        )
    return cls.__new__(cls)


def _named(name: str) -> Any:
    return vars(import_module(__package__)).get(name)
