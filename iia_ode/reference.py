"""High-accuracy solutions of the probability-flow ODE by torchdiffeq, in log-SNR time, with dense output.

With a = alpha times the size of the data, the scaled state w = x / sqrt(a^2 + sigma^2) and the time u = asinh(a / sigma), the
flow is

    dw/du = D(x, t) / size - tanh(u) w.

Near the data, u is log-SNR time up to a constant. At the noise end, u stays finite, so schedules with alpha = 0 there need no
special case. The form needs no derivative of the schedule. The scaled state is of order 1 for data of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._torchdiffeq import integrate, is_adaptive, method_names
from .checks import check_whole
from .errors import GridError, InputError, NonFiniteError, unknown_name
from .ode import ProbabilityFlowODE
from .ode.distributed import agree
from .ode.hosted import in_float64
from .plan import check_grid, check_ode, check_states
from .plan.checks import factors_at
from .schedules import Schedule
from .schedules.levels import check_floor, known_level, lowest_level
from .sizes import size_of_data

__all__ = ["Trajectory", "from_data", "solve", "trajectory"]

_F64 = torch.float64
_ENDS = 0.05  # share of a dense output at each end in which knots are closer
_FLOOR = 1e-6  # default of sigma_min, relative to the size of the data


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A dense solution. ``trajectory(t)`` is the state at time t, by Hermite interpolation in log-SNR time.

    The polynomial of degree 11 has the states and slopes of the six nearest knots.

    Attributes
    ----------
    schedule : noise schedule of the ODE.
    knots : times u = asinh(size alpha/sigma) of the stored points, float64 [K], strictly monotone.
    states, slopes : scaled states w and their derivatives dw/du at the knots, float64 [K, B, ...].
    data : state at sigma = 0, float64 [B, ...], if the trajectory ends or starts at the data; else None.
    evaluations : number of batched model evaluations spent.
    size : root mean square of the data, the unit of the clock.
    """

    schedule: Schedule
    knots: Tensor
    states: Tensor
    slopes: Tensor
    data: Tensor | None
    evaluations: int
    size: float = 1.0

    @property
    def final(self) -> Tensor:
        """State at the end of the trajectory, float64 [B, ...]."""
        last = float(self.knots[-1])
        if self.data is not None and last > float(self.knots[0]):
            return self.data
        clock = _Clock(self.schedule, self.size)
        return self.states[-1] * clock.scale(clock.time(last))

    def __call__(self, t: float) -> Tensor:
        """Interpolate the state at time t.

        Parameters
        ----------
        t : time between the trajectory's start and end.

        Returns
        -------
        The state, float64 [B, ...].

        Raises
        ------
        GridError : t lies outside the trajectory.
        """
        clock = _Clock(self.schedule, self.size)
        u, first, last = clock(t), float(self.knots[0]), float(self.knots[-1])
        low, high = min(first, last), max(first, last)
        slack = 1e-9 * max(1.0, high)
        if self.data is not None and u > high:
            # Below the floor eps is taken as constant: x is a straight line in (alpha, sigma) from that knot to the data.
            floor = clock.time(high)
            a, s = self.schedule.alpha(floor), self.schedule.sigma(floor)
            eps = (self.states[-1 if last > first else 0] * clock.scale(floor) - a * self.data) / s
            return self.schedule.alpha(t) * self.data + self.schedule.sigma(t) * eps
        if not low - slack <= u <= high + slack:
            raise GridError(f"t = {t:g} lies outside the trajectory: give a time between its start and its end.")
        near = self._near(u)
        return self._combined(near, _hermite(self.knots[near].tolist(), u)) * clock.scale(t)

    def data_estimate(self, t: float) -> Tensor:
        """The model's data estimate on the trajectory at time t, [B, ...], interpolated by a polynomial of degree 5.

        Beyond the first and the last knot, the estimate is that of the knot.
        """
        clock = _Clock(self.schedule, self.size)
        first, last = float(self.knots[0]), float(self.knots[-1])
        u = min(max(clock(t), min(first, last)), max(first, last))
        near = self._near(u)
        knots = self.knots[near].tolist()
        basis = [math.prod((u - v) / (own - v) for v in knots if v != own) for own in knots]
        weights = [b * math.tanh(own) for b, own in zip(basis, knots, strict=True)]
        return self.size * self._combined(near, (weights, basis))

    def _near(self, u: float) -> slice:
        """The six knots nearest to u."""
        sign, count = 1.0 if self.knots[-1] > self.knots[0] else -1.0, len(self.knots)
        k = int(torch.searchsorted(sign * self.knots, sign * u))
        k = min(max(k - 3, 0), max(count - 6, 0))
        return slice(k, min(k + 6, count))

    def _combined(self, near: slice, weights: Sequence[Sequence[float]]) -> Tensor:
        """The combination of states and slopes at some knots."""
        terms = zip((*weights[0], *weights[1]), (*self.states[near], *self.slopes[near]), strict=True)
        start = torch.zeros_like(self.states[0], dtype=torch.promote_types(self.states.dtype, torch.float32))
        return sum((weight * term.to(start.dtype) for weight, term in terms), start=start)


