"""High-accuracy solutions of the probability-flow ODE by torchdiffeq, in log-SNR time, with dense output.

In terms of the scaled state w = x / sqrt(alpha^2 + sigma^2) and the time u = asinh(alpha / sigma), the flow is

    dw/du = D(x, t) - tanh(u) w.

Near the data, u is log-SNR time up to a constant (u = lambda + log 2 + O(sigma^2)). At the noise end, u stays finite, so
schedules with alpha = 0 there need no special case. No derivative of the schedule enters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._torchdiffeq import integrate, is_adaptive, method_names
from .checks import check_whole
from .errors import GridError, InputError, NonFiniteError, unknown_name
from .ode import ProbabilityFlowODE
from .ode.distributed import agree
from .ode.hosted import in_float64
from .ode.mode import check_mode
from .plan import check_grid, check_size, check_start
from .plan.checks import factors_at
from .schedules import Schedule
from .schedules.levels import known_level, lowest_level

__all__ = ["Trajectory", "from_data", "solve", "trajectory"]

_F64 = torch.float64
_SIGMA_MIN = 1e-6


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A dense solution. ``trajectory(t)`` is the state at time t, by cubic Hermite interpolation in log-SNR time.

    Attributes
    ----------
    schedule : noise schedule of the ODE.
    knots : times u = asinh(alpha/sigma) of the stored points, float64 [K], strictly monotone.
    states, slopes : scaled states w and their derivatives dw/du at the knots, float64 [K, B, ...].
    data : state at sigma = 0, float64 [B, ...], if the trajectory ends or starts at the data; else None.
    evaluations : number of batched model evaluations spent.
    """

    schedule: Schedule
    knots: Tensor
    states: Tensor
    slopes: Tensor
    data: Tensor | None
    evaluations: int

    @property
    def final(self) -> Tensor:
        """State at the end of the trajectory, float64 [B, ...]."""
        u = float(self.knots[-1])
        if self.data is not None and u > float(self.knots[0]):
            return self.data
        return self.states[-1] * self.schedule.size(_time(self.schedule, u))

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
        u, first, last = _clock(self.schedule, t), float(self.knots[0]), float(self.knots[-1])
        low, high = min(first, last), max(first, last)
        slack = 1e-9 * max(1.0, high)
        if self.data is not None and u > high:
            # Below the floor eps is taken as constant: x is a straight line in (alpha, sigma) from that knot to the data.
            floor = _time(self.schedule, high)
            a, s = self.schedule.alpha(floor), self.schedule.sigma(floor)
            eps = (self.states[-1 if last > first else 0] * self.schedule.size(floor) - a * self.data) / s
            return self.schedule.alpha(t) * self.data + self.schedule.sigma(t) * eps
        if not low - slack <= u <= high + slack:
            raise GridError(f"t = {t:g} lies outside the trajectory: give a time between its start and its end.")
        sign = 1.0 if last > first else -1.0
        k = int(torch.searchsorted(sign * self.knots, sign * u)) - 1
        k = min(max(k, 0), len(self.knots) - 2)
        h = float(self.knots[k + 1] - self.knots[k])
        r = (u - float(self.knots[k])) / h
        w = (1 + 2 * r) * (1 - r) ** 2 * self.states[k] + r * r * (3 - 2 * r) * self.states[k + 1]
        w = w + h * r * (1 - r) * ((1 - r) * self.slopes[k] - r * self.slopes[k + 1])
        return w * self.schedule.size(t)


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
    t_start, t_end : start and end times, in either direction. Either may be the data, and either may have alpha = 0. From
        the data, the output of the model must determine the noise there, as a velocity does.
    points : number of knots of the dense output, at least 2, equidistant in u. The integrator ends a step at each knot.
    rtol, atol : relative and absolute tolerance of the integrator for w, where data and noise are of order 1. The rounding
        of a float32 model exceeds tolerances below about 1e-6.
    sigma_min : noise level sigma/alpha at which the integration stops if `t_end` is the data, or starts if `t_start` is. The
        final state is then the model's data estimate, and the first state a step of DDIM, each with an error of
        O(sigma_min^2). By default 1e-6, or the lowest level that the model knows if that is higher. For a network without
        ``known_levels``, give the smallest level of its training.
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
    schedule, times, (first, last) = _span(ode, x, t_start, t_end, sigma_min, method)
    ode, x = in_float64(ode, x)
    knots = torch.linspace(_clock(schedule, first), _clock(schedule, last), points, dtype=_F64, device="cpu")
    with ode.counting() as spent:
        data = x if first != times[0] else None
        states = _integrate(
            ode, x if data is None else from_data(ode, data, times[0], first), first, knots, rtol, atol, method
        )
        flow = _flow(ode)
        slopes = torch.stack([flow(u, w) for u, w in zip(knots, states, strict=True)])
        data = data if last == times[1] else _data(ode, states[-1], last, times[1])
    return Trajectory(schedule, knots, states, slopes, data, spent.evaluations)


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
    schedule, times, (first, last) = _span(ode, x, t_start, t_end, sigma_min, method)
    ode, x = in_float64(ode, x)
    knots = torch.tensor([_clock(schedule, first), _clock(schedule, last)], dtype=_F64, device="cpu")
    start = x if first == times[0] else from_data(ode, x, times[0], first)
    w = _integrate(ode, start, first, knots, rtol, atol, method)[-1]
    return w * schedule.size(last) if last == times[1] else _data(ode, w, last, times[1])


