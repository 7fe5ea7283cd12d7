"""Memory for results: a bounded thread-safe table, and keys that hold the exact content of a solver or a schedule."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import is_dataclass
from fractions import Fraction
from functools import cached_property
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor

from ..files import bytes_of
from ..schedules import Schedule

__all__ = ["Bounded", "exact_key"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Bounded(Generic[K, V]):
    """A table of at most `size` entries, safe under threads; the entry used longest ago is dropped first.

    A copy or a pickle of a table is an empty table.

    Parameters
    ----------
    size : the largest number of entries.
    weigh, weight : the weight of one value, and the largest sum of weights; a heavier value is not kept. No bound by default.
    """

    def __init__(self, size: int, weigh: Callable[[V], int] | None = None, weight: int = 0) -> None:
        self.size, self.weigh, self.weight = size, weigh, weight
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._total = 0
        self._lock = Lock()

    def get(self, key: K) -> V | None:
        """The value of `key`, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: K, value: V) -> V:
        """Keep `value` under `key` unless the key has a value by now; returns the value that is kept."""
        weight = 0 if self.weigh is None else self.weigh(value)
        with self._lock:
            if key in self._entries:
                return self._entries[key][0]
            if self.weigh is None or weight <= self.weight:
                self._entries[key] = value, weight
                self._total += weight
            while len(self._entries) > self.size or self._total > self.weight:
                self._total -= self._entries.popitem(last=False)[1][1]
            return value

    def clear(self) -> None:
        """Drop every entry."""
        with self._lock:
            self._entries.clear()
            self._total = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> Any:
        return type(self), (self.size, self.weigh, self.weight)


def exact_key(*values: Any) -> Hashable | None:
    """A key that two lists of values share only if their contents are equal bit for bit; None where no such key exists.

    Numbers, texts, tensors (by dtype, shape and bytes), tuples, lists and dicts have a key. Instances of dataclasses, solvers
    and schedules have a key by their class and attributes; the class is compared by identity and not kept alive, and a method
    that is replaced in place leaves the key as before. Functions, modules, arrays of other libraries, tensors that require
    a gradient, and everything that holds one of these, have no key.
    """
    try:
        return tuple(_key(v) for v in values)
    except (_NoKeyError, RecursionError):
        return None


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
    if kind in (tuple, list):
        return kind, tuple(_key(v) for v in value)
    if kind is dict:
        return kind, tuple((_key(k), _key(v)) for k, v in value.items())
    if isinstance(value, Schedule) or (not isinstance(value, type) and (is_dataclass(value) or hasattr(value, "step"))):
        return ref(kind), _key(_state(value))
    raise _NoKeyError


def _tensor_key(value: Tensor) -> Hashable:
    if type(value) is not Tensor or value.requires_grad or value.layout != torch.strided or value.is_meta:
        raise _NoKeyError
    return Tensor, str(value.dtype), tuple(value.shape), hashlib.sha256(bytes_of(value)).digest()


def _state(value: Any) -> Any:
    """The attributes of an instance, without the properties that were computed from other attributes and kept."""
    state = value.__getstate__() or {}
    if not isinstance(state, dict):
        return state
    kept = {name for kind in type(value).__mro__ for name, v in vars(kind).items() if isinstance(v, cached_property)}
    return {name: v for name, v in state.items() if name not in kept}
