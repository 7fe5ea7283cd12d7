"""Whether torch is transforming a computation: by ``torch.func``, or into a graph of ``torch.compile`` or ``torch.export``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch  # torch has no public name for the transforms at work
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

__all__ = [
    "bare",
    "carries_derivative",
    "differentiated",
    "has_tangent",
    "kept_property",
    "may_write",
    "number_of",
    "outside",
    "readable",
    "transformed",
    "vectorized",
]


def transformed() -> bool:
    """Whether new tensors may be those of a transform or of a graph, which nothing may keep beyond this computation."""
    return torch.compiler.is_compiling() or bool(_functorch.get_interpreter_stack())


def differentiated() -> bool:
    """Whether ``grad``, ``vjp``, ``jvp`` or another derivative of ``torch.func`` is at work."""
    return not torch.compiler.is_compiling() and any(name in ("Grad", "Jvp") for name in _at_work())


def vectorized() -> bool:
    """Whether ``torch.func.vmap`` is at work."""
    return not torch.compiler.is_compiling() and "Vmap" in _at_work()


def readable(values: Tensor) -> bool:
    """Whether the program may read numbers of a tensor: not on device ``meta``, under ``vmap``, or in a graph."""
    return not (values.is_meta or torch.compiler.is_compiling() or vectorized())


def may_write() -> bool:
    """Whether a result may be written to memory of an operand: not where ``vmap`` may give the operands other batches."""
    if torch.compiler.is_compiling():
        return False
    stack = _functorch.get_interpreter_stack()
    return not stack or "Vmap" not in _at_work()


def has_tangent(value: object) -> bool:
    """Whether a value carries a derivative of forward differentiation."""
    unpack: Any = forward_ad.unpack_dual  # torch leaves it without types
    return isinstance(value, Tensor) and unpack(value).tangent is not None


def carries_derivative(value: object) -> bool:
    """Whether a derivative by the value is asked for, in either mode of differentiation."""
    if not isinstance(value, Tensor):
        return False
    if has_tangent(value) or (value.requires_grad and torch.is_grad_enabled()):
        return True
    # A derivative outside another one is hidden by the inner one.
    return _functorch.is_functorch_wrapped_tensor(value) and carries_derivative(_functorch.get_unwrapped(value))


def number_of(t: Tensor | float) -> Tensor | float:
    """A time on the host without a derivative as a number, and several in float64; other times unchanged."""
    if not isinstance(t, Tensor) or t.device.type != "cpu" or (t.ndim and t.dtype == torch.float64):
        return t
    if torch.compiler.is_compiling() or vectorized() or carries_derivative(t):
        return t
    return torch.tensor(t.tolist(), dtype=torch.float64, device="cpu") if t.ndim else float(t)


@contextmanager
def outside() -> Iterator[None]:
    """Compute as if no transform of ``torch.func`` were around this call."""
    with temporarily_clear_interpreter_stack() if _at_work() else nullcontext():
        yield


def bare(value: Tensor) -> Tensor:
    """The tensor inside the wrappers of ``torch.func``."""
    while _functorch.is_functorch_wrapped_tensor(value):
        value = _functorch.get_unwrapped(value)
    return value


def _at_work() -> list[str]:
    """Names of the transforms of ``torch.func`` around this call."""
    return [interpreter.key().name for interpreter in _functorch.get_interpreter_stack() or ()]


if TYPE_CHECKING:
    kept_property = cached_property
else:

    class kept_property(cached_property):  # noqa: N801  (a decorator)
        """A ``cached_property`` that keeps no value made inside a transform or a graph; there the value is made anew."""

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is not None and transformed():
                return self.func(instance)
            return super().__get__(instance, owner)