def _hermite(knots: list[float], u: float) -> tuple[list[float], list[float]]:
    """Weights of values and of derivatives at the knots in the Hermite polynomial at u."""
    values, slopes = [], []
    for j, own in enumerate(knots):
        others = [v for i, v in enumerate(knots) if i != j]
        basis = math.prod((u - v) / (own - v) for v in others) ** 2
        slope = sum(1 / (own - v) for v in others)  # derivative at `own` of the product
        values.append((1 - 2 * (u - own) * slope) * basis)
        slopes.append((u - own) * basis)
    return values, slopes


@torch.no_grad()
def trajectory(
    ode: ProbabilityFlowODE,
    x: Tensor,
    t_start: float,
    t_end: float,
    *,
    points: int = 120,
    rtol: float = 1e-9,
    atol: float = 1e-9,
    sigma_min: float | None = None,
    method: str = "dopri8",
) -> Trajectory:
    """Integrate the ODE from `t_start` to `t_end` to high accuracy, with dense output. Gradients are switched off.

    Parameters
    ----------
    ode : ODE to solve. The model computes in its own dtype, the integration in float64.
    x : state at `t_start`, [B, ...].
    t_start, t_end : start and end times, in either direction. Either may be the data, and either may have alpha = 0. Where
        `t_start` is the data, the output of the model must determine the noise there, as a velocity does.
    points : number of knots of the dense output, at least 2, nearly equidistant in u. The integrator ends a step at each knot.
    rtol, atol : relative and absolute tolerance of the integrator for the scaled state w, which is of order 1 for data of any
        size. The sample with the largest error meets the tolerances. The rounding of a float32 model exceeds tolerances below
        about 1e-6.
    sigma_min : noise level sigma/alpha at which the integration stops if `t_end` is the data, or starts if `t_start` is. The
        model's data estimate then leads to the final state, and a step of DDIM leads from the data to the first state; both
        have an error of O(sigma_min^2). By default a millionth of the root mean square of the data (estimated from a few
        samples), or the lowest level that the model knows if this level is higher. For a network without ``known_levels``,
        give the smallest level of its training.
    method : any adaptive method of torchdiffeq.

    Returns
    -------
    A :class:`Trajectory` from `t_start` to `t_end`.

    Raises
    ------
    InputError : the ODE, the state or `points` is not usable, or `method` has fixed steps.
    GridError : the times or `sigma_min` are not usable.
    UnknownNameError : torchdiffeq has no such method.
    NonFiniteError : the model or the integration is not finite, or the step size vanished.
    """
    points = check_whole("points, the number of knots of a trajectory,", points, least=2, such_as=120)
    times = _times(ode, x, t_start, t_end, sigma_min, method)
    ode, x = in_float64(ode, x)
    with ode.counting() as spent:
        clock, (first, last) = _clock(ode, x, times, sigma_min)
        knots = _knots(clock(first), clock(last), points)
        start = x if first == times[0] else from_data(ode, x, times[0], first)
        states = _integrate(ode, clock, start, first, knots, rtol, atol, method)
        flow = _flow(ode, clock)
        slopes = torch.stack([flow(u, w) for u, w in zip(knots, states, strict=True)])
        data = x if first != times[0] else None
        if last != times[1]:
            data = _data(ode, clock, states[-1], last, times[1])
    return Trajectory(ode.schedule, knots, states, slopes, data, spent.evaluations, clock.size)


