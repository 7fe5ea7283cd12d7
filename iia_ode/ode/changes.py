"""Names that a model's own code assigns or changes in place: counters and memory, no part of the model's identity."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType

__all__ = ["changed_names", "globals_of"]

_ENTRIES = ("__call__", "forward", "output")
_STORES = {"STORE_ATTR", "DELETE_ATTR", "STORE_DEREF", "STORE_GLOBAL", "DELETE_GLOBAL", "DELETE_DEREF"}
_ITEMS = {"STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"}
# Methods that change their object; methods of tensors that end with an underscore count too.
_MUTATORS = {
    "append",
    "extend",
    "insert",
    "pop",
    "popitem",
    "popleft",
    "appendleft",
    "update",
    "setdefault",
    "clear",
} | {
    "add",
    "discard",
    "remove",
    "sort",
    "reverse",
}


def changed_names(codes: Iterable[CodeType], kinds: Iterable[type]) -> frozenset[str]:
    """Find the variables and attributes that the code of a model changes.

    Parameters
    ----------
    codes : the code of the model's functions.
    kinds : classes of the model's objects. The search begins with the methods ``__call__``, ``forward`` and ``output`` of the
        classes, and follows every method whose name appears in code already found.

    Returns
    -------
    The names of the changed variables and attributes.
    """
    found = [_effects(code) for code in codes]
    methods: dict[str, list[CodeType]] = {}
    for kind in dict.fromkeys(kinds):
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] in ("builtins", "torch"):
                continue
            for name, value in vars(base).items():
                if isinstance(value, FunctionType):
                    methods.setdefault(name, []).append(value.__code__)
    waiting = {*_ENTRIES, *(name for effects in found for name in effects.read)}
    known: set[str] = set()
    while waiting:
        known |= waiting
        fresh = [_effects(code) for name in waiting for code in methods.get(name, ())]
        found += fresh
        waiting = {name for effects in fresh for name in effects.read} - known
    return frozenset(name for effects in found for name in effects.changed)


def globals_of(code: CodeType) -> tuple[str, ...]:
    """Names of the global variables that a function's code reads, in the order of first use."""
    return _effects(code).globals


@dataclass(frozen=True)
class _Effects:
    """The effects of a function's code on names, inner functions included.

    Attributes
    ----------
    changed : names of assigned variables and attributes, and names of objects changed in place.
    read : names of attributes and global variables.
    globals : names of global variables, in order.
    """

    changed: frozenset[str]
    read: frozenset[str]
    globals: tuple[str, ...]


@lru_cache(maxsize=4096)
def _effects(code: CodeType) -> _Effects:
    changed: set[str] = set()
    read: set[str] = set()
    used: dict[str, None] = {}
    for part in _nested(code):
        read |= set(part.co_names)
        ends: dict[tuple[int | None, int | None], dict[int, str]] = {}  # loads by their start: end to name
        for ins in dis.get_instructions(part):
            place = ins.positions
            start = (place.lineno, place.col_offset) if place else (None, None)
            end = (place.end_col_offset if place else None) or 0
            loads = ends.setdefault(start, {})
            if ins.opname in _STORES:
                changed.add(str(ins.argval))
            elif ins.opname in _ITEMS:
                changed |= {loads[max(loads)]} if loads else set()
            elif ins.opname.startswith("LOAD_") and isinstance(ins.argval, str) and "CONST" not in ins.opname:
                name = ins.argval
                if ins.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                    used[name] = None
                if loads and (name in _MUTATORS or (name.endswith("_") and not name.endswith("__"))):
                    changed.add(loads[max(loads)])
                else:
                    loads[end] = name
    return _Effects(frozenset(changed), frozenset(read), tuple(used))


def _nested(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and the code of all functions inside."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _nested(const)
