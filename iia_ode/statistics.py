"""Tables of empirical model statistics for DPM-Solver-v3, and their integrals over a step [Zheng et al. 2023].

With y = x / alpha, lambda the half-log-SNR and eps the model's noise, the flow is dy/dlambda = -l y - f for any l(lambda),
where f = (sigma eps - l x) / alpha. The statistics are tables over lambda of three coefficients per component:

- l, the mean of the diagonal of sigma d(eps)/dx: the remainder f depends little on x;
- s and b, the least-squares fit f' = s f + b along the flow: e^(-int s) f - int e^(-int s) b then changes little.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy  # a subpackage is imported at its first use
import torch
from torch import Tensor

from .errors import InputError, MismatchError
from .files import write_tensors
from .schedules import Schedule
from .schedules.stored import brief

__all__ = ["KIND", "Curve", "Header", "StatisticsTables", "StepIntegrals", "check_file"]

Array = npt.NDArray[np.float64]
KIND = "model statistics"
_TABLES = ("lam", "l", "s", "b")
_WIDTH = 0.5  # of a quadrature panel: there 8 nodes integrate e^(c lambda) to rounding for |c| up to about 8
_CHUNK = 2**22  # numbers in one array of the quadrature


class Curve:
    """A function of lambda through the rows of a table: a cubic spline inside the table, constant beyond its ends.

    With linear interpolation, the kinks of l, s and b would limit the order of a solver to 2.
    """

    def __init__(self, lam: Array, values: Array) -> None:
        self.ends = float(lam[0]), float(lam[-1])
        self.at_ends = values[0], values[-1]
        if len(lam) > 1:
            self._value: Any = scipy.interpolate.CubicSpline(lam, values)
        else:
            self._value = scipy.interpolate.PPoly(values[None], np.array([lam[0], lam[0] + 1.0]))
        self._integral = self._value.antiderivative()
        self._slope = self._value.derivative()

    def __call__(self, lam: Array | float) -> Array:
        """Values, [*lam.shape, ...]."""
        return self._inside(self._value, lam)

    def slope(self, lam: Array | float) -> Array:
        """Derivatives, for lambda inside the table."""
        return self._inside(self._slope, lam)

    def integral(self, lam: Array | float) -> Array:
        """The integral from the table's lower end to lambda."""
        u = np.asarray(lam, dtype=np.float64)
        below, above = np.minimum(u - self.ends[0], 0.0), np.maximum(u - self.ends[1], 0.0)
        beyond = np.multiply.outer(below, self.at_ends[0]) + np.multiply.outer(above, self.at_ends[1])
        out: Array = self._inside(self._integral, u) + beyond
        return out

    def _inside(self, polynomial: Callable[[Any], Array], lam: Array | float) -> Array:
        out: Array = polynomial(np.clip(lam, *self.ends))
        return out


@dataclass(frozen=True)
class Header:
    """The header of a file of statistics."""

    schedule: dict[str, Any] | None
    about: dict[str, Any] = field(default_factory=dict)


def check_file(tensors: Mapping[str, Tensor], header: Header) -> None:
    """Raise InputError unless a file's tensors are the tables of statistics, and its schedule has a type."""
    kinds = {name: value.dtype for name, value in tensors.items()}
    if kinds != dict.fromkeys(_TABLES, torch.float64):
        raise InputError(f"expected float64 tables {', '.join(_TABLES)}, got {kinds}.")
    if header.schedule is not None and not isinstance(header.schedule.get("type"), str):
        raise InputError("the schedule has no type.")


@dataclass(frozen=True)
class StepIntegrals:
    """Integrals of l, s and b over a step [start, end] in lambda; arrays of the statistics' shape.

    Integrals of s and b run from the start; E = exp(-int_lambda^end l + int s) and B = int e^(-int s) b.

    Attributes
    ----------
    keep : exp(-int l) over the step.
    moments : int E u^k dlambda over the step, u linear in lambda from 0 to 1; [n, ...].
    bias : int E B dlambda over the step.
    scales, offsets : e^(-int s) and B at each of the given nodes, where g = scale f - offset.
    """

    keep: Array
    moments: Array
    bias: Array
    scales: tuple[Array, ...]
    offsets: tuple[Array, ...]


