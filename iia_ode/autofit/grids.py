"""Grids of a search: families that a fitted solver can take, and the search for the best member by closed-form fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import GridError, InputError, NonFiniteError
from ..grids import karras
from ..grids.base import as_grid, times_of
from ..iia.batch import Batch
from ..ode import cached
from ..plan import Plan, check_grid
from ..schedules import Schedule
from ..schedules.levels import lowest_level
from .search import Objective, Search, coordinate_descent, halving, samples_of

__all__ = ["Fit", "FreeGrid", "LeapGrid", "Levels", "leap_grids", "search_grid", "search_levels", "two_fold"]


@dataclass(frozen=True, order=True)
class LeapGrid:
    """A grid that leaps from its start to `sigma_1`, and continues as a Karras grid to `sigma_min` and the data.

    An evaluation at the noisiest level gives little more than the mean of the data, and the flow from there is nearly linear
    for as long as the noise dwarfs the data. A fitted first step can cover this interval at once. The other evaluations remain
    for the levels at which images form.

    Attributes
    ----------
    sigma_1, sigma_min : levels sigma/alpha of the second and of the last evaluation.
    rho : spacing between them, as in :func:`iia_ode.grids.karras`.
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
        return _around(rest, schedule, t_start)

    def moved(self, name: str, factor: float, levels: Levels) -> LeapGrid | None:
        """The grid with a scaled `sigma_1`, `sigma_min` or `rho`; None where that grid does not fit."""
        grid = replace(self, **{name: getattr(self, name) * factor})
        return grid if grid.fits(levels) else None

    def fits(self, levels: Levels) -> bool:
        """Whether the grid lies between two levels, with room for its evaluations."""
        inside = levels.lowest < self.sigma_min < 0.9 * self.sigma_1 and self.sigma_1 < 0.95 * levels.highest
        return inside and 1 <= self.rho <= 20


@dataclass(frozen=True, order=True)
class FreeGrid:
    """A grid of arbitrary levels.

    Attributes
    ----------
    levels : sigma/alpha of every evaluation but the first, decreasing.
    """

    levels: tuple[float, ...]

    @classmethod
    def of(cls, times: Tensor, schedule: Schedule) -> FreeGrid:
        """The interior of a grid [n + 1] that ends at the data."""
        return cls(tuple(schedule.noise_to_signal(t) for t in times[1:-1].tolist()))

    def times(self, n: int, schedule: Schedule, t_start: float) -> Tensor:
        """The grid from `t_start` to the data, float64 [n + 1].

        Raises
        ------
        GridError : there are not n - 1 levels, or they are not in order.
        """
        if n != len(self.levels) + 1:
            raise GridError(f"{len(self.levels)} levels make a grid of {len(self.levels) + 1} evaluations, not {n}.")
        inner = times_of(list(self.levels), schedule, False) if self.levels else as_grid([])
        return _around(inner, schedule, t_start)

    def moved(self, k: int, factor: float, levels: Levels) -> FreeGrid | None:
        """The grid with a scaled level k; None where the level comes too close to its neighbors."""
        above, level, below = (levels.highest, *self.levels, levels.lowest)[k : k + 3]
        level *= factor
        room = above > 1.02 * level and level > 1.02 * below
        return FreeGrid((*self.levels[:k], level, *self.levels[k + 1 :])) if room else None


@dataclass(frozen=True)
class Levels:
    """The range of a search, in levels sigma/alpha.

    Attributes
    ----------
    highest, lowest : level of the start, and lowest level at which the model may be evaluated.
    """

    highest: float
    lowest: float

    @classmethod
    def of(cls, batch: Batch) -> Levels:
        """The range that a batch's teacher covers."""
        schedule, teacher = batch.ode.schedule, batch.taught
        lowest = max(lowest_level(schedule, teacher.sigma_min), schedule.noise_to_signal(schedule.t_data))
        return cls(schedule.noise_to_signal(teacher.t_start), lowest)


def leap_grids(start: float, scale: float) -> list[LeapGrid]:
    """Candidates between the level `start` and the data, for data of root mean square `scale`."""
    firsts = [scale * f for f in (3.5, 5.0, 7.0, 10.0, 16.0, 32.0, 80.0)]
    firsts = [a for a in firsts if a < 0.9 * start] or [start * f for f in (0.8, 0.6, 0.4)]
    lasts = [scale * f for f in (0.5, 0.25, 0.12, 0.05, 0.015)]
    lasts = [b for b in lasts if b < 0.5 * firsts[0]] or [firsts[0] * f for f in (0.3, 0.1)]
    return [LeapGrid(a, b, 5.0) for a in firsts for b in lasts]


# ---- searches --------------------------------------------------------------------------------------------------------

Fit: TypeAlias = Callable[[Batch, Tensor], Plan]
"""Maps a batch with a teacher, and a grid, to a fitted plan."""


