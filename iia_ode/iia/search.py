"""Grids found by trial: every candidate is fitted in closed form and judged by its final states on other samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import GridError, InputError, NonFiniteError
from ..grids import karras
from ..grids.base import as_grid, times_of
from ..ode import ProbabilityFlowODE
from ..plan import Plan, check_grid
from ..schedules import Schedule
from .endpoint import by_robust_error, endpoint_errors, robust_mean
from .teacher import Teacher

__all__ = ["GridSearch", "LeapGrid", "Trial", "leap_grids", "search_grid"]


@dataclass(frozen=True, order=True)
class LeapGrid:
    """A grid that leaps from its start to `sigma_1` and goes on as Karras et al.'s does, to `sigma_min` and the data.

    One evaluation at the noisiest level says little more than the mean of the data, and what follows it is nearly linear
    for as long as the noise dwarfs the data: a solver whose first step is fitted can take it all at once, which leaves the
    other evaluations for the levels where images form.

    Attributes
    ----------
    sigma_1, sigma_min : levels sigma/alpha of the second and the last evaluation.
    rho : spacing between them, as for :func:`iia_ode.grids.karras`.
    """

    sigma_1: float
    sigma_min: float
    rho: float = 7.0

    def times(self, n: int, schedule: Schedule, t_start: float) -> Tensor:
        """The grid of n evaluations from `t_start` to the data, float64 [n + 1].

        Raises
        ------
        GridError : n < 1, or the levels are not in order.
        """
        if n < 1:
            raise GridError(f"a grid needs at least one evaluation, got {n}.")
        rest = as_grid([])
        if n == 2:
            rest = times_of([self.sigma_1], schedule, False)
        elif n > 2:
            rest = karras(n - 1, self.sigma_min, self.sigma_1, self.rho, schedule=schedule, to_data=False)
        return as_grid(check_grid(schedule, torch.cat([as_grid([t_start]), rest, as_grid([schedule.t_data])])))


def leap_grids(start: float, scale: float) -> list[LeapGrid]:
    """Candidates between the level `start` and the data, for data of root mean square `scale`."""
    firsts = [scale * f for f in (3.5, 5.0, 7.0, 10.0, 16.0, 32.0, 80.0)]
    firsts = [a for a in firsts if a < 0.9 * start] or [start * f for f in (0.8, 0.6, 0.4)]
    lasts = [scale * f for f in (0.5, 0.25, 0.12, 0.05, 0.015)]
    lasts = [b for b in lasts if b < 0.5 * firsts[0]] or [firsts[0] * f for f in (0.3, 0.1)]
    return [LeapGrid(a, b, rho) for a in firsts for b in lasts for rho in (3.0, 7.0)]


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate, and the root mean square error of each final state on samples that it was not fitted to, float64."""

    grid: LeapGrid
    errors: Tensor
    samples: int

    @property
    def error(self) -> float:
        """Root mean square over all of them."""
        return robust_mean(self.errors, math.inf)


@dataclass(frozen=True, eq=False)
class GridSearch:
    """The outcome of :func:`search_grid`: all trials in order, and the candidates of the last round, best first."""

    trials: tuple[Trial, ...]
    ranking: tuple[LeapGrid, ...]

    @property
    def best(self) -> LeapGrid:
        """The winner."""
        return self.ranking[0]


Fit = Callable[[ProbabilityFlowODE, Tensor, Tensor, Teacher], Plan]
"""From an ODE, a grid, initial states and their teacher to a fitted plan."""


