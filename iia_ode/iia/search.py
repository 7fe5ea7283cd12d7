"""Grids found by trial: every candidate is fitted in closed form and judged by its final states on other samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..errors import GridError, InputError, NonFiniteError
from ..grids import karras
from ..grids.base import as_grid, times_of
from ..ode import ProbabilityFlowODE
from ..plan import Plan, check_grid
from ..schedules import Schedule
from .endpoint import by_robust_error, endpoint_errors, robust_mean
from .remembered import RememberedODE
from .teacher import Teacher

__all__ = [
    "Fit",
    "FreeGrid",
    "GridSearch",
    "LeapGrid",
    "Trial",
    "leap_grids",
    "samples_of",
    "search_grid",
    "search_levels",
]

_FEWEST = 16  # samples of a round: half of them are fitted to
_Grid = TypeVar("_Grid", "LeapGrid", "FreeGrid")


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


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate, and the root mean square error of each final state on samples that it was not fitted to, float64."""

    grid: LeapGrid | FreeGrid
    errors: Tensor
    samples: int

    @property
    def error(self) -> float:
        """Root mean square over all of them."""
        return robust_mean(self.errors, math.inf)


@dataclass(frozen=True, eq=False)
class GridSearch(Generic[_Grid]):
    """The outcome of a search: all trials in order, and what is left of the candidates, best first."""

    trials: tuple[Trial, ...]
    ranking: tuple[_Grid, ...]

    @property
    def best(self) -> _Grid:
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
    rounds: Sequence[tuple[float, int]] = ((0.25, 8), (1.0, 3)),
    descent: int = 2,
    chunk_size: int = 64,
    report: Callable[[str], None] | None = None,
) -> GridSearch[LeapGrid]:
    """Successive halving over the candidates, then coordinate descent from the best of them.

    In each trial the samples are cut in half, and each half is judged by the `fit` to the other; what wins on few samples is
    tried again on more: neither the noise of a candidate nor its fit decides alone. The teacher costs nothing more,
    whatever the grid. As long as there are others to compare with, a sample in a hundred that ends in another mode counts
    less; in the last round and the descent it counts in full too (``outliers_too`` of
    :func:`~iia_ode.iia.endpoint.by_robust_error`), because there are enough samples then to know how rare it is.

    Parameters
    ----------
    fit : how a grid is fitted.
    ode, x, teacher : the model, initial states [B, ...] and their trajectories.
    nfe : evaluations, at least 2 for there to be anything to choose.
    candidates : where to look.
    rounds : (share of the samples, candidates to keep) of each round; at least 16 samples where there are as many.
    descent : passes over (sigma_1, sigma_min, rho), each changed up and down by a factor, which is halved every pass.
    chunk_size : samples that go through the model at once where a candidate is judged.
    report : is told how far the search is.

    Raises
    ------
    InputError : no candidate could be fitted.
    """
    check_rounds(rounds)
    bench = Bench(fit, RememberedODE(ode), x, teacher, nfe, chunk_size)
    top, floor = bench.range
    alive = [g for g in dict.fromkeys(candidates) if _in_order(g, top, floor)]
    if nfe == 2:
        alive = list({g.sigma_1: g for g in alive}.values())
    samples = len(x)
    for i, (share, keep) in enumerate(rounds, start=1):
        samples = samples_of(share, len(x))
        alive = bench.ranked(alive, samples, last=i == len(rounds))[:keep]
        if report and alive:
            report(
                f"{len(bench.trials)} grids tried on {samples} samples, error {bench.attempt(alive[0], samples).error:.4g}"
            )
    if not alive or not math.isfinite(bench.attempt(alive[0], samples).error):
        raise InputError("no grid could be fitted: the model is not finite, or the teacher reaches too few levels.")
    best, step = alive[0], 1.4
    for _ in range(descent):
        for name in ("sigma_1", "sigma_min", "rho") if nfe > 2 else ("sigma_1",):
            moved = [replace(best, **{name: getattr(best, name) * f}) for f in (step, 1 / step)]
            best = bench.ranked([best, *(g for g in moved if _in_order(g, top, floor))], samples, last=True)[0]
        step = math.sqrt(step)
    return GridSearch(tuple(bench.trials), (best, *(g for g in alive if g != best)))


