"""Whether anybody else holds a tensor or its memory."""

from __future__ import annotations

from sys import getrefcount
from typing import Any

import torch
from torch import Tensor

from ..transforms import transformed

__all__ = ["is_unshared"]

_uses: Any = getattr(torch._C, "_storage_Use_Count", None)  # torch has no public name for the references to memory


def is_unshared(value: Tensor) -> bool:
    """Whether the caller's variable is the only way to the memory of a tensor on the host: then nobody else can write to it.

    True only for a variable of a function, passed by its name, of a plain tensor that fills its memory. False where another
    variable, container, view, array, graph or C++ object holds the tensor or the memory, and inside a transform or a graph.
    """
    return (
        _uses is not None
        and not transformed()
        and type(value) is Tensor
        and value.is_cpu
        and value.untyped_storage().nbytes() == value.nbytes
        and _holders(value) == _ALONE
    )


def _holders(value: Any) -> tuple[object, ...]:
    """References to a tensor from Python and from C++, the same for its memory, and whether torch allocated the memory."""
    memory = value.untyped_storage()
    return getrefcount(value), value._use_count(), getrefcount(memory), _uses(memory._cdata), memory.resizable()


def _asked(value: Tensor) -> tuple[object, ...]:
    return _holders(value)


def _alone() -> tuple[object, ...] | None:
    """The answer of :func:`_holders` about a variable that is the only one, asked for as in :func:`is_unshared`."""
    value = torch.empty(1, device="cpu")
    return None if _uses is None else _asked(value)


_ALONE = _alone()