def two_fold(fit: Fit, batch: Batch, nfe: int) -> Objective[LeapGrid | FreeGrid]:
    """Two-fold cross-validation of grids: each half of the samples is judged by the fit to the other half.

    Parameters
    ----------
    fit : how a grid is fitted.
    batch : samples with a teacher.
    nfe : number of evaluations.

    Returns
    -------
    The objective: endpoint errors of a grid on the first n samples, infinite where the grid cannot be fitted.
    """
    start = batch.taught.t_start

    def errors(grid: LeapGrid | FreeGrid, samples: int) -> Tensor:
        half = max(1, samples // 2)
        first, second = (batch[:half], batch[half:samples]) if samples > 1 else (batch[:1], batch[:1])
        try:
            times = grid.times(nfe, batch.ode.schedule, start)
            of_second = second.errors(fit(first, times))
            whole = torch.cat([first.errors(fit(second, times)), of_second])[:samples]
        except (GridError, NonFiniteError):
            return _failed(samples)
        return whole if bool(torch.isfinite(whole).all()) else _failed(samples)

    return errors


def search_grid(
    fit: Fit,
    batch: Batch,
    nfe: int,
    candidates: Sequence[LeapGrid],
    *,
    rounds: Sequence[tuple[float, int]] = ((0.25, 8), (1.0, 3)),
    descent: int = 2,
) -> Search[LeapGrid]:
    """Successive halving over leap grids, then coordinate descent over the numbers of the best.

    Every candidate is judged by :func:`two_fold`. The batch's trajectories serve every grid.

    Parameters
    ----------
    fit : how a grid is fitted.
    batch : samples [B, ...] with a teacher.
    nfe : number of evaluations, at least 2.
    candidates : the leap grids of the first round.
    rounds : (share of the samples, number of candidates to keep) of each round; see :func:`~iia_ode.autofit.halving`.
    descent : passes over (sigma_1, sigma_min, rho), each scaled up and down by a factor that starts at 1.4.

    Returns
    -------
    The trials, and the best grids, best first.

    Raises
    ------
    InputError : no candidate could be fitted.
    """
    objective, levels = cache(two_fold(fit, replace(batch, ode=cached(batch.ode)), nfe)), Levels.of(batch)
    alive = [g for g in dict.fromkeys(candidates) if g.fits(levels)]
    if nfe == 2:  # one free level
        alive = list({g.sigma_1: g for g in alive}.values())
    found = halving(objective, alive, rounds, len(batch))
    names = ("sigma_1", "sigma_min", "rho") if nfe > 2 else ("sigma_1",)
    moves = [lambda grid, factor, name=name: grid.moved(name, factor, levels) for name in names]
    samples = samples_of(rounds[-1][0], len(batch))
    down = coordinate_descent(objective, found.best, moves, passes=descent, step=1.4, samples=samples)
    tried = {(t.candidate, t.samples) for t in found.trials}
    trials = (*found.trials, *(t for t in down.trials if (t.candidate, t.samples) not in tried))
    return Search(trials, (down.best, *(g for g in found.ranking if g != down.best)))


def search_levels(
    fit: Fit, batch: Batch, nfe: int, start: LeapGrid | FreeGrid, *, passes: int = 2, step: float = 1.25
) -> Search[FreeGrid]:
    """Coordinate descent over every level of a grid, from where the search of a family ended.

    Parameters
    ----------
    fit, batch, nfe : as for :func:`search_grid`.
    start : the first grid.
    passes : passes over all levels; the descent ends early where a pass changes nothing.
    step : the first factor, above 1.

    Returns
    -------
    The trials, and the best grid.

    Raises
    ------
    InputError : the start cannot be fitted, or `step` is not above 1.
    GridError : `start` is no grid of `nfe` evaluations.
    """
    schedule, levels = batch.ode.schedule, Levels.of(batch)
    objective = cache(two_fold(fit, replace(batch, ode=cached(batch.ode)), nfe))
    first = FreeGrid.of(start.times(nfe, schedule, batch.taught.t_start), schedule)
    moves = [lambda grid, factor, k=k: grid.moved(k, factor, levels) for k in range(len(first.levels))]
    if not bool(torch.isfinite(objective(first, len(batch))).all()):
        raise InputError("the grid to start from could not be fitted: the model is not finite on it.")
    return coordinate_descent(objective, first, moves, passes=passes, step=step, samples=len(batch))


def _failed(samples: int) -> Tensor:
    return torch.full((samples,), math.inf, dtype=torch.float64, device="cpu")


def _around(inner: Tensor, schedule: Schedule, t_start: float) -> Tensor:
    """The grid with these times between the start and the data."""
    return as_grid(check_grid(schedule, torch.cat([as_grid([t_start]), inner, as_grid([schedule.t_data])])))
