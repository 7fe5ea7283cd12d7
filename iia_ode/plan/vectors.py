"""Symbolic vectors: what a solver's ``step`` computes with while a plan is traced."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import PlanError

__all__ = ["Vector", "Weight", "vector_indices", "weight_size"]

Weight: TypeAlias = float | Tensor
"""A number, or a tensor that broadcasts against one sample."""


@dataclass(frozen=True, eq=False)
class Vector:
    """A linear combination of a plan's vectors, plus an optional constant: ``sum_j weights[j] * v_j + constant``.

    Supports ``+``, ``-`` and multiplication and division by a number (or by a tensor that broadcasts against one sample):
    all that a solver with fixed coefficients needs. Immutable.
    """

    weights: dict[int, Weight]
    constant: Tensor | None = None

    __array_ufunc__ = None  # a NumPy number on the left must leave the product to __rmul__

    def __add__(self, other: Any) -> Vector:
        if isinstance(other, Tensor):
            return Vector(self.weights, _sum(self.constant, other.detach().double()))
        if not isinstance(other, Vector):
            if isinstance(other, numbers.Real) and other == 0:  # the start of Python's sum()
                return self
            raise _not_linear("add", other)
        merged = dict(self.weights)
        for index, weight in other.weights.items():
            total = merged[index] + weight if index in merged else weight
            merged[index] = total
            if not isinstance(total, Tensor) and total == 0.0:
                del merged[index]
        return Vector(merged, _sum(self.constant, other.constant))

    __radd__ = __add__

    def __mul__(self, factor: Any) -> Vector:
        k = _weight(factor)
        if not isinstance(k, Tensor) and k == 0.0:
            return Vector({})
        return Vector({i: w * k for i, w in self.weights.items()}, None if self.constant is None else self.constant * k)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Vector:
        k = _weight(divisor)
        if not isinstance(k, Tensor) and k == 0.0:
            raise PlanError("a step divides a vector by zero: check for repeated times, or for ode.is_data(s).")
        return Vector({i: w / k for i, w in self.weights.items()}, None if self.constant is None else self.constant / k)

    def __neg__(self) -> Vector:
        return self * -1.0

    def __sub__(self, other: Any) -> Vector:
        if isinstance(other, Vector | Tensor):
            return self + -1.0 * other
        if isinstance(other, numbers.Real) and other == 0:
            return self
        raise _not_linear("subtract", other)

    def __rsub__(self, other: Any) -> Vector:
        return (-self).__add__(other)

    def __pos__(self) -> Vector:
        return self

    def _refuse(self, *_: Any) -> Any:
        raise PlanError(f"powers, comparisons, indexing and functions of a vector are not linear: {_RULE}.")

    __pow__ = __rpow__ = __rtruediv__ = __floordiv__ = __mod__ = __matmul__ = __rmatmul__ = _refuse
    __abs__ = __bool__ = __float__ = __len__ = __getitem__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take part in products and sums with a tensor on the left; refuse every other function of torch."""
        name = getattr(function, "__name__", str(function)).strip("_")
        if len(args) == 2 and name in ("mul", "rmul", "add", "radd", "sub") and isinstance(args[1], Vector):
            left, right = args
            return right * left if "mul" in name else right + left if "add" in name else -right + left
        raise PlanError(f"torch's {name!r} cannot be applied to a vector: {_RULE}.")

    def __getattr__(self, name: str) -> Any:
        # Only reached for attributes that do not exist; without this, `x.shape` in a step fails without a reason.
        raise AttributeError(f"a symbolic vector has no {name!r}: {_RULE}.")

    @property
    def index(self) -> int | None:
        """The vector that this is, if it is just one with weight 1; else None."""
        if self.constant is not None or len(self.weights) != 1:
            return None
        ((index, weight),) = self.weights.items()
        return index if not isinstance(weight, Tensor) and weight == 1.0 else None

    def __repr__(self) -> str:
        return format_terms(tuple(self.weights.items()), self.constant)


_RULE = (
    "a step is traced with symbolic vectors; it may add states and evaluations and scale them by numbers that depend on "
    "the schedule and the grid, not on the data"
)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _weight(value: Any) -> Weight:
    if isinstance(value, Tensor):
        if value.ndim or value.requires_grad:
            return value.double()
        return float(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise _not_linear("multiply", value)


def _not_linear(verb: str, other: object) -> PlanError:
    return PlanError(
        f"a step cannot {verb} a vector and {type(other).__name__} {other!r}: vectors may be added to vectors, and "
        "multiplied by real numbers."
    )


def weight_size(weight: Weight) -> float:
    """Magnitude of a weight, the largest where it is a tensor."""
    return float(weight.abs().max()) if isinstance(weight, Tensor) else abs(weight)


def format_terms(terms: tuple[tuple[int, Weight], ...], constant: Tensor | None) -> str:
    """``0.5 v0 - 1.25 v3 + constant``, readably."""
    parts = []
    for index, weight in terms:
        if isinstance(weight, Tensor):
            parts.append(f"+ tensor{list(weight.shape)} v{index}")
        else:
            size = "" if abs(weight) == 1.0 else f"{abs(weight):.6g} "
            parts.append(f"{'-' if weight < 0 else '+'} {size}v{index}")
    if constant is not None:
        parts.append(f"+ constant{list(constant.shape)}")
    return " ".join(parts).removeprefix("+ ") or "0"


def vector_indices(value: Any) -> set[int]:
    """Indices of all vectors that `value` refers to: a vector, an evaluation, or tuples and mappings of such.

    Raises
    ------
    PlanError : anything else with state in it, such as a list: what a step remembers must be immutable.
    """
    found: set[int] = set()

    def visit(item: Any) -> None:
        if isinstance(item, Vector):
            found.update(item.weights)
        elif isinstance(item, tuple):
            for part in item:
                visit(part)
        elif hasattr(item, "__dataclass_fields__"):
            for name in item.__dataclass_fields__:
                visit(getattr(item, name))
        elif isinstance(item, dict | list | set):
            raise PlanError(
                f"a step returned a memory with a {type(item).__name__} in it; use tuples or frozen dataclasses, "
                "so that no step can change what another one remembers."
            )

    visit(value)
    return found


def combine(
    terms: tuple[tuple[int, Weight], ...], constant: Tensor | None, read: Callable[[int], Tensor], like: Tensor
) -> Tensor:
    """The tensor of a linear combination, in the dtype and on the device of `like`; no vector is changed."""
    if not terms:
        return torch.zeros_like(like) if constant is None else constant.to(like).expand_as(like).clone()
    (index, weight), *rest = terms
    total, fresh = read(index), False  # `fresh`: a tensor of our own, which may be written to
    if isinstance(weight, Tensor):
        total, fresh = weight.to(like) * total, True
    elif weight != 1.0:
        total, fresh = total * weight, True
    for index, weight in rest:
        if isinstance(weight, Tensor):
            total = total + weight.to(like) * read(index)
        elif fresh:
            total = total.add_(read(index), alpha=weight)
        else:
            total = torch.add(total, read(index), alpha=weight)
        fresh = True
    return total if constant is None else total + constant.to(like)