def search_grid(
    fit: Fit,
    ode: ProbabilityFlowODE,
    x: Tensor,
    teacher: Teacher,
    nfe: int,
    candidates: Sequence[LeapGrid],
    *,
    rounds: Sequence[tuple[int, int]] = ((32, 8), (96, 3)),
    descent: int = 2,
    chunk_size: int = 64,
    report: Callable[[str], None] | None = None,
) -> GridSearch:
    """Successive halving over the candidates, then coordinate descent from the best of them.

    In each trial half of the samples are fitted to and the other half judged by, and what wins on few samples is tried again
    on more: neither the noise of a candidate nor its fit decides alone. The teacher costs nothing more, whatever the grid.

    Parameters
    ----------
    fit : how a grid is fitted.
    ode, x, teacher : the model, initial states [B, ...] and their trajectories.
    nfe : evaluations, at least 2 for there to be anything to choose.
    candidates : where to look.
    rounds : (samples, candidates to keep) of each round; clipped to what there is.
    descent : passes over (sigma_1, sigma_min, rho), each changed up and down by a factor, which is halved every pass.
    chunk_size : samples that go through the model at once where a candidate is judged.
    report : is told how far the search is.

    Raises
    ------
    InputError : no candidate could be fitted.
    """
    trials: list[Trial] = []
    schedule, t_start = ode.schedule, float(teacher.about["t_start"])
    top = schedule.noise_to_signal(t_start) if schedule.alpha(t_start) > 0 else math.inf

    def attempt(grid: LeapGrid, samples: int) -> Trial:
        known = next((t for t in trials if (t.grid, t.samples) == (grid, samples)), None)
        if known is None:
            errors = _errors(fit, ode, x, teacher, grid, nfe, samples, chunk_size)
            trials.append(known := Trial(grid, errors, samples))
        return known

    def ranked(grids: Sequence[LeapGrid], samples: int) -> list[LeapGrid]:
        return [t.grid for t in by_robust_error([attempt(g, samples) for g in grids], lambda t: t.errors)]

    floor = max(float(teacher.about["sigma_min"]), schedule.noise_to_signal(schedule.t_data))
    alive = [g for g in dict.fromkeys(candidates) if _in_order(g, top, floor)]
    if nfe == 2:
        alive = list({g.sigma_1: g for g in alive}.values())
    samples = min(rounds[0][0], len(x))
    for samples, keep in rounds:
        samples = min(samples, len(x))
        alive = ranked(alive, samples)[:keep]
        if report and alive:
            report(f"{len(trials)} grids tried on {samples} samples, error {attempt(alive[0], samples).error:.4g}")
    if not alive or not math.isfinite(attempt(alive[0], samples).error):
        raise InputError("no grid could be fitted: the model is not finite, or the teacher reaches too few levels.")
    best, step = alive[0], 1.4
    for _ in range(descent):
        for name in ("sigma_1", "sigma_min", "rho") if nfe > 2 else ("sigma_1",):
            moved = [replace(best, **{name: getattr(best, name) * f}) for f in (step, 1 / step)]
            best = ranked([best, *(g for g in moved if _in_order(g, top, floor))], samples)[0]
        step = math.sqrt(step)
    return GridSearch(tuple(trials), (best, *(g for g in alive if g != best)))


def _in_order(grid: LeapGrid, top: float, floor: float) -> bool:
    return floor < grid.sigma_min < 0.9 * grid.sigma_1 and grid.sigma_1 < 0.95 * top and 1 <= grid.rho <= 20


def _errors(
    fit: Fit,
    ode: ProbabilityFlowODE,
    x: Tensor,
    teacher: Teacher,
    grid: LeapGrid,
    nfe: int,
    samples: int,
    chunk_size: int,
) -> Tensor:
    half = max(1, samples // 2)
    own, other = slice(0, half), slice(half, samples) if samples > 1 else slice(0, 1)
    try:
        times = grid.times(nfe, ode.schedule, float(teacher.about["t_start"]))
        plan = fit(ode.subset(own, len(x)), times, x[own], teacher.subset(own))
        return endpoint_errors(plan, ode, x, teacher.final, other, chunk_size=chunk_size, check_finite=True)
    except (GridError, NonFiniteError):
        return torch.full((other.stop - other.start,), math.inf, dtype=torch.float64, device="cpu")
