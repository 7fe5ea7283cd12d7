"""Test cases for solvers: problems with known solutions, schedules, and nested grids between two noise levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..forms import conversion
from ..grids import log_snr, uniform
from ..integrate import odeint
from ..problems import Empirical, Gaussian, Mixture, Problem
from ..schedules import EDM, VE, VP, Cosine, Discrete, FlowMatching, Schedule

__all__ = [
    "PROBLEMS",
    "SCHEDULES",
    "TRACKS",
    "Model",
    "Track",
    "draw",
    "every_schedule",
    "exact_states",
    "gaussian",
    "mixture",
    "model_of",
    "points",
    "rms",
]

_F64 = torch.float64

Model: TypeAlias = Callable[[Tensor, float, str], Tensor]
"""Function from a state [B, ...], a time and a form to the model's output, as :meth:`iia_ode.Plan.run` calls it."""

SCHEDULES: tuple[Schedule, ...] = (EDM(), VP(), FlowMatching())
"""Schedules on which orders are measured: EDM (alpha = 1, sigma linear in t), flow matching (both linear in t) and VP (not
linear in t)."""


@cache
def every_schedule() -> tuple[Schedule, ...]:
    """One schedule of each kind, including a discrete schedule."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=_F64, device="cpu")
    return EDM(), VE(), VP(), Cosine(), FlowMatching(), Discrete((1 - betas).cumprod(0))


_MEANS = [[1.0, -0.5, 0.3, 0.8], [-0.9, 0.7, -0.2, -1.1], [0.1, 0.4, 1.2, 0.0]]


@cache
def gaussian() -> Gaussian:
    """Gaussian data in three dimensions with different variances: a linear, non-autonomous flow with a known solution."""
    return Gaussian(_tensor([0.3, -0.6, 0.1]), _tensor([0.5, 0.2, 1.3]))


@cache
def mixture() -> Mixture:
    """Three components in four dimensions, each with its own widths: a nonlinear flow.

    24 steps between the noise levels of a track resolve the widths. With sharper components, orders show only on grids so fine
    that high-order methods reach rounding.
    """
    stds = [[0.57, 0.64, 0.5, 0.72], [0.5, 0.45, 0.81, 0.57], [0.64, 0.64, 0.45, 0.5]]
    return Mixture(_tensor([0.5, 0.3, 0.2]), _tensor(_MEANS), _tensor(stds))


@cache
def points() -> Empirical:
    """Three data points without width: any remaining noise is visible."""
    return Empirical(_tensor(_MEANS))


PROBLEMS: dict[str, Callable[[], Problem]] = {"gaussian": gaussian, "mixture": mixture}


@dataclass(frozen=True)
class Track:
    """A family of nested grids between two noise levels sigma/alpha, both far from the ends of the schedule.

    Attributes
    ----------
    spacing : the variable in which the grid is uniform, ``"t"`` or ``"log-SNR"``.
    high, low : the noise levels sigma/alpha. Tracks uniform in t have a smaller range, because their grids have few points
        where log-SNR changes fast.
    encoding : whether the grid runs from low to high noise.
    """

    spacing: str
    high: float
    low: float
    encoding: bool = False

    @property
    def name(self) -> str:
        """``"t"``, ``"log-SNR"`` or ``"log-SNR, encoding"``."""
        return self.spacing + (", encoding" if self.encoding else "")

    def grid(self, schedule: Schedule, n: int) -> Tensor:
        """The grid of n intervals on a schedule, float64 [n + 1]."""
        if self.spacing == "t":
            grid = uniform(n, *(schedule.t_of_noise_to_signal(level) for level in (self.high, self.low)))
        else:
            grid = log_snr(n + 1, self.low, self.high, schedule=schedule, to_data=False)
        return grid.flip(0) if self.encoding else grid


TRACKS = (Track("t", 2.0, 0.5), Track("log-SNR", 5.0, 0.3), Track("log-SNR", 5.0, 0.3, encoding=True))

_EXACT: dict[Any, Tensor] = {}


def exact_states(problem: str, schedule: Schedule, track: Track, n: int, steps: int) -> Tensor:
    """The exact solution on a track's grid of n intervals, at points n/4 - `steps` to n/4 and at the end, [steps + 2, B, ...].

    With ``steps=0``, the solution is at the start and at the end of the grid, [2, B, ...]. The initial states are eight draws
    of the noisy data, equal on every grid of a track.
    """
    finest = max(n, 96)  # the grids are nested: coarser grids share one solution
    grid, stride = track.grid(schedule, finest), finest // n
    last = finest // 4
    first = last - steps * stride if steps else 0
    kept = range(last + 1) if n <= 96 else [0, *range(max(first, 1), last + 1)] if steps else [0]
    times = torch.cat([grid[list(kept)], grid[-1:]])
    # The flow of x / alpha depends on sigma / alpha alone. On EDM sigma / alpha is time: its solution serves every schedule.
    levels = schedule.noise_to_signal(times)
    key = problem, tuple(float(f"{level:.12g}") for level in levels.tolist())
    if key not in _EXACT:
        data, start = PROBLEMS[problem](), float(levels[0])
        x = draw(data, 8, EDM(), start)
        if isinstance(data, Gaussian):
            _EXACT[key] = torch.stack([data.flow(x, EDM(), start, level) for level in levels.tolist()])
        else:
            # Tolerances below rounding: the error is that of the last bits, 1e-13 of the state.
            _EXACT[key] = odeint(data.ode(EDM()), x, levels, method="torchdiffeq:dopri8", rtol=1e-14, atol=1e-14)
    states = _EXACT[key] * schedule.alpha(times).reshape(-1, 1, 1)
    wanted = range(first, last + 1, stride) if steps else [0]
    place = {point: k for k, point in enumerate(kept)}
    return states[[*(place[point] for point in wanted), len(states) - 1]]


def draw(problem: Problem, n: int, schedule: Schedule, t: float, seed: int = 1) -> Tensor:
    """n noisy draws of the data at time t, float64 [n, ...]; equal at every call with one seed."""
    return problem.noisy(n, schedule, t, torch.Generator(device="cpu").manual_seed(seed))


def model_of(problem: Problem, schedule: Schedule) -> Model:
    """The problem's closed-form denoiser as a model that answers in any form."""

    @cache
    def levels(t: float, form: str) -> tuple[float, float, float, float]:
        return schedule.alpha(t), schedule.sigma(t), *conversion(schedule, t, "data", form)

    def model(x: Tensor, t: float, form: str) -> Tensor:
        alpha, sigma, p, q = levels(t, form)
        return p * x + q * problem.denoise(x, alpha, sigma)

    return model


def rms(x: Tensor) -> float:
    """Root mean square of all components."""
    return float(x.double().square().mean().sqrt())


def _tensor(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=_F64, device="cpu")
