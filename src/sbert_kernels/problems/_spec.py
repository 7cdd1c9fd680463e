"""The frozen specification of a problem, and its form in a graph of torch.compile."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

Self = TypeVar("Self", bound="Spec")


@dataclass(frozen=True)
class Spec:
    """Base of the specifications: options with defaults, each a name (str, None), a number, or a tuple of these.

    An operator in a graph takes a specification as one string and one list of numbers, so that a new option changes no
    signature. The numbers are apart because a compiler may know a number by a symbol only, which has no digits.
    """

    def encoded(self) -> tuple[str, list[float]]:
        """Returns the names, and the lengths of tuples of numbers, in one string; and all the numbers."""
        words: list[str] = []
        numbers: list[float] = []
        for field in fields(self):
            value = getattr(self, field.name)
            kind = str(field.type)
            if kind.startswith("tuple[str"):
                words.append(",".join(value))
            elif kind.startswith("tuple["):
                words.append(f"{len(value)}")
                numbers += [float(item) for item in value]
            elif kind.startswith("str"):
                words.append("" if value is None else value)
            else:
                words.append("1")
                numbers.append(float(value))
        return ";".join(words), numbers

    @classmethod
    def decoded(cls: type[Self], words: str, numbers: list[float]) -> Self:
        """Returns the specification that :meth:`encoded` gave these for."""
        values: dict[str, Any] = {}
        left = list(numbers)
        for field, word in zip(fields(cls), words.split(";"), strict=True):
            kind = str(field.type)
            if kind.startswith("tuple[str"):
                values[field.name] = tuple(word.split(",")) if word else ()
            elif kind.startswith("str"):
                values[field.name] = word or None
            else:
                read = int if "int" in kind else float
                found = tuple(read(number) for number in left[: int(word)])
                left = left[int(word) :]
                values[field.name] = found if kind.startswith("tuple[") else found[0]
        return cls(**values)