@torch.no_grad()
def solve(
    ode: ProbabilityFlowODE,
    x: Tensor,
    t_start: float,
    t_end: float,
    *,
    rtol: float = 1e-9,
    atol: float = 1e-9,
    sigma_min: float | None = None,
    method: str = "dopri8",
) -> Tensor:
    """Integrate the ODE from `t_start` to `t_end` to high accuracy, without dense output. Gradients are switched off.

    Parameters
    ----------
    ode, x, t_start, t_end, rtol, atol, sigma_min, method : as for :func:`trajectory`.

    Returns
    -------
    The state at `t_end`, float64 [B, ...]; on the host where the device of x has no float64.

    Raises
    ------
    InputError, GridError, UnknownNameError, NonFiniteError : as for :func:`trajectory`.
    """
    times = _times(ode, x, t_start, t_end, sigma_min, method)
    ode, x = in_float64(ode, x)
    if sigma_min is None and ode.is_data(times[1]) and _is_lowest(ode.schedule, times[0]):
        return ode.data(x, times[0]) * ode.schedule.alpha(times[1])
    clock, (first, last) = _clock(ode, x, times, sigma_min)
    knots = torch.tensor([clock(first), clock(last)], dtype=_F64, device="cpu")
    start = x if first == times[0] else from_data(ode, x, times[0], first)
    w = _integrate(ode, clock, start, first, knots, rtol, atol, method)[-1]
    return w * clock.scale(last) if last == times[1] else _data(ode, clock, w, last, times[1])


@dataclass(frozen=True)
class _Clock:
    """The time u = asinh(size alpha / sigma) of a schedule, for data of a size."""

    schedule: Schedule
    size: float

    def __call__(self, t: float) -> float:
        """The clock at time t."""
        sigma = self.schedule.sigma(t)
        return math.inf if sigma == 0 else math.asinh(self.size * self.schedule.alpha(t) / sigma)

    def time(self, u: float) -> float:
        """The time at which the clock is u."""
        return self.schedule.t_of_lam(math.log(math.sinh(u) / self.size) if u > 0 else -math.inf)

    def scale(self, t: float) -> float:
        """The root mean square of a state at time t."""
        return math.hypot(self.size * self.schedule.alpha(t), self.schedule.sigma(t))


def _times(
    ode: ProbabilityFlowODE, x: Tensor, t_start: float, t_end: float, sigma_min: float | None, method: str
) -> list[float]:
    """Both times, after a check of all arguments."""
    if not is_adaptive(method):
        adaptive = [name for name in method_names() if is_adaptive(name)]
        if method not in method_names():
            raise unknown_name("adaptive method", method, adaptive)
        raise InputError(
            f"a reference needs an adaptive method, and torchdiffeq's {method} takes one step per interval: use "
            f"{', '.join(adaptive)}."
        )
    schedule = check_ode(ode).schedule
    times = check_grid(schedule, [t_start, t_end])
    check_states(ode, x, times[0])
    agree(ode, "reference", x, times, sigma_min, method)
    if sigma_min is not None and any(map(ode.is_data, times)):
        check_floor(known_level(schedule, sigma_min, "sigma_min"), max(map(schedule.noise_to_signal, times)))
    return times


def _is_lowest(schedule: Schedule, t: float) -> bool:
    """Whether the model knows no level below the level of time t, so that only its data estimate leads to the data."""
    level = schedule.noise_to_signal(t)
    return lowest_level(schedule, 0.0) >= level * (1 - 1e-6) > 0


