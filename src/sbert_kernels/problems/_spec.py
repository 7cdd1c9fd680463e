"""The frozen specification of a problem, and its form in a graph of torch.compile."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

AnySpec = TypeVar("AnySpec", bound="Spec")

# The types that a field may have, by their text: names of options, numbers, and tuples of them.
_NAMES = ("str", "str | None", "tuple[str, ...]")
_NUMBERS = {"int": int, "float": float, "bool": bool, "tuple[int, ...]": int, "tuple[float, ...]": float}


@dataclass(frozen=True)
class Spec:
    """Base of the specifications: options with defaults, each a name (str, None), a number, or a tuple of these.

    An operator in a graph takes a specification as one string and one list of numbers, so that a new option changes no
    signature. The numbers are apart because a compiler may know a number by a symbol only, which has no digits.

    Names are not empty and hold no comma and no semicolon; integers have at most 53 bits.
    """

    def __init_subclass__(cls) -> None:
        """Raise TypeError for a field whose type has no form in a graph."""
        for name, kind in vars(cls).get("__annotations__", {}).items():
            if kind not in _NAMES and kind not in _NUMBERS:
                raise TypeError(f"{cls.__name__}.{name} must be one of {[*_NAMES, *_NUMBERS]}, got {kind!r}.")

    def encoded(self) -> tuple[str, list[float]]:
        """Returns the names, and the lengths of tuples of numbers, in one string; and all the numbers."""
        words: list[str] = []
        numbers: list[float] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in _NAMES:
                words.append("" if value is None else value if isinstance(value, str) else ",".join(value))
            elif isinstance(value, tuple):
                words.append(f"{len(value)}")
                numbers += [float(item) for item in value]
            else:
                words.append("1")
                numbers.append(float(value))
        return ";".join(words), numbers

    @classmethod
    def decoded(cls: type[AnySpec], words: str, numbers: list[float]) -> AnySpec:
        """Returns the specification that :meth:`encoded` gave these for."""
        values: dict[str, Any] = {}
        begin = 0
        for field, word in zip(fields(cls), words.split(";"), strict=True):
            kind = str(field.type)
            if kind in _NAMES:
                names = tuple(word.split(",")) if word else ()
                values[field.name] = names if kind.startswith("tuple") else word or None
            else:
                end = begin + int(word)
                found = tuple(_NUMBERS[kind](number) for number in numbers[begin:end])
                values[field.name] = found if kind.startswith("tuple") else found[0]
                begin = end
        return cls(**values)
