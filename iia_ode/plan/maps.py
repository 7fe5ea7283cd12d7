"""Linear maps of a sample as weights, and constants for each value of a condition."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bounded import Bounded
from ..errors import InputError, MismatchError, PlanError, unknown_name
from ..ode.conditions import named
from ..transforms import kept_property
from .bands import Bands
from .projections import PLACES, Cache, Principal, Projections, place

__all__ = ["LinearMap", "PerCondition", "projections_from"]

_F64 = torch.float64
_LARGEST = 2**26  # components of a sample that a file may name, four images of 3 x 2048 x 2048


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A linear operator on one sample, ``sum_g coefficients[g] * P_g`` over orthogonal projections P_g; a weight of a plan.

    Maps over equal projections may be added, subtracted and multiplied, and commute. In sums, a number k stands for k times
    the identity. Calling a map applies the map.

    Parameters
    ----------
    projections : the decomposition.
    coefficients : a number for each group, [G]; kept in float64 on the host.

    Raises
    ------
    PlanError : the coefficients are not G finite numbers.
    """

    projections: Projections
    coefficients: Tensor

    __array_ufunc__ = None  # a NumPy number on the left must leave the product to __rmul__

    def __post_init__(self) -> None:
        if not isinstance(self.projections, Projections):
            raise PlanError(f"a linear map is over Projections such as Bands, got {type(self.projections).__name__}.")
        c = torch.as_tensor(self.coefficients, dtype=_F64, device="cpu")
        object.__setattr__(self, "coefficients", c)
        if c.shape != (self.projections.count,) or not bool(torch.isfinite(c).all()):
            raise PlanError(
                f"a linear map over {self.projections!r} needs {self.projections.count} finite coefficients, got "
                f"{list(c.shape)}: {c.tolist() if c.numel() < 9 else '...'}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.projections.shape

    def __call__(self, x: Tensor) -> Tensor:
        """The image of x [B, *shape], in its dtype and on its device."""
        return self.projections.combine([(x, self.ready(x))])

    def of_constant(self, constant: Tensor) -> Tensor:
        """The image of a constant, a tensor broadcast to the shape of a sample; float64 [*shape] on the host."""
        whole = constant.to("cpu", _F64).expand(self.shape)
        return self(whole[None])[0]

    def ready(self, like: Tensor) -> tuple[Tensor, ...]:
        """The prepared coefficients in the dtype and on the device of `like`, copied there once."""
        if self.coefficients.requires_grad:  # each backward pass needs a graph of its own
            return tuple(v.to(like) for v in self.projections.prepare(self.coefficients))
        return place(self._placed, self._prepared, like.device, like.dtype)

    @kept_property
    def _prepared(self) -> tuple[Tensor, ...]:
        with torch.inference_mode(False):  # made in the first run, and used by later runs with gradients
            return self.projections.prepare(self.coefficients)

    @kept_property
    def _placed(self) -> Cache:
        return Bounded(PLACES)

    # ---- its size ----------------------------------------------------------------------------------------------------

    @property
    def size(self) -> float:
        """Operator norm: the largest magnitude of a coefficient."""
        return float(self.coefficients.detach().abs().max())

    @property
    def mean(self) -> float:
        """Trace per component; for a multiple of the identity, the factor."""
        return self._average(self.coefficients)

    @property
    def mean_square(self) -> float:
        """Mean square of the image of white noise with unit variance."""
        return self._average(self.coefficients.square())

    def _average(self, values: Tensor) -> float:
        sizes = self.projections.sizes
        return float((values.detach() * sizes).sum() / sizes.sum())

    # ---- arithmetic --------------------------------------------------------------------------------------------------

    def _with(self, coefficients: Tensor) -> LinearMap:
        return LinearMap(self.projections, coefficients)

    def _operand(self, other: Any, verb: str) -> Any:
        """The coefficients of another map, or a number."""
        if isinstance(other, LinearMap):
            if other.projections == self.projections:
                return other.coefficients
            raise PlanError(
                f"cannot {verb} linear maps over {self.projections!r} and {other.projections!r}: only maps over equal "
                "projections have a common decomposition."
            )
        if isinstance(other, numbers.Real):
            return float(other)
        if isinstance(other, Tensor) and not other.ndim:
            return other.to("cpu", _F64)
        what = f"a tensor {list(other.shape)}" if isinstance(other, Tensor) else f"{type(other).__name__} {other!r}"
        raise PlanError(
            f"cannot {verb} a linear map and {what}: linear maps go with numbers, and with maps over equal projections."
        )

    def __add__(self, other: Any) -> LinearMap:
        return self._with(self.coefficients + self._operand(other, "add"))

    __radd__ = __add__

    def __sub__(self, other: Any) -> LinearMap:
        return self._with(self.coefficients - self._operand(other, "subtract"))

    def __rsub__(self, other: Any) -> LinearMap:
        return self._with(self._operand(other, "subtract") - self.coefficients)

    def __mul__(self, other: Any) -> LinearMap:
        if hasattr(other, "weights"):  # a vector, which takes it from here
            return NotImplemented
        return self._with(self.coefficients * self._operand(other, "multiply"))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> LinearMap:
        if isinstance(other, LinearMap):
            raise PlanError("a linear map may be divided by a number only.")
        divisor = self._operand(other, "divide")
        if divisor == 0:
            raise PlanError("a linear map is divided by zero.")
        return self._with(self.coefficients / divisor)

    def __rtruediv__(self, other: Any) -> LinearMap:
        raise PlanError("a linear map may be divided by a number, and nothing by a linear map.")

    def __neg__(self) -> LinearMap:
        return self._with(-self.coefficients)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, LinearMap) and other.projections == self.projections
        return same and torch.equal(self.coefficients, other.coefficients)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((self.projections, self.coefficients.detach().numpy().tobytes()))

    def __repr__(self) -> str:
        return f"map {self.projections!r}"


