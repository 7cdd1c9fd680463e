"""The form in which the terms of a contrastive problem go to C++: one list of numbers, term after term.

It follows from the fields of :class:`Term` in their order, so that a new field needs no code here:

    bool, int, float     the number
    a name               its place among the names that are allowed
    int or None          a tuple of one number or none
    a tuple              its length, then its numbers

The layout says in words which fields those are. It travels with each call, and `csrc/cpu/contrastive/wire.h`, the one
reader, refuses terms of another layout than its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache, lru_cache

from ...problems.contrastive import DUPLICATES, Term

_NAMES = {"duplicates": DUPLICATES}


@cache
def term_layout() -> str:
    """Returns the fields of a term and their kinds in words, as the C++ side has to know them."""
    kinds = {"bool": "bool", "int": "int", "float": "float", "int | None": "int[]", "tuple[int, ...]": "int[]"}
    return ", ".join(
        f"{field.name} {'|'.join(_NAMES[field.name]) if field.name in _NAMES else kinds[str(field.type)]}"
        for field in fields(Term)
    )


def encoded(terms: Sequence[Term]) -> list[float]:
    """Returns the terms as numbers, in the layout that :func:`term_layout` describes."""
    return [number for term in terms for number in _encoded_term(term)]


@lru_cache(maxsize=256)
def _encoded_term(term: Term) -> tuple[float, ...]:
    """Returns one term as numbers; a training asks for the same ones at every step."""
    return tuple(map(float, _numbers(term)))


def _numbers(term: Term) -> Iterator[float]:
    for field in fields(term):
        value = getattr(term, field.name)
        if field.name in _NAMES:
            yield _NAMES[field.name].index(value)
        elif "None" in str(field.type) or "tuple" in str(field.type):
            items = () if value is None else value if isinstance(value, tuple) else (value,)
            yield len(items)
            yield from items
        else:
            yield value
