"""Symbolic vectors, the states of a solver's ``step`` while a plan is traced, and weighted sums of tensors."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import PlanError
from ..transforms import may_write, transformed
from .maps import LinearMap, PerCondition
from .projections import Projections

__all__ = [
    "Constant",
    "Sum",
    "Vector",
    "Weight",
    "combine",
    "format_terms",
    "is_number",
    "sum_of_numbers",
    "vector_indices",
    "weight_mean",
    "weight_mean_square",
    "weight_size",
]

Weight: TypeAlias = float | Tensor | LinearMap
"""A number, a tensor broadcast over the batch, or a linear map of one sample."""

Constant: TypeAlias = Tensor | PerCondition
"""A tensor broadcast over the batch, or a tensor for each value of a condition."""


@dataclass(frozen=True, eq=False)
class Vector:
    """A linear combination of a plan's vectors, plus an optional constant: ``sum_j weights[j] * v_j + constant``.

    Supports ``+``, ``-``, multiplication and division by a number or by a tensor broadcast over the batch, and multiplication
    by a linear map: the arithmetic of solvers with fixed coefficients. Immutable.
    """

    weights: dict[int, Any]  # Weight
    constant: Any = None  # Constant | None

    __array_ufunc__ = None  # a NumPy number on the left must leave the product to __rmul__

    def __add__(self, other: Any) -> Vector:
        if isinstance(other, np.ndarray) and other.dtype.kind in "iuf":
            other = torch.from_numpy(other.astype(np.float64))
        if isinstance(other, Tensor):
            return Vector(self.weights, _sum(self.constant, other.detach().cpu().double()))
        if isinstance(other, PerCondition):
            return Vector(self.weights, _sum(self.constant, other))
        if not isinstance(other, Vector):
            if isinstance(other, numbers.Real) and other == 0:  # the start of Python's sum()
                return self
            raise _not_linear("add", other)
        merged = dict(self.weights)
        for index, weight in other.weights.items():
            total = merged[index] + weight if index in merged else weight
            merged[index] = total
            if is_number(total) and total == 0.0:
                del merged[index]
        return Vector(merged, _sum(self.constant, other.constant))

    __radd__ = __add__

    def __mul__(self, factor: Any) -> Vector:
        k = _weight(factor)
        if is_number(k) and k == 0.0:
            return Vector({})
        return Vector({i: w * k for i, w in self.weights.items()}, _scaled(self.constant, k))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Vector:
        k = _weight(divisor)
        if isinstance(k, LinearMap):
            raise PlanError("a step divides a vector by a linear map: multiply by the map with inverse coefficients.")
        if is_number(k) and k == 0.0:
            raise PlanError("a step divides a vector by zero: check for repeated times, or for ode.is_data(s).")
        return Vector({i: w / k for i, w in self.weights.items()}, None if self.constant is None else self.constant / k)

    def __neg__(self) -> Vector:
        return self * -1.0

    def __sub__(self, other: Any) -> Vector:
        if isinstance(other, Vector | Tensor | PerCondition | np.ndarray):
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
        """Allow products and sums with a tensor on the left; refuse every other function of torch."""
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
        """The index j of a combination ``1 * v_j`` without constant, else None."""
        if self.constant is not None or len(self.weights) != 1:
            return None
        ((index, weight),) = self.weights.items()
        return index if not isinstance(weight, Tensor | LinearMap) and weight == 1.0 else None

    def __repr__(self) -> str:
        return format_terms(tuple(self.weights.items()), self.constant)


_RULE = (
    "a step is traced with symbolic vectors; it may add states and evaluations and scale them by numbers that depend on "
    "the schedule and the grid, not on the data"
)


def _sum(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _scaled(constant: Any, k: Weight) -> Any:
    if constant is None:
        return None
    return k.of_constant(constant) if isinstance(k, LinearMap) and isinstance(constant, Tensor) else constant * k


def _weight(value: Any) -> Weight:
    if isinstance(value, float):  # nearly always, and asking for numbers in general takes far longer
        return float(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        value = torch.from_numpy(value.astype(np.float64))
    if isinstance(value, Tensor):
        if value.ndim or value.requires_grad:
            return value.cpu().double()
        return float(value)
    if isinstance(value, LinearMap):
        return value
    if isinstance(value, numbers.Real):
        return float(value)
    raise _not_linear("multiply", value)


def _not_linear(verb: str, other: object) -> PlanError:
    return PlanError(
        f"a step cannot {verb} a vector and {type(other).__name__} {other!r}: vectors may be added to vectors, and "
        "multiplied by real numbers and linear maps."
    )


def is_number(weight: Weight) -> bool:
    """Whether a weight is a number, and neither a tensor nor a linear map."""
    return not isinstance(weight, Tensor | LinearMap)


def weight_size(weight: Weight | Constant) -> float:
    """Magnitude of a weight or constant; the largest magnitude among several numbers."""
    if isinstance(weight, LinearMap):
        return weight.size
    weight = weight.table if isinstance(weight, PerCondition) else weight
    return float(weight.abs().max()) if isinstance(weight, Tensor) else abs(weight)


def weight_mean(weight: Weight) -> float:
    """A weight as a number: the mean over components of a tensor, the trace per component of a linear map."""
    if isinstance(weight, LinearMap):
        return weight.mean
    return float(weight.mean()) if isinstance(weight, Tensor) else weight


def weight_mean_square(weight: Weight) -> float:
    """Mean square of white noise of unit variance after multiplication by a weight."""
    if isinstance(weight, LinearMap):
        return weight.mean_square
    return float(weight.square().mean()) if isinstance(weight, Tensor) else weight * weight


def format_terms(terms: tuple[tuple[int, Weight], ...], constant: Constant | None) -> str:
    """``0.5 v0 - 1.25 v3 + constant``, readably."""
    parts = []
    for index, weight in terms:
        if isinstance(weight, LinearMap):
            parts.append(f"+ {weight!r} v{index}")
        elif isinstance(weight, Tensor):
            parts.append(f"+ tensor{list(weight.shape)} v{index}")
        else:
            size = "" if abs(weight) == 1.0 else f"{abs(weight):.6g} "
            parts.append(f"{'-' if weight < 0 else '+'} {size}v{index}")
    if constant is not None:
        by = f" per {constant.key}" if isinstance(constant, PerCondition) else ""
        parts.append(f"+ constant{list(constant.shape)}{by}")
    return " ".join(parts).removeprefix("+ ") or "0"


def vector_indices(value: Any) -> set[int]:
    """Indices of all vectors in `value`: a vector, an evaluation, or tuples and frozen dataclasses of vectors.

    Raises
    ------
    PlanError : a list, dict or set is in `value`: the memory of a step must be immutable.
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


