"""Families of grids that a fitted solver can take: a leap and then Karras et al.'s, and any levels at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GridError
from ..grids import karras
from ..grids.base import as_grid, times_of
from ..plan import check_grid
from ..schedules import Schedule

__all__ = ["FreeGrid", "LeapGrid", "leap_grids"]


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
        return _around(rest, schedule, t_start)


@dataclass(frozen=True, order=True)
class FreeGrid:
    """A grid of any levels.

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


def _around(inner: Tensor, schedule: Schedule, t_start: float) -> Tensor:
    """The grid with these times between the start and the data."""
    return as_grid(check_grid(schedule, torch.cat([as_grid([t_start]), inner, as_grid([schedule.t_data])])))


def leap_grids(start: float, scale: float) -> list[LeapGrid]:
    """Candidates between the level `start` and the data, for data of root mean square `scale`."""
    firsts = [scale * f for f in (3.5, 5.0, 7.0, 10.0, 16.0, 32.0, 80.0)]
    firsts = [a for a in firsts if a < 0.9 * start] or [start * f for f in (0.8, 0.6, 0.4)]
    lasts = [scale * f for f in (0.5, 0.25, 0.12, 0.05, 0.015)]
    lasts = [b for b in lasts if b < 0.5 * firsts[0]] or [firsts[0] * f for f in (0.3, 0.1)]
    return [LeapGrid(a, b, 5.0) for a in firsts for b in lasts]
