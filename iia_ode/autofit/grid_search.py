"""The search for the best grid by closed-form fits: most grids are judged without the model, a few with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..checks import check_whole
from ..errors import GridError, InputError, NonFiniteError
from ..iia.batch import Batch
from ..iia.ranking import cauchy_mean
from ..ode import cached
from ..plan import Plan
from .grids import FreeGrid, LeapGrid, Levels
from .nearby import Correction, Gains, Nearby, Watched, watched
from .search import Move, coordinate_descent

__all__ = ["Fit", "Grid", "Search", "own_errors", "search_grid", "two_fold"]

_ROWS = 60  # components of all samples, below which a fit could follow its own samples
_CLIMB, _FREE = 0.5, 0.55  # share of the trials for rising first levels at most, and before single levels move
_APART = 1.6  # least ratio of first levels that rise
_PASSES = 2  # of a descent over predicted errors
_ALIKE = math.log(1.15)  # ratio of the numbers of leap grids that count as copies
_F64 = torch.float64

Grid: TypeAlias = LeapGrid | FreeGrid

Fit: TypeAlias = Callable[[Batch, Tensor], Plan]
"""Maps a batch with a teacher, and a grid, to a fitted plan."""


@dataclass(frozen=True, eq=False)
class Search:
    """The grids that were tried with the model.

    Attributes
    ----------
    trials : errors and changes of each grid, in order.
    """

    trials: dict[Grid, Watched] = field(default_factory=dict)

    @property
    def ranking(self) -> list[Grid]:
        """The grids, the lowest risk first."""
        return sorted(self.trials, key=lambda g: self.trials[g].risk)

    @property
    def best(self) -> Grid:
        """The grid with the lowest risk."""
        return self.ranking[0]


def two_fold(fit: Fit, batch: Batch, nfe: int) -> Callable[[Grid], Tensor]:
    """Two-fold cross-validation of grids: each half of the samples is judged by the fit to the other half.

    Parameters
    ----------
    fit : how a grid is fitted.
    batch : samples with a teacher.
    nfe : number of evaluations.

    Returns
    -------
    A function from a grid to the errors of all samples, infinite where the grid cannot be fitted.
    """

    def errors(times: Tensor) -> Tensor:
        half = max(1, len(batch) // 2)
        first, second = (batch[:half], batch[half:]) if len(batch) > 1 else (batch, batch)
        of_second = second.errors(fit(first, times))
        return torch.cat([first.errors(fit(second, times)), of_second])[: len(batch)]

    return lambda grid: _finite(lambda times: Watched(errors(times)), batch, nfe, grid).errors


def own_errors(fit: Fit, batch: Batch, nfe: int) -> Callable[[Grid], Tensor]:
    """Errors of a fit on its own samples, at half the cost of :func:`two_fold`.

    For samples with few components, which a fit can follow closely, the errors are those of :func:`two_fold`.

    Parameters
    ----------
    fit, batch, nfe : as for :func:`two_fold`.

    Returns
    -------
    A function from a grid to the errors of all samples, infinite where the grid cannot be fitted.
    """
    if _few(batch):
        return two_fold(fit, batch, nfe)
    return lambda grid: _finite(lambda times: Watched(batch.errors(fit(batch, times))), batch, nfe, grid).errors


def _tried(fit: Fit, batch: Batch, nfe: int, grid: Grid, gains: Gains) -> Watched:
    """The trial of a grid with the model: :func:`own_errors` with changes, and a measurement of the gains."""
    if _few(batch):
        return Watched(two_fold(fit, batch, nfe)(grid))
    return _finite(lambda times: watched(fit(batch, times), batch, gains), batch, nfe, grid)


def _finite(trial: Callable[[Tensor], Watched], batch: Batch, nfe: int, grid: Grid) -> Watched:
    """A trial of a grid; infinite errors where the grid is none, or where a sample is lost."""
    try:
        found = trial(grid.times(nfe, batch.ode.schedule, batch.taught.t_start))
    except (GridError, NonFiniteError):
        found = None
    if found is not None and bool(torch.isfinite(found.errors).all()):
        return found
    return Watched(torch.full((len(batch),), math.inf, dtype=_F64, device="cpu"))


def search_grid(
    fit: Fit,
    batch: Batch,
    nfe: int,
    candidates: Sequence[LeapGrid],
    *,
    trials: int = 8,
    thin: bool = True,
) -> Search:
    """The best grid among leap grids, grids near them, and grids with single levels moved.

    Errors near the teacher's trajectories are predicted without the model (:class:`~iia_ode.autofit.nearby.Nearby`). The grid
    with the lowest prediction is tried with the model. Each trial corrects the predictions, and the corrected
    predictions choose the next trial.

    Predictions do not know of samples that end in another mode, and more samples do so the lower the first level. The first
    trials therefore go on to higher first levels for as long as that lowers the :attr:`~iia_ode.autofit.nearby.Watched.risk`.
    The trial with the lowest risk is the best.

    Parameters
    ----------
    fit : how a grid is fitted.
    batch : samples [B, ...] with a teacher.
    nfe : number of evaluations, at least 2.
    candidates : leap grids to start from.
    trials : number of grids that are tried with the model, at least 1.
    thin : whether predictions may use some of the components of samples that have many; not for fits with maps over the
        components.

    Returns
    -------
    The trials with the model.

    Raises
    ------
    InputError : no candidate could be fitted.
    """
    check_whole("trials", trials, least=1)
    search = _GridSearch(fit, batch, nfe, thin)
    made = search.found.trials
    pool: list[Grid] = [g for g in dict.fromkeys(candidates) if g.fits(search.levels)]
    if nfe == 2:  # one free level
        pool = list({g.sigma_1: g for g in pool if isinstance(g, LeapGrid)}.values())
    # A low first level is exact for most samples, and sends a few to another mode, which the few samples here do not show.
    least = 0.95 * min((_first(g) for g in pool), default=0.0)

    def order(start: Grid, single: bool = False) -> list[Grid]:
        """The grids of the pool and those around a grid, the lowest predictions first."""
        near = search.descended(start, single=single)
        pool.extend(g for g in near if g not in pool and _first(g) >= least)
        return sorted((g for g in pool if g not in made), key=lambda g: _mean(search.guess(g)))

    if pool:
        for grid in _rising(order(min(pool, key=lambda g: _mean(search.guess(g)))))[: math.ceil(_CLIMB * trials)]:
            search.make(grid)
            if search.found.best != grid:
                break
        search.predict()
        while len(made) < trials and (left := order(search.found.best, single=len(made) >= _FREE * trials)):
            search.make(next((g for g in left if not any(_alike(g, other) for other in made)), left[0]))
    if not made or not math.isfinite(made[search.found.best].risk):
        raise InputError("no candidate has finite errors: the model is not finite, or no candidate is usable.")
    return search.found


class _GridSearch:
    """The trials of a search so far, and predictions for other grids."""

    def __init__(self, fit: Fit, batch: Batch, nfe: int, thin: bool) -> None:
        self.fit, self.nfe, self.gains = fit, nfe, Gains(batch.taught.record.data_size)
        self.batch = replace(batch, ode=cached(batch.ode))
        self.near = Nearby.of(batch, self.gains, thin=thin).batch
        self.levels = Levels.of(batch)
        self.found = Search()
        self.predict()

    def predict(self) -> None:
        """Renew the predictions with the gains that were measured since."""
        self._predicted = cache(own_errors(self.fit, self.near, self.nfe))
        self._correct()

    def guess(self, grid: Grid) -> Tensor:
        """The predicted errors of a grid, times the ratio of real to predicted errors of the trials near it."""
        found = self._predicted(grid)
        return found * self._ratio(self._place(grid)) if bool(torch.isfinite(found).all()) else found

    def make(self, grid: Grid) -> None:
        """Try a grid with the model."""
        self.found.trials[grid] = _tried(self.fit, self.batch, self.nfe, grid, self.gains)
        self._correct()

    def descended(self, grid: Grid, *, single: bool) -> list[Grid]:
        """Grids that a coordinate descent over predicted errors passes from a leap grid on, or its end over single levels."""
        moves: list[Move[Any]]
        if single and self.nfe > 2:
            schedule = self.batch.ode.schedule
            grid = FreeGrid.of(grid.times(self.nfe, schedule, self.batch.taught.t_start), schedule)
            moves = [partial(_moved, self.levels, k) for k in range(len(grid.levels))]
        elif isinstance(grid, LeapGrid):
            names = ("sigma_1", "sigma_min", "rho") if self.nfe > 2 else ("sigma_1",)
            moves = [partial(_moved, self.levels, name) for name in names]
        else:
            return []
        best, made = coordinate_descent(self.guess, grid, moves, passes=_PASSES, step=1.25 if single else 1.4)
        return [best] if single else list(made)

    def _correct(self) -> None:
        made = {g: (found.errors, self._predicted(g)) for g, found in self.found.trials.items()}
        finite = {g: pair for g, pair in made.items() if bool(torch.isfinite(torch.stack(pair)).all())}
        ratios = [math.log(_typical(real) / _typical(guess)) for real, guess in finite.values()]
        self._ratio = Correction.of([self._place(g) for g in finite], ratios)

    def _place(self, grid: Grid) -> Tensor:
        """Logarithms of the levels of a grid after the start, float64 [nfe - 1]."""
        schedule = self.batch.ode.schedule
        times = grid.times(self.nfe, schedule, self.batch.taught.t_start)[1:-1]
        return torch.tensor([math.log(schedule.noise_to_signal(t)) for t in times.tolist()], dtype=_F64, device="cpu")


def _moved(levels: Levels, coordinate: Any, grid: Any, factor: float) -> Grid | None:
    """A grid with a scaled number or level."""
    found: Grid | None = grid.moved(coordinate, factor, levels)
    return found


def _rising(order: Sequence[Grid]) -> list[Grid]:
    """The first grid of an order, then the first of those whose first level is a ratio higher, and so on."""
    found = list(order[:1])
    while above := [g for g in order if _first(g) >= _APART * _first(found[-1])]:
        near = [g for g in above if _first(g) < _APART**2 * _first(found[-1])]
        found.append((near or above)[0])
    return found


def _first(grid: Grid) -> float:
    """Level of the second evaluation."""
    return grid.sigma_1 if isinstance(grid, LeapGrid) else max(grid.levels, default=math.inf)


def _mean(errors: Tensor) -> float:
    """The mean square of predicted errors: they have no outliers, and samples with large gains count."""
    return float(errors.square().mean())


def _typical(errors: Tensor) -> float:
    """The Cauchy mean of errors with the scale of :func:`~iia_ode.iia.ranking.ranked`; positive."""
    return max(cauchy_mean(errors, 4 * float(errors.median()) or math.inf), 1e-300)


def _alike(a: Grid, b: Grid) -> bool:
    if not isinstance(a, LeapGrid) or not isinstance(b, LeapGrid):
        return False
    pairs = ((a.sigma_1, b.sigma_1), (a.sigma_min, b.sigma_min), (a.rho, b.rho))
    return all(abs(math.log(v / w)) < _ALIKE for v, w in pairs)


def _few(batch: Batch) -> bool:
    return len(batch) * batch.x[0].numel() < _ROWS