@dataclass(frozen=True, eq=False)
class Sum:
    """A linear combination of a plan's vectors, with its tensors in the dtype and on the device of a run.

    Attributes
    ----------
    terms : pairs (index, weight) with numbers or tensors as weights, in order.
    mapped : for each decomposition, pairs (index, prepared coefficients) of the linear maps over the decomposition.
    constant : a tensor, a `PerCondition` before the look-up of rows, or None.
    numbers : of a sum of numbers times vectors without a constant, the sum as a function of the vectors; else None. The same
        bits as the general loop, in a third of its time between the operations of torch.
    """

    terms: tuple[tuple[int, float | Tensor], ...]
    mapped: tuple[tuple[Projections, tuple[tuple[int, tuple[Tensor, ...]], ...]], ...]
    constant: Constant | None
    numbers: Callable[[Mapping[int, Tensor]], Tensor] | None

    @classmethod
    def of(cls, terms: tuple[tuple[int, Weight], ...], constant: Constant | None, like: Tensor) -> Sum:
        """The sum of `terms` and `constant` for vectors with the dtype and on the device of `like`."""
        plain: list[tuple[int, float | Tensor]] = []
        mapped: dict[Projections, list[tuple[int, tuple[Tensor, ...]]]] = {}
        for index, weight in terms:
            if isinstance(weight, LinearMap):
                mapped.setdefault(weight.projections, []).append((index, weight.ready(like)))
            else:
                plain.append((index, weight.to(like) if isinstance(weight, Tensor) else weight))
        placed = constant.to(like) if isinstance(constant, Tensor) else constant
        numbers_alone = bool(plain) and not mapped and constant is None and all(is_number(w) for _, w in plain)
        numbers = sum_of_numbers(plain) if numbers_alone else None
        return cls(tuple(plain), tuple(zip(mapped, map(tuple, mapped.values()), strict=True)), placed, numbers)

    def __call__(self, values: Mapping[int, Tensor], like: Tensor, writes: bool) -> Tensor:
        """The value of the sum; no vector is changed.

        Parameters
        ----------
        values : the vectors [B, ...] by index.
        like : a state [B, ...], for shape, dtype and device.
        writes : the answer of :func:`~iia_ode.transforms.may_write`, asked once for many sums.
        """
        if self.numbers is not None and writes:
            return self.numbers(values)
        if isinstance(self.constant, PerCondition):
            raise PlanError(
                f"this plan has a constant per {self.constant.key!r}: run it as plan.run(ode, x), which looks it up."
            )
        total, fresh = None, False  # `fresh`: a tensor of our own, which may be written to
        for index, weight in self.terms:
            if isinstance(weight, Tensor):
                product = weight * values[index]
                total, fresh = product if total is None else total + product, True
            elif total is None:
                total, fresh = (values[index], False) if weight == 1.0 else (values[index] * weight, True)
            elif fresh and writes:
                total = total.add_(values[index], alpha=weight)
            else:
                total, fresh = torch.add(total, values[index], alpha=weight), True
        for projections, parts in self.mapped:  # the maps of one decomposition together: one transform back
            image = projections.combine([(values[index], prepared) for index, prepared in parts])
            total = image if total is None else total + image
        if total is None:
            return torch.zeros_like(like) if self.constant is None else self.constant.expand_as(like).clone()
        return total if self.constant is None else total + self.constant

    @property
    def copies(self) -> int | None:
        """The index of the vector that the sum returns without change, or None."""
        index, weight = self.terms[0] if self.numbers is not None and len(self.terms) == 1 else (0, None)
        return index if weight == 1.0 else None


