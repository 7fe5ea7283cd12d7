"""Variants that repeat what public samplers compute, for comparing numbers: none is registered, none is meant for use.

Each says in its name or in its first line what it repeats, and how that differs from the method of that name here. They are
what :mod:`.golden` needs beside the registered solvers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from iia_ode.errors import GridError, InputError
from iia_ode.plan import Past
from iia_ode.problems import Problem
from iia_ode.schedules import Discrete, Schedule
from iia_ode.solvers import LMS, PNDM, Solver
from iia_ode.solvers.transfer import ddim_step, noise_step

__all__ = [
    "DDIMAsInDiffusers",
    "FPNDMAsInDiffusers",
    "FPNDMAtIntegerTimes",
    "IPNDMDropsFirstEstimate",
    "IPNDMvAsPublished",
    "ModelAtOtherLevels",
    "TabulatedAdams",
]


@dataclass(frozen=True)
class DDIMAsInDiffusers(Solver):
    """DDIM that lands elsewhere than on its next grid point: inconsistent unless the grid is spaced by `stride`.

    The defect: diffusers' DDIMScheduler moves the state from t to t - T // N whatever its grid is, and next evaluates the
    model at the grid's own time. On grids that are not spaced by T // N (linspace, and trailing where N does not divide T)
    model and state are at different noise levels from the second step on. ``ddim`` moves to the next grid point.

    Parameters
    ----------
    stride : T // N, in timesteps of a :class:`~iia_ode.Discrete` schedule.
    to_data : whether a step beyond timestep 0 lands on the data (``set_alpha_to_one``) or on timestep 0.
    """

    order = 1
    consistent = False
    stride: int
    to_data: bool = True

    def target(self, schedule: Schedule, t: float) -> float:
        """The time whose level a step from t lands on."""
        if not isinstance(schedule, Discrete):
            raise InputError(f"DDIMAsInDiffusers steps in timesteps of a Discrete schedule, got {schedule!r}.")
        if t - self.stride >= 0:
            return t - self.stride
        return schedule.t_data if self.to_data else 0.0

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The transfer from t to its target, taken for the state at s."""
        return ddim_step(ode.schedule, x, ode.data(x, t), t, self.target(ode.schedule, t))


@dataclass(frozen=True)
class IPNDMDropsFirstEstimate(PNDM):
    """iPNDM that ignores its first evaluation where alpha = 0: x_s = (sigma_s/sigma_t) x, then as ``ipndm``.

    The defect: the grid of diffusers' IPNDMScheduler starts at alpha = 0. The state is pure noise there and only the data
    estimate says where to go; upstream uses the estimate 0 in its place, having paid for the evaluation, and keeps
    eps = x/sigma as the first slope of the later steps. ``ipndm`` takes DDIM's step there.
    """

    consistent = False

    @property
    def order(self) -> int:  # type: ignore[override]
        """1: what the first step leaves out is as large as alpha at its end."""
        return 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """From alpha = 0 without the data estimate; else iPNDM's step."""
        if ode.schedule.alpha(t) > 0:
            return super().step(ode, x, t, s, past)
        return ode.schedule.sigma(s) / ode.schedule.sigma(t) * x, (ode.noise(x, t),)


@dataclass(frozen=True)
class IPNDMvAsPublished(LMS):
    """iPNDM-v of diff-sampler with its wrong weights: order 2 in place of 4; 3 in place of 3 on smooth grids only.

    It is meant to be variable-step Adams-Bashforth in sigma, which is ``lms`` here, and up to order 2 it is. The defects, with
    h_0 the step in rho = sigma/alpha and h_1, h_2, h_3 those before it:

    - from order 3 on a misplaced bracket adds h_0 (1 - R)/2 times the second difference of the slopes (scaled so that the
      newest has weight 1), R = h_0 (h_0 + h_1) / (h_1 (h_1 + h_2)), which vanishes on uniform grids only;
    - at order 4 the term of the third difference has a plus where a minus belongs: on a uniform grid the weights are 57, -65,
      43, -11 over 24 instead of 55, -59, 37, -9;
    - at order 4 the last weight has h_1/h_2 in place of h_2/h_3, so that on most grids the weights do not sum to the step.
    """

    consistent = False

    @property
    def order(self) -> int:  # type: ignore[override]
        """2 for four outputs. For three the excess is of higher order where the ratio of successive steps tends to 1."""
        return 2 if self.max_order == 4 else self.max_order

    def integrals(self, schedule: Schedule, times: Sequence[float], s: float) -> list[float]:
        """Those of ``lms``, and what upstream adds to them."""
        exact, rho = super().integrals(schedule, times, s), [schedule.noise_to_signal(u) for u in times]
        excess = _excess(rho, schedule.noise_to_signal(s) - rho[0], exact[-1])
        return [w + e for w, e in zip(exact, excess, strict=True)]


