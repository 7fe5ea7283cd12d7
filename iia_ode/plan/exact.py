"""Keys with the exact content of solvers, schedules and grids."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Hashable
from dataclasses import is_dataclass
from fractions import Fraction
from functools import cached_property
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from ..files import bytes_of
from ..schedules import Schedule

__all__ = ["exact_key", "is_lasting"]


def exact_key(*values: Any) -> Hashable | None:
    """A key of the values; two lists have equal keys only if their contents are equal bit for bit. None if a value has no key.

    Numbers, texts, tensors (by dtype, shape and bytes), tuples, lists and dicts have a key. Instances of dataclasses, solvers
    and schedules have a key by class and attributes; the class is compared by identity and not kept alive. The key of a class
    outside of this package holds its attributes, the code of its methods, and the plain values that the methods read from
    their modules: a class that was changed has another key. Functions, modules, arrays of other libraries, tensors with a
    gradient, and objects with any of these inside, have no key.
    """
    try:
        return tuple(_key(v) for v in values)
    except (_NoKeyError, RecursionError):
        return None


_OWN = __name__.partition(".")[0]
# Attributes of a class that no step reads, and methods that act before a step.
_OF_CLASSES = """__module__ __doc__ __dict__ __weakref__ __annotations__ __abstractmethods__ _abc_impl __parameters__
    __orig_bases__ __slots__ __slotnames__ __dataclass_fields__ __dataclass_params__ __match_args__"""
_BEFORE = "__hash__ __init__ __post_init__ __repr__ __str__ __eq__ __setattr__ __delattr__ __replace__"
_UNREAD = frozenset(f"{_OF_CLASSES} {_BEFORE}".split())


class _NoKeyError(Exception):
    """A value has no exact key."""


def _key(value: Any) -> Hashable:
    kind = type(value)
    if value is None or kind in (bool, int, str, bytes, Fraction):
        return kind, value
    if kind is float:
        return kind, struct.pack("<d", value)  # tells the two zeros apart, and finds NaN again
    if kind in (torch.dtype, torch.device):
        return kind, str(value)
    if isinstance(value, Tensor):
        return _tensor_key(value)
    if kind in (tuple, list) and all(type(v) is float for v in value):  # a grid
        return kind, struct.pack(f"<{len(value)}d", *value)
    if kind in (tuple, list):
        return kind, tuple(_key(v) for v in value)
    if kind is dict:
        return kind, tuple((_key(k), _key(v)) for k, v in value.items())
    if isinstance(value, Schedule) or (not isinstance(value, type) and (is_dataclass(value) or hasattr(value, "step"))):
        return _instance_key(value, kind)
    raise _NoKeyError


def is_lasting(value: Any) -> bool:
    """Whether a value has had a key, and never has another one."""
    known = _KNOWN.get(id(value))
    return known is not None and known[0]() is value


def _instance_key(value: Any, kind: type) -> Hashable:
    known = _KNOWN.get(id(value))
    if known is not None and known[0]() is value:
        return known[1]
    state = _state(value)
    key = ref(kind), _class_key(kind), _key(state)
    # A frozen value of this package, whose attributes are numbers and texts, never has another key.
    if kind.__module__.partition(".")[0] == _OWN and all(isinstance(v, _LASTING) for v in dict(state).values()):
        place = id(value)
        _KNOWN[place] = ref(value, lambda _: _KNOWN.pop(place, None)), key
    return key


_LASTING = (bool, int, float, str, type(None))
_KNOWN: dict[int, tuple[ref[Any], Hashable]] = {}
"""Keys of values in memory, by place."""


def _class_key(kind: type) -> Hashable:
    """The attributes and the code of a class outside of this package, which a notebook may change."""
    bases = (
        base for base in kind.__mro__ if base.__module__.partition(".")[0] not in (_OWN, "builtins", "abc", "typing")
    )
    own = ((name, v) for base in bases for name, v in vars(base).items() if name not in _UNREAD)
    return tuple((name, _function_key(v) if isinstance(v, FunctionType) else _attribute_key(v)) for name, v in own)


def _attribute_key(value: Any) -> Hashable:
    if isinstance(value, property | cached_property | staticmethod | classmethod):
        function = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", None)
        return type(value), _function_key(function) if isinstance(function, FunctionType) else None
    return _key(value)


def _function_key(function: FunctionType) -> Hashable:
    code, names = function.__code__, function.__globals__
    read = tuple(
        (n, _key(names[n])) for n in code.co_names if isinstance(names.get(n), bool | int | float | str | tuple)
    )
    cells = tuple(_held_key(cell.cell_contents) for cell in function.__closure__ or ())
    return code, _key(function.__defaults__), _key(function.__kwdefaults__), cells, read


def _held_key(value: Any) -> Hashable:
    # `super()` holds the class, and the methods of a dataclass hold types.
    return ref(value) if isinstance(value, type) else _key(value)


def _tensor_key(value: Tensor) -> Hashable:
    if type(value) is not Tensor or value.requires_grad or value.layout != torch.strided or value.is_meta:
        raise _NoKeyError
    return Tensor, str(value.dtype), tuple(value.shape), hashlib.sha256(bytes_of(value)).digest()


def _state(value: Any) -> Any:
    """The attributes of an instance, without cached properties."""
    state = value.__getstate__() or {}
    if not isinstance(state, dict):
        return state
    kept = _cached_names(type(value))
    return {name: v for name, v in state.items() if name not in kept}


def _cached_names(kind: type) -> set[str]:
    """Names of the cached properties of a class; memoized for the classes of this package, which do not change."""
    names = _CACHED_NAMES.get(kind)
    if names is None:
        names = {name for base in kind.__mro__ for name, v in vars(base).items() if isinstance(v, cached_property)}
        if kind.__module__.partition(".")[0] == _OWN:
            _CACHED_NAMES[kind] = names
    return names


_CACHED_NAMES: WeakKeyDictionary[type, set[str]] = WeakKeyDictionary()