def sum_of_numbers(
    terms: Sequence[tuple[int, Any]], like: Tensor | None = None
) -> Callable[[Mapping[int, Tensor]], Tensor]:
    """The sum of vectors with numbers as weights, as a function of the vectors; with `like`, a faster function."""
    (index, weight), *others = terms
    whole = weight == 1.0
    if type(like) is Tensor and like.is_cpu and not transformed():
        # The same bits, and torch makes no tensor of the number at each call.
        weight = torch.tensor(weight, dtype=like.dtype, device="cpu")
    if not others:
        return (lambda values: values[index]) if whole else (lambda values: values[index] * weight)
    (second, alpha), *rest = others

    def two(values: Mapping[int, Tensor]) -> Tensor:
        if whole:
            return torch.add(values[index], values[second], alpha=alpha)
        scaled: Tensor = values[index] * weight
        return scaled.add_(values[second], alpha=alpha)

    def many(values: Mapping[int, Tensor]) -> Tensor:
        total = two(values)
        for j, w in rest:
            total.add_(values[j], alpha=w)
        return total

    return many if rest else two


def combine(
    terms: tuple[tuple[int, Weight], ...], constant: Constant | None, read: Callable[[int], Tensor], like: Tensor
) -> Tensor:
    """The tensor of a linear combination, in the dtype and on the device of `like`; no vector is changed."""
    values = {index: read(index) for index, _ in terms}
    return Sum.of(terms, constant, like)(values, like, may_write())