@dataclass(frozen=True, eq=False)
class PerCondition:
    """A constant for each value of an integer condition of the ODE, such as a class label: the rows of a table.

    A run looks up the rows of a batch once, before the first instruction.

    Parameters
    ----------
    key : name of the condition in ``ode.conditioning``, with dots where it is nested, such as ``"added.label"``: a whole
        number, or an integer tensor [B], [1] or [].
    values : the n possible labels.
    table : constants [n, *sample], each broadcast to the shape of a sample; kept in float64 on the host.

    Raises
    ------
    PlanError : the values are not different whole numbers, or the table has not n finite rows.
    """

    key: str
    values: tuple[int, ...]
    table: Tensor

    def __post_init__(self) -> None:
        table = torch.as_tensor(self.table, dtype=_F64, device="cpu")
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "values", tuple(self.values))
        whole = all(type(v) is int and abs(v) < 2**63 for v in self.values)
        if not isinstance(self.key, str) or not whole or len(set(self.values)) != len(self.values) or not self.values:
            raise PlanError(f"the values of condition {self.key!r} must be different whole numbers: {self.values}.")
        if not table.ndim or len(table) != len(self.values) or not bool(torch.isfinite(table).all()):
            raise PlanError(
                f"constants for {len(self.values)} values of condition {self.key!r} need as many finite rows, got "
                f"{list(table.shape)}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one constant."""
        return tuple(self.table.shape[1:])

    def rows(self, conditioning: Mapping[str, Any], like: Tensor) -> Tensor:
        """The constants of a batch `like` [B, ...]: [B, *shape], or [1, *shape] for one condition.

        Parameters
        ----------
        conditioning : the conditions of the batch by name, such as ``ode.conditioning``.
        like : a state; gives dtype and device of the constants.

        Raises
        ------
        MismatchError : the condition is missing, has no integer labels, or has a label without a row.
        """
        labels = dict(named(conditioning)).get(self.key)
        if isinstance(labels, numbers.Integral) and not isinstance(labels, bool):
            labels = torch.tensor(int(labels), device="cpu")
        kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        if not isinstance(labels, Tensor) or labels.dtype not in kinds or labels.ndim > 1:
            known = sorted(name for name, _ in named(conditioning))
            raise MismatchError(
                f"this plan has constants for each value of the integer condition {self.key!r}, one number per sample; the "
                f"ODE's conditions are {known}{'' if labels is None else ', and that one is of another kind'}."
            )
        labels = labels.reshape(-1)
        if len(labels) not in (1, len(like)):
            raise MismatchError(f"condition {self.key!r} has {len(labels)} values for {len(like)} samples.")
        hits = labels[:, None] == torch.tensor(self.values, dtype=torch.int64, device=labels.device)
        if not bool(hits.any(1).all()):
            missing = sorted({int(v) for v in labels[~hits.any(1)].tolist()})
            raise MismatchError(
                f"this plan has constants for {self.key} = {', '.join(map(str, self.values))}, none for "
                f"{', '.join(map(str, missing))}: make it with samples of these conditions too."
            )
        (table,) = place(self._placed, (self.table,), like.device, like.dtype)
        rows = table[hits.long().argmax(1).to(like.device)]
        return rows.reshape(len(rows), *[1] * (like.ndim - 1 - len(self.shape)), *self.shape)

    @kept_property
    def _placed(self) -> Cache:
        return Bounded(PLACES)

    def _with(self, table: Tensor) -> PerCondition:
        return PerCondition(self.key, self.values, table)

    def __add__(self, other: Any) -> PerCondition:
        if isinstance(other, PerCondition):
            if (other.key, other.values) != (self.key, self.values):
                raise PlanError(f"constants per {self.key!r} and per {other.key!r} with other values cannot be added.")
            other = other.table
        elif isinstance(other, Tensor):
            other = other.to("cpu", _F64)
            if other.ndim > len(self.shape):  # one row for all, not one for each
                return PerCondition(self.key, self.values, _rows(self.table, other.ndim) + other)
        return self._with(self.table + other)

    __radd__ = __add__

    def __mul__(self, factor: Any) -> PerCondition:
        if isinstance(factor, LinearMap):
            return self._with(factor(self.table.expand(len(self.table), *factor.shape)))
        if isinstance(factor, Tensor) and factor.ndim > len(self.shape):
            return self._with(_rows(self.table, factor.ndim) * factor)
        return self._with(self.table * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> PerCondition:
        reciprocal: float | Tensor = 1.0 / divisor
        return self * reciprocal


def _rows(table: Tensor, ndim: int) -> Tensor:
    """A table whose constants have at least `ndim` axes."""
    return table.reshape(len(table), *[1] * (ndim - table.ndim + 1), *table.shape[1:])


def projections_from(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Projections:
    """The projections described by :meth:`~Projections.config` and :meth:`~Projections.tensors`.

    Raises
    ------
    InputError, UnknownNameError : configuration and tensors describe no projections.
    """
    try:
        shape, kind = tuple(config["shape"]), config["kind"]
        if math.prod(shape) > _LARGEST:
            raise InputError(f"maps of samples {list(shape)} have more than {_LARGEST} components.")
        match kind:
            case "bands":
                channels = tensors["channels"] if config["channels"] == "matrix" else config["channels"]
                return Bands(shape, config["bands"], channels, config["axes"])
            case "principal":
                return Principal(tensors["directions"], shape)
    except (KeyError, TypeError) as error:
        raise InputError(f"these are not the configuration and tensors of projections: {error!r}.") from error
    raise unknown_name("kind of projections", kind, ["bands", "principal"])
