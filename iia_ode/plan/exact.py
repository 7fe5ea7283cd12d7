"""Keys with the exact content of solvers, schedules and grids."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Hashable
from dataclasses import is_dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..files import bytes_of
from ..schedules import Schedule

__all__ = ["exact_key"]


def exact_key(*values: Any) -> Hashable | None:
    """A key of the values; two lists have equal keys only if their contents are equal bit for bit. None if a value has no key.

    Numbers, texts, tensors (by dtype, shape and bytes), tuples, lists and dicts have a key. Instances of dataclasses, solvers
    and schedules have a key by class and attributes; the class is compared by identity and not kept alive, and replacing a
    method of the class leaves the key as before. Functions, modules, arrays of other libraries, tensors with a gradient, and
    objects with any of these inside, have no key.
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
    """The attributes of an instance, without cached properties."""
    state = value.__getstate__() or {}
    if not isinstance(state, dict):
        return state
    kept = {name for kind in type(value).__mro__ for name, v in vars(kind).items() if isinstance(v, cached_property)}
    return {name: v for name, v in state.items() if name not in kept}