def _span(
    ode: ProbabilityFlowODE, x: Tensor, t_start: float, t_end: float, sigma_min: float | None, method: str
) -> tuple[Schedule, list[float], list[float]]:
    """Check all arguments. Return the schedule, both times, and the times of the integration, which leave out the data."""
    check_start(ode, x)
    check_mode(ode)
    if not is_adaptive(method):
        adaptive = [name for name in method_names() if is_adaptive(name)]
        if method not in method_names():
            raise unknown_name("adaptive method", method, adaptive)
        raise InputError(
            f"a reference needs an adaptive method, and torchdiffeq's {method} takes one step per interval: use "
            f"{', '.join(adaptive)}."
        )
    schedule = ode.schedule
    times = check_grid(schedule, [t_start, t_end])
    check_size(schedule, times[0], x)
    sigma_min = lowest_level(schedule, _SIGMA_MIN) if sigma_min is None else sigma_min
    agree(ode, "reference", x, times, sigma_min, method)
    if not any(map(ode.is_data, times)):
        return schedule, times, times
    sigma_min = known_level(schedule, sigma_min, "sigma_min")
    if not 0 < sigma_min < max(schedule.noise_to_signal(t) for t in times):
        raise GridError(f"sigma_min must lie between 0 and the level of the noisy end, got {sigma_min:g}.")
    floor = _time(schedule, math.asinh(1 / sigma_min))
    return schedule, times, [floor if ode.is_data(t) else t for t in times]


def from_data(ode: ProbabilityFlowODE, x: Tensor, t: float, floor: float) -> Tensor:
    """The states at a time `floor` close to the data, from states x [B, ...] at the data, time t: one step of DDIM."""
    p, q = factors_at(ode.schedule, t, ode.prediction, "noise")
    noise = p * x + q * ode.output(x, t)
    return ode.schedule.alpha(floor) / ode.schedule.alpha(t) * x + ode.schedule.sigma(floor) * noise


def _flow(ode: ProbabilityFlowODE) -> Callable[[Tensor, Tensor], Tensor]:
    schedule = ode.schedule

    def flow(u: Tensor, w: Tensor) -> Tensor:
        t = schedule.t_of_lam(u.sinh().log())
        size = schedule.size(t)
        return ode.data(size * w, t) - u.tanh() * w

    return flow


def _integrate(
    ode: ProbabilityFlowODE, x: Tensor, t: float, knots: Tensor, rtol: float, atol: float, method: str
) -> Tensor:
    """Integrate from the float64 state x at time t. Return the scaled states w at the knots, float64 [K, B, ...]."""
    states = integrate(_flow(ode), x / ode.schedule.size(t), knots, method, rtol, atol, None)
    if not bool(torch.isfinite(states[-1]).all()):
        raise NonFiniteError(
            f"{method} ended in NaN or infinity: check the model over the whole range of noise levels."
        )
    return states


def _data(ode: ProbabilityFlowODE, w: Tensor, floor: float, t: float) -> Tensor:
    """Estimate the state at the data, time t, from the scaled state w at the time `floor` just before."""
    return ode.data(w * ode.schedule.size(floor), floor) * ode.schedule.alpha(t)


def _clock(schedule: Schedule, t: float) -> float:
    """The time u = asinh(alpha / sigma)."""
    sigma = schedule.sigma(t)
    return math.inf if sigma == 0 else math.asinh(schedule.alpha(t) / sigma)


def _time(schedule: Schedule, u: float) -> float:
    return schedule.t_of_lam(math.log(math.sinh(u)) if u > 0 else -math.inf)