def search_levels(
    fit: Fit,
    ode: ProbabilityFlowODE,
    x: Tensor,
    teacher: Teacher,
    nfe: int,
    start: LeapGrid | FreeGrid,
    *,
    passes: int = 2,
    step: float = 1.25,
    chunk_size: int = 64,
    report: Callable[[str], None] | None = None,
) -> GridSearch[FreeGrid]:
    """Coordinate descent over every level of a grid on its own, with a fit in closed form at each candidate.

    From where a family of grids ends, such as the outcome of :func:`search_grid`. Each pass moves every level up and down by
    a factor and keeps what ends nearer the truth, judged as there; the factor is drawn in by its square root every pass.

    Parameters
    ----------
    fit, ode, x, teacher, chunk_size, report : as for :func:`search_grid`.
    nfe : evaluations.
    start : where to begin.
    passes : over all levels; it ends sooner where one moves nothing.
    step : the first factor, above 1.

    Raises
    ------
    InputError : the start cannot be fitted, or the step is not above 1.
    GridError : the start is no grid of so many evaluations.
    """
    if not step > 1:
        raise InputError(f"step is the factor by which levels are moved, above 1, got {step!r}.")
    bench = Bench(fit, RememberedODE(ode), x, teacher, nfe, chunk_size)
    top, floor = bench.range
    best = FreeGrid.of(start.times(nfe, ode.schedule, bench.start), ode.schedule)
    if not math.isfinite(bench.attempt(best, len(x)).error):
        raise InputError("the grid to start from could not be fitted: the model is not finite on it.")
    for _ in range(passes):
        before = best
        for k in range(len(best.levels)):
            moved = [(*best.levels[:k], best.levels[k] * f, *best.levels[k + 1 :]) for f in (step, 1 / step)]
            inside = [FreeGrid(m) for m in moved if _decreasing((top, *m, floor)[k : k + 3])]
            best = bench.ranked([best, *inside], len(x), last=True)[0]
        if report:
            report(f"{len(bench.trials)} grids tried, error {bench.attempt(best, len(x)).error:.4g}")
        if best == before:
            break
        step = math.sqrt(step)
    return GridSearch(tuple(bench.trials), (best,))


def check_rounds(rounds: Sequence[tuple[float, int]]) -> None:
    """Refuse rounds that are no shares and counts (InputError)."""
    for share, keep in rounds:
        if not (0 < share <= 1 and isinstance(keep, int) and keep >= 1):
            raise InputError(
                f"a round is a share of the samples, above 0 and at most 1, and a number of candidates to keep, at least 1: "
                f"got ({share!r}, {keep!r})."
            )
    if not rounds:
        raise InputError("a search needs at least one round.")


def samples_of(share: float, batch: int) -> int:
    """How many samples a round takes."""
    return min(batch, max(_FEWEST, round(share * batch)))


def _in_order(grid: LeapGrid, top: float, floor: float) -> bool:
    return floor < grid.sigma_min < 0.9 * grid.sigma_1 and grid.sigma_1 < 0.95 * top and 1 <= grid.rho <= 20


def _decreasing(levels: Sequence[float]) -> bool:
    return all(a > 1.02 * b for a, b in pairwise(levels))


@dataclass(frozen=True, eq=False)
class Bench:
    """What candidates are tried on; remembers what came of them."""

    fit: Fit
    ode: ProbabilityFlowODE
    x: Tensor
    teacher: Teacher
    nfe: int
    chunk_size: int
    trials: list[Trial] = field(default_factory=list)

    @property
    def start(self) -> float:
        """The time that all runs start at."""
        return float(self.teacher.about["t_start"])

    @property
    def range(self) -> tuple[float, float]:
        """The levels sigma/alpha of the start and of the smallest that may be asked for; all others lie between."""
        schedule = self.ode.schedule
        top = schedule.noise_to_signal(self.start) if schedule.alpha(self.start) > 0 else math.inf
        return top, max(float(self.teacher.about["sigma_min"]), schedule.noise_to_signal(schedule.t_data))

    def attempt(self, grid: LeapGrid | FreeGrid, samples: int) -> Trial:
        """The grid on the first `samples`."""
        known = next((t for t in self.trials if (t.grid, t.samples) == (grid, samples)), None)
        if known is None:
            try:
                times = grid.times(self.nfe, self.ode.schedule, self.start)
                errors = self.judge(times, samples)
            except GridError:
                errors = torch.full((samples,), math.inf, dtype=torch.float64, device="cpu")
            self.trials.append(known := Trial(grid, errors, samples))
        return known

    def ranked(self, grids: Sequence[_Grid], samples: int, *, last: bool) -> list[_Grid]:
        """The grids, best first."""
        return by_robust_error(grids, lambda g: self.attempt(g, samples).errors, outliers_too=last)

    def judge(self, times: Tensor, samples: int) -> Tensor:
        """Errors of the first `samples`: each half is judged by the fit to the other; infinite where there is no such fit."""
        half = max(1, samples // 2)
        halves = (slice(0, half), slice(half, samples)) if samples > 1 else (slice(0, 1), slice(0, 1))
        found, n = [], len(self.x)
        try:
            for own, other in (halves, halves[::-1]):
                plan = self.fit(self.ode.subset(own, n), times, self.x[own], self.teacher.subset(own))
                found.append(
                    endpoint_errors(
                        plan, self.ode, self.x, self.teacher.final, other, chunk_size=self.chunk_size, check_finite=True
                    )
                )
        except (GridError, NonFiniteError):
            return torch.full((samples,), math.inf, dtype=torch.float64, device="cpu")
        return torch.cat(found[::-1])[:samples]