def from_data(ode: ProbabilityFlowODE, x: Tensor, t: float, floor: float) -> Tensor:
    """The states at a time `floor` close to the data, from states x [B, ...] at the data, time t: one step of DDIM."""
    if not ode.schedule.knows(t):
        low = lowest_level(ode.schedule, 0.0)
        raise GridError(f"the model knows no level below sigma/alpha {low:.4g}: start there instead of at the data.")
    p, q = factors_at(ode.schedule, t, ode.prediction, "noise")
    noise = p * x + q * ode.output(x, t)
    return ode.schedule.alpha(floor) / ode.schedule.alpha(t) * x + ode.schedule.sigma(floor) * noise


def _clock(
    ode: ProbabilityFlowODE, x: Tensor, times: list[float], sigma_min: float | None
) -> tuple[_Clock, tuple[float, float]]:
    """The clock for the data of the model, and the first and last time of the integration, which leaves out the data."""
    schedule, (first, last) = ode.schedule, times
    start, end = (schedule.noise_to_signal(t) for t in times)
    lowest = lowest_level(schedule, 0.0) if sigma_min is None else sigma_min
    size = size_of_data(ode, x, first, lowest=min(start, lowest if ode.is_data(last) else end))
    if ode.is_data(first) or ode.is_data(last):
        if sigma_min is None:
            sigma_min = lowest_level(schedule, _FLOOR * min(size, max(start, end)))
            check_floor(sigma_min, max(start, end))
        floor = schedule.t_of_noise_to_signal(known_level(schedule, sigma_min, "sigma_min"))
        first, last = (floor if ode.is_data(t) else t for t in times)
    return _Clock(schedule, size), (first, last)


def _knots(first: float, last: float, points: int) -> Tensor:
    """Knots of a dense output, float64 [points]: half as far apart at the ends, where interpolants have knots on one side."""
    k = torch.linspace(0, 1, points, dtype=_F64, device="cpu")
    width = torch.full_like(k, _ENDS)
    share = (1 + (torch.hypot(k, width) - torch.hypot(1 - k, width)) / (math.hypot(1, _ENDS) - _ENDS)) / 2
    knots = first + (last - first) * share
    knots[0], knots[-1] = first, last
    return knots


def _flow(ode: ProbabilityFlowODE, clock: _Clock) -> Callable[[Tensor, Tensor], Tensor]:
    schedule, size = ode.schedule, clock.size

    def flow(u: Tensor, w: Tensor) -> Tensor:
        t = schedule.t_of_lam((u.sinh() / size).log())
        scale = torch.hypot(size * schedule.alpha(t), schedule.sigma(t))
        return ode.data(scale * w, t) / size - u.tanh() * w

    return flow


def _integrate(
    ode: ProbabilityFlowODE, clock: _Clock, x: Tensor, t: float, knots: Tensor, rtol: float, atol: float, method: str
) -> Tensor:
    """Integrate from the float64 state x at time t. Return the scaled states w at the knots, float64 [K, B, ...]."""
    states = integrate(_flow(ode, clock), x / clock.scale(t), knots, method, rtol, atol, {"norm": _worst})
    if not bool(torch.isfinite(states[-1]).all()):
        raise NonFiniteError(
            f"{method} ended in NaN or infinity: check the model over the whole range of noise levels."
        )
    return states


def _worst(ratios: Tensor) -> Tensor:
    """The largest root mean square of a sample: an easy sample must not hide the error of a hard sample."""
    return ratios.reshape(len(ratios), -1).square().mean(dim=1).sqrt().max()


def _data(ode: ProbabilityFlowODE, clock: _Clock, w: Tensor, floor: float, t: float) -> Tensor:
    """Estimate the state at the data, time t, from the scaled state w at the time `floor` just before."""
    return ode.data(w * clock.scale(floor), floor) * ode.schedule.alpha(t)
