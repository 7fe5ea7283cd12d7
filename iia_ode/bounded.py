"""A bounded, thread-safe table of results."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, Generic, TypeVar

__all__ = ["Bounded"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Bounded(Generic[K, V]):
    """A thread-safe table of at most `size` entries. A full table drops the entry whose last use is the oldest.

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
        """Store `value` under `key` unless the key has a value already. Return the stored value."""
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

    def drop(self, key: K) -> None:
        """Remove `key` if it has a value."""
        with self._lock:
            self._total -= self._entries.pop(key, (None, 0))[1]

    def clear(self) -> None:
        """Drop every entry."""
        with self._lock:
            self._entries.clear()
            self._total = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> Any:
        return type(self), (self.size, self.weigh, self.weight)