def _excess(rho: Sequence[float], h: float, last: float) -> list[float]:
    """What upstream adds to the weights of slopes at `rho`, newest first, for a step h; `last` is the exact last weight."""
    excess = [0.0] * len(rho)
    if len(rho) < 3:
        return excess
    back = [rho[0] - r for r in rho]  # h_1, h_1 + h_2, ... from index 1 on
    ratio = h * (h + back[1]) / (back[1] * back[2])
    for j, d in enumerate(_scaled_difference(rho[:3])):
        excess[j] += h * (1 - ratio) / 2 * d
    if len(rho) == 4:
        third = _scaled_difference(rho)
        sign = ratio * (h + back[2]) / back[3] * (1 - h / (2 * (h + back[1]))) * h / (3 * (h + back[2]))
        for j, d in enumerate(third):
            excess[j] += h * sign * d
        steps = [a - b for a, b in zip(rho, rho[1:], strict=False)]
        swapped = steps[0] / steps[1] / (steps[1] / steps[2])
        excess[3] += (last + h * sign * third[3]) * (swapped - 1)
    return excess


def _scaled_difference(nodes: Sequence[float]) -> list[float]:
    """Weights of the divided difference over `nodes`, scaled so that the first is 1."""
    weights = [1 / math.prod(a - b for b in nodes if b != a) for a in nodes]
    return [w / weights[0] for w in weights]


@dataclass(frozen=True)
class FPNDMAtIntegerTimes(PNDM):
    """F-PNDM with the middle of a Runge-Kutta step rounded down to a timestep, as PNDM's own code truncates it.

    ``fpndm`` evaluates the model at the middle itself, which between two timesteps of a :class:`~iia_ode.Discrete` schedule
    is a level that a network conditioned on integers was never shown. Where the middle is a timestep the two are the same.
    """

    start: str = "runge_kutta"

    def _runge_kutta(self, ode: Any, x: Any, first: Any, t: float, s: float) -> Any:  # type: ignore[override]
        """The mean noise of the classic method, its stages at the rounded middle."""
        middle = float(math.floor((t + s) / 2))
        second = ode.noise(noise_step(ode.schedule, x, first, t, self._second_stage(middle, t, s)), middle)
        third = ode.noise(noise_step(ode.schedule, x, second, t, middle), middle)
        fourth = ode.noise(noise_step(ode.schedule, x, third, t, s), s)
        return (first + 2 * second + 2 * third + fourth) / 6

    def _second_stage(self, middle: float, t: float, s: float) -> float:
        """The time that the second stage's state is carried to."""
        return middle


@dataclass(frozen=True)
class FPNDMAsInDiffusers(FPNDMAtIntegerTimes):
    """F-PNDM whose second stage is evaluated one timestep off where steps are an odd number of timesteps long.

    The defect: diffusers' PNDMScheduler carries that state to t - (T // N) // 2, the middle rounded up, and the model is then
    called at the middle rounded down. Where steps have an even number of timesteps it is ``fpndm``.
    """

    consistent = False

    def _second_stage(self, middle: float, t: float, s: float) -> float:
        return float(math.ceil((t + s) / 2))


@dataclass(frozen=True)
class TabulatedAdams(Solver):
    """Adams-Bashforth in rho = sigma/alpha on the noise estimate with weights from a table, one row per step of one grid.

    DEIS of diff-sampler integrates its polynomials by a left Riemann sum of 10,000 points, so that its weights are off by 1e-5
    and do not sum to the step. ``deis_tab3`` and its kin have the exact ones.

    Parameters
    ----------
    weights : for each step, the weights of the noise estimates, newest first; an empty row is Euler's step.
    """

    consistent = False
    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(tuple(row) for row in self.weights))
        if any(len(row) > i + 1 for i, row in enumerate(self.weights)):
            raise InputError("a row of TabulatedAdams has more weights than there are slopes at its step.")

    @property
    def label(self) -> str:
        """The name with the size of the table."""
        return f"{self.name}({len(self.weights)} rows, up to {self.order} weights)"

    @property
    def order(self) -> int:  # type: ignore[override]
        """The most slopes that a row combines; a table with errors of its own stops converging at their size."""
        return max([1, *(len(row) for row in self.weights)])

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """x/alpha + sum_j w_j eps_j, times alpha_s."""
        steps = past.index + 1 + past.remaining
        if steps != len(self.weights):
            raise GridError(f"the table of TabulatedAdams has {len(self.weights)} rows, and the grid {steps} steps.")
        schedule = ode.schedule
        history = (ode.noise(x, t), *past.memory)[: self.order]
        row = self.weights[past.index] or (schedule.noise_to_signal(s) - schedule.noise_to_signal(t),)
        scale = schedule.alpha(s)
        moved = sum(scale * w * noise for w, noise in zip(row, history, strict=False))
        return scale / schedule.alpha(t) * x + moved, history


class ModelAtOtherLevels(nn.Module):
    """The exact noise estimate of a problem, evaluated at another noise level than the solver's.

    What happens where a sampler rounds the time that it hands to its network, or reads its tables one entry off.

    Parameters
    ----------
    problem : whose closed-form denoiser is the model.
    levels : alpha and sigma that the model takes x to have, by the solver's time.
    """

    def __init__(self, problem: Problem, levels: Mapping[float, tuple[float, float]]) -> None:
        super().__init__()
        self.problem, self.levels = problem, dict(levels)
        self.state_shape = tuple(problem.shape)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(x - alpha D) / sigma at the level that is put in place of t's; t [B] must be one of the times given."""
        time = float(t.flatten()[0])
        if time not in self.levels:
            raise InputError(f"ModelAtOtherLevels knows the times {sorted(self.levels)}, got {time}.")
        alpha, sigma = self.levels[time]
        return (x - alpha * self.problem.denoise(x, alpha, sigma)) / sigma