@dataclass(frozen=True, eq=False)
class StatisticsTables:
    """Tables of l, s and b over the half-log-SNR, with the integrals that a solver needs of them.

    Two instances are equal, and have one hash, if their tables and schedules are equal.

    Parameters
    ----------
    lam : half-log-SNR, [K], increasing.
    l, s, b : [K, *shape], where shape broadcasts against one sample: the shape of a sample for coefficients per component,
        [C, 1, 1] for one coefficient per channel, [] for one number.
    schedule : ``config()`` of the schedule of the tables; None fits any schedule.
    about : provenance, JSON-ready.

    Raises
    ------
    InputError : the tables do not fit together, are not finite or not in order.
    """

    lam: Tensor
    l: Tensor  # noqa: E741  (the paper's letter)
    s: Tensor
    b: Tensor
    schedule: Mapping[str, Any] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _TABLES:
            given = torch.as_tensor(getattr(self, name), dtype=torch.float64, device="cpu").detach()
            value = given.clone(memory_format=torch.contiguous_format)  # nobody else can change it
            object.__setattr__(self, name, value)
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"the table {name} of model statistics must be finite.")
        if self.lam.ndim != 1 or len(self.lam) < 1 or not bool((self.lam.diff() > 0).all()):
            raise InputError(f"lam must be 1-dimensional and strictly increasing, got shape {list(self.lam.shape)}.")
        shapes = [tuple(v.shape) for v in (self.l, self.s, self.b)]
        if len(set(shapes)) != 1 or shapes[0][:1] != self.lam.shape:
            raise InputError(
                f"l, s and b must have one shape, a row for each of the {len(self.lam)} values of lam, got "
                f"{', '.join(str(list(shape)) for shape in shapes)}."
            )

    @classmethod
    def constant(cls, l: float, s: float, b: float) -> Self:  # noqa: E741
        """Make statistics with the same three numbers for every component and lambda, for any schedule.

        Parameters
        ----------
        l, s, b : the coefficients.

        Returns
        -------
        Statistics of shape [], with a single entry of lambda.
        """
        lam, *rows = (torch.tensor([float(v)], dtype=torch.float64, device="cpu") for v in (0.0, l, s, b))
        return cls(lam, rows[0], rows[1], rows[2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the coefficients at one lambda."""
        return tuple(self.l.shape[1:])

    @cached_property
    def digest(self) -> str:
        """A short hash of the tables and the schedule."""
        body = hashlib.sha256(json.dumps(self.schedule, sort_keys=True).encode())
        for name in _TABLES:
            value = getattr(self, name)
            body.update(f"\n{name} {list(value.shape)}\n".encode() + value.numpy().tobytes())
        return body.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StatisticsTables) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"ModelStatistics {self.digest}, {len(self.lam)} x {list(self.shape)}"

    def check(self, schedule: Schedule) -> None:
        """Raise MismatchError if these statistics belong to another schedule."""
        if self.schedule is not None and dict(self.schedule) != schedule.config():
            raise MismatchError(
                f"<{self!r}> were estimated on the schedule {brief(self.schedule)}, and this one is "
                f"{brief(schedule.config())}: estimate them again, or use the schedule that they were made for."
            )

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: the tables as tensors, schedule and `about` as JSON in its header."""
        header = {"schedule": self.schedule, "about": dict(self.about)}
        return write_tensors(path, KIND, {name: getattr(self, name) for name in _TABLES}, header)

    # ---- integrals over a step -------------------------------------------------------------------------------------------

    @cached_property
    def curves(self) -> tuple[Curve, Curve, Curve]:
        """l, s and b as functions of lambda."""
        lam = self.lam.numpy()
        return Curve(lam, self.l.numpy()), Curve(lam, self.s.numpy()), Curve(lam, self.b.numpy())

    def integrals(self, start: float, end: float, nodes: Sequence[float], n: int) -> StepIntegrals:
        """The integrals of a step of DPM-Solver-v3.

        Parameters
        ----------
        start, end : half-log-SNR lambda at both ends of the step.
        nodes : values of lambda at which the step uses evaluations.
        n : number of moments.

        Returns
        -------
        The integrals, `n` moments of the kernel, and scale and offset of g at each node.
        """
        L, S, _ = self.curves
        whole, S_start = L.integral(end), S.integral(start)
        moments, bias = np.zeros((n, *self.shape)), np.zeros(self.shape)
        for lam, dlam, B in self._panels(start, end):
            u = (lam - start) / (end - start)
            E = np.exp(L.integral(lam) - whole + S.integral(lam) - S_start)
            for k in range(n):
                moments[k] += np.tensordot(dlam * u**k, E, axes=2)
            bias += np.tensordot(dlam, E * B, axes=2)
        return StepIntegrals(
            keep=np.exp(L.integral(start) - whole),
            moments=moments,
            bias=bias,
            scales=tuple(np.exp(S_start - S.integral(np.asarray(nodes)))),
            offsets=tuple(self._offset(start, node) for node in nodes),
        )

    def _panels(self, start: float, end: float) -> Iterator[tuple[Array, Array, Array]]:
        """Panels of quadrature nodes that cover [start, end]: lambda and weights [P, m], B there [P, m, *shape].

        Inside a panel B is the integral of the polynomial through its nodes.
        """
        _, _, within = _panel_rule()
        B = np.zeros(self.shape)
        for lam, dlam, drift in self._drift(start, end):
            width = dlam.sum(axis=1)
            totals = np.einsum("pj,pj...->p...", dlam, drift)
            before = B + np.cumsum(totals, axis=0) - totals
            inside = np.einsum("p,ij,pj...->pi...", width, within, drift)
            yield lam, dlam, before[:, None] + inside
            B = B + totals.sum(axis=0)

    def _offset(self, start: float, end: float) -> Array:
        """B = int e^(-int s) b from start to end."""
        out = np.zeros(self.shape)
        if self._is_biased:
            for _, dlam, drift in self._drift(start, end):
                out = out + np.tensordot(dlam, drift, axes=2)
        return out

    @cached_property
    def _is_biased(self) -> bool:
        """Whether b is not zero everywhere; in data and noise prediction it is zero."""
        return bool(self.b.any())

    def _drift(self, start: float, end: float) -> Iterator[tuple[Array, Array, Array]]:
        """e^(-int s) b at quadrature nodes between start and end, a few panels at a time."""
        _, S, b = self.curves
        S_start, (x, w, _) = S.integral(start), _panel_rule()
        breaks = self._breaks(start, end)
        together = max(1, _CHUNK // (len(x) * max(1, math.prod(self.shape))))
        for i in range(0, len(breaks) - 1, together):
            a, width = breaks[i : i + together + 1][:-1], np.diff(breaks[i : i + together + 1])
            lam, dlam = a[:, None] + np.multiply.outer(width, x), np.multiply.outer(width, w)
            yield lam, dlam, np.exp(S_start - S.integral(lam)) * b(lam)

    def _breaks(self, start: float, end: float) -> Array:
        """Ends of panels from start to end: the table's knots in between, and more points where the knots are far apart."""
        low, high, rows = min(start, end), max(start, end), self.lam.numpy()
        knots = [low, *rows[(rows > low) & (rows < high)].tolist(), high]
        breaks: list[float] = []
        for a, c in pairwise(knots):
            pieces = math.ceil((c - a) / _WIDTH)
            breaks += (a + (c - a) * k / pieces for k in range(pieces))
        breaks.append(high)
        return np.array(breaks if start <= end else breaks[::-1])


@cache
def _panel_rule() -> tuple[Array, Array, Array]:
    """Gauss-Legendre nodes and weights on [0, 1], and the integrals of the nodes' Lagrange polynomials up to each node."""
    x, w = np.polynomial.legendre.leggauss(8)
    n = len(x)
    values = np.polynomial.legendre.legvander(x, n)
    k = np.arange(1, n)
    integrals = np.column_stack([x + 1, (values[:, 2:] - values[:, :-2]) / (2 * k + 1)])
    return (x + 1) / 2, w / 2, integrals @ np.linalg.inv(values[:, :n]) / 2
