"""Grids that a fitted solver can take: leap grids and grids of arbitrary levels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import GridError
from ..grids import karras
from ..grids.base import as_grid, times_of
from ..iia.batch import Batch
from ..plan import check_grid
from ..schedules import Schedule
from ..schedules.levels import lowest_level

__all__ = ["FreeGrid", "LeapGrid", "Levels", "leap_grids"]


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


def _around(inner: Tensor, schedule: Schedule, t_start: float) -> Tensor:
    """The grid with these times between the start and the data."""
    return as_grid(check_grid(schedule, torch.cat([as_grid([t_start]), inner, as_grid([schedule.t_data])])))
