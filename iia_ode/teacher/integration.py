"""The integration of the teacher: a multistep method on a grid that suits data of any size, with an estimate of its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..metrics import flat
from ..ode import ProbabilityFlowODE
from ..plan import Past, Plan, Run, check_grid, traced
from ..plan.checks import samples_of
from ..reference import from_data
from ..schedules import Schedule
from ..schedules.levels import check_floor, known_level
from ..sizes import few, size_of_data, smallest_level
from ..solvers import get_solver
from ..solvers.transfer import ddim_step

__all__ = ["SOLVER", "STEPS", "Integration"]

SOLVER = "expab4"
"""The most accurate registered solver at 40 to 60 evaluations, among the solvers that evaluate only at grid points."""

STEPS = 60
"""Default number of steps."""

_F64 = torch.float64
_RHO = 10.0  # spacing of the levels, between 7 (Karras et al.) and equidistant log-SNR
_START = 0.005  # share of the grid in which the steps grow from about zero to their size
# A start with a higher level, relative to the size of the data, alpha = 0 included, first leaps down to the level of `_top`:
# to 40 with 24 steps, and to at most 200. The error of the leap is about the inverse of the level; that of the steps after the
# leap falls with their number to the power of -4.
_NOISIEST, _LEAP, _LEAP_STEPS, _LOWEST_LEAP = 200.0, 40.0, 24, 5.0
_SAFE = 2.0  # factor on the estimate of the error, which few samples may miss
_MORE = 1.5  # ratio of the numbers of steps for the estimate of the error
_ORDER = 3  # of few steps, for the estimate of the error


@dataclass(frozen=True, eq=False)
class Integration:
    """A fourth-order integration from `t_start` to `t_end`.

    The first steps of a multistep method have lower orders. The steps therefore grow smoothly from the start. The length of
    the first step is of the order of the square of a later step, and the whole integration keeps its order.

    Attributes
    ----------
    schedule : noise schedule of the ODE.
    t_start, t_end : times, in either direction; either may be the data.
    steps : number of steps.
    sigma_min : where `t_end` is the data, the level sigma/alpha at which the integration stops; where `t_start` is the data,
        the level at which it starts, after a step of DDIM.
    size : root mean square of the data.
    """

    schedule: Schedule
    t_start: float
    t_end: float
    steps: int
    sigma_min: float
    size: float

    @classmethod
    def of(
        cls,
        ode: ProbabilityFlowODE,
        x: Tensor,
        t_start: float,
        t_end: float,
        *,
        steps: int = STEPS,
        sigma_min: float | None = None,
        size: float | None = None,
        last: float = math.inf,
    ) -> Integration:
        """The integration of a model from states x at `t_start`.

        Parameters
        ----------
        ode, x, t_start, t_end, steps : the model, its states, the interval and the number of steps.
        sigma_min : by default the smallest level of the model, or `last` if `last` is lower.
        size : root mean square of the data; by default an estimate from a few samples.
        last : level of the last evaluation of the grid that the trajectories serve; by default no grid.

        Raises
        ------
        GridError : the times or `sigma_min` are not usable.
        """
        schedule = ode.schedule
        first, end = check_grid(schedule, [t_start, t_end])
        start, clean = schedule.noise_to_signal(first), schedule.noise_to_signal(end)
        noisy, lowest = max(start, clean), smallest_level(schedule, 0.0)
        if sigma_min is not None and 0 in (start, clean):
            sigma_min = lowest = known_level(schedule, sigma_min, "sigma_min")
            check_floor(sigma_min, noisy)
        if size is None:
            size = size_of_data(ode, x, first, min(start, clean or lowest))
        if sigma_min is None:
            sigma_min = smallest_level(schedule, size)
            if last <= sigma_min or not schedule.covers(schedule.t_of_noise_to_signal(sigma_min)):
                sigma_min = last
            sigma_min = max(min(sigma_min, noisy / 10), lowest)
            if 0 in (start, clean):
                check_floor(sigma_min, noisy)
        return cls(schedule, first, end, steps, sigma_min, size)

    @cached_property
    def plan(self) -> Plan:
        """The method from `t_start` to `t_end`, with the level `sigma_min` in place of the data."""
        schedule, n = self.schedule, self.steps
        floor = schedule.t_of_noise_to_signal(self.sigma_min)
        first, last = (floor if schedule.sigma(t) == 0 else t for t in (self.t_start, self.t_end))
        highest = self._top
        a, b = (min(schedule.noise_to_signal(t), highest) ** (1 / _RHO) for t in (first, last))
        times = [schedule.t_of_noise_to_signal((a + _growing(k / n) * (b - a)) ** _RHO) for k in range(1, n)]
        if self._jumps:
            times = [schedule.t_of_noise_to_signal(highest), *times]
        grid = torch.tensor([first, *times, last], dtype=_F64, device="cpu")
        return traced(_Method(self._jumps), schedule, grid)

    def start(self, ode: ProbabilityFlowODE, x: Tensor) -> Run:
        """The run of the method from states x [B, ...] at `t_start`."""
        if self.schedule.sigma(self.t_start) == 0:
            x = from_data(ode, x, self.t_start, self.plan.grid[0])
        return self.plan.start(x, ode.prediction, conditioning=ode.conditioning)

    @property
    def _jumps(self) -> bool:
        """Whether the first step is a leap from a level far above the data."""
        return self.schedule.noise_to_signal(self.t_start) > 1.01 * self._top

    @property
    def _top(self) -> float:
        """The highest level of the grid after the start."""
        first, last = (self.schedule.noise_to_signal(t) for t in (self.t_start, self.t_end))
        if first <= last:
            return _NOISIEST * self.size
        top = self.size * min(_NOISIEST, max(_LOWEST_LEAP, _LEAP * (self.steps / _LEAP_STEPS) ** 4))
        return top if top > 2 * last else max(_NOISIEST * self.size, 2 * last)

    def knots(self, kept: Sequence[int]) -> list[float]:
        """Times u = asinh(size alpha / sigma) of some grid points."""
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        return [math.asinh(self.size * alpha(t) / sigma(t)) for t in (self.plan.grid[k] for k in kept)]

    def spread(self, count: int | None) -> list[int]:
        """Indices of about `count` grid points, the first and the last included; all grid points for None."""
        last = self.plan.steps
        count = last + 1 if count is None else min(count, last + 1)
        return sorted({round(k * last / (count - 1)) for k in range(count)})

    def path(
        self, ode: ProbabilityFlowODE, x: Tensor, first: int, kept: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States and slopes [K, B, ...] at some grid points, and the last data estimate [B, ...]; on the host.

        The states are divided by hypot(size alpha, sigma), and the slopes are derivatives by u = asinh(size alpha / sigma).

        Parameters
        ----------
        ode, x : the ODE with the conditions of x, and the initial states [B, ...].
        first : index of the first sample in the batch, for the message of an error.
        kept : indices of the grid points.
        dtype : dtype of states and slopes.

        Raises
        ------
        NonFiniteError : the integration ended in NaN or infinity.
        """
        states: list[Tensor] = []
        slopes: list[Tensor] = []
        run = self.start(ode, x)
        for k in range(self.plan.nfe + 1):
            state, t = run.current, run.t
            if run.done:
                data = ode.data(state, t)
            else:
                run.give(ode.borrowed(state, t))
                data = run.data
            if self._jumps and k == 1:  # the predicted end of the leap is no state of the trajectory
                continue
            point = k - (self._jumps and k > 1)
            if point not in kept:
                continue
            signal = self.size * self.schedule.alpha(t)
            scale = math.hypot(signal, self.schedule.sigma(t))
            states.append((state / scale).to("cpu", dtype))
            # The slope in u = asinh(signal / sigma), for which tanh(u) = signal / scale.
            slopes.append(torch.sub(data / self.size, state, alpha=signal / scale / scale).to("cpu", dtype))
        finite = (flat(states[-1]).isfinite() & flat(slopes[-1]).isfinite()).all(dim=1)
        if not bool(finite.all()):
            found = [first + int(i) for i in (~finite).nonzero()]
            raise NonFiniteError(
                f"the teacher ended in NaN or infinity in {samples_of(found)}: check the states, and the model over the whole "
                "range of noise levels."
            )
        return torch.stack(states), torch.stack(slopes), data.cpu()

    @torch.no_grad()
    def end(self, ode: ProbabilityFlowODE, x: Tensor) -> Tensor:
        """The states [B, ...] at `t_end`, from states x at `t_start`."""
        run = self.start(ode, x)
        while not run.done:
            run.step(ode.borrowed)
        state = run.current
        if not ode.is_data(self.t_end):
            return state
        return self.schedule.alpha(self.t_end) * ode.data(state, self.plan.grid[-1])

    @torch.no_grad()
    def error(self, ode: ProbabilityFlowODE, x: Tensor, final: Tensor) -> float | None:
        """Estimate of the error of the final states, by an integration of a few samples with more steps [Richardson 1911].

        The change with half as many steps more is the error up to a factor, 1.4 for an error that falls with the third power
        of the number of steps. The estimate is doubled, because a few samples may miss the hard ones.

        Parameters
        ----------
        ode, x : the ODE with the conditions of x, and the initial states [B, ...].
        final : final states [B, ...] of this integration.

        Returns
        -------
        Root mean square error per component, in units of the state; None where it is not finite.
        """
        index = few(x)
        part, states = ode.subset(index, len(x)), x[index.to(x.device)]
        finer = replace(self, steps=math.ceil(_MORE * self.steps)).end(part, states).cpu().double()
        change = float((finer - final[index.to(final.device)].cpu().double()).square().mean().sqrt())
        return _SAFE * change / (1 - _MORE**-_ORDER) if math.isfinite(change) else None


@dataclass(frozen=True)
class _Method:
    """The multistep method, after a leap from far above the data if there is one.

    With v = alpha / sigma, the flow is d(x / sigma)/dv = D, and D is nearly linear in v above the data. The leap is Heun's
    step in v, which is finite from alpha = 0.
    """

    leaps: bool
    label = SOLVER
    consistent = False  # not to be checked: the solver behind it is known

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """One step from t to s."""
        if past.index or not self.leaps:
            return get_solver(SOLVER).step(ode, x, t, s, past)
        first = ode.data(x, t)
        second = ode.data(ddim_step(ode.schedule, x, first, t, s), s)
        return ddim_step(ode.schedule, x, 0.5 * first + 0.5 * second, t, s), ()


def _growing(share: float) -> float:
    """A share of the grid from 0 to 1, quadratic at first and linear later."""
    return (math.hypot(share, _START) - _START) / (math.hypot(1.0, _START) - _START)
