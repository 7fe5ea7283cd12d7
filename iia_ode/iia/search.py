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
from ..ode import ProbabilityFlowODE
from ..plan import Plan
from .endpoint import by_robust_error, chunks_of, per_sample, robust_mean
from .families import FreeGrid, LeapGrid
from .remembered import RememberedODE
from .teacher import Teacher

__all__ = [
    "Bench",
    "Fit",
    "Fold",
    "GridSearch",
    "Trial",
    "check_rounds",
    "fold_of",
    "samples_of",
    "search_grid",
    "search_levels",
]

_FEWEST = 16  # samples of a round: half of them are fitted to
_Grid = TypeVar("_Grid", "LeapGrid", "FreeGrid")


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

Fold = Callable[[ProbabilityFlowODE, Tensor, Tensor, Teacher, slice, slice], Tensor]
"""The same with all states of a trial, then those to fit to and those to judge by: the final states of the latter."""


def fold_of(fit: Fit, chunk_size: int) -> Fold:
    """The samples to judge by, run after the fit to the others, `chunk_size` at a time."""

    def fold(ode: ProbabilityFlowODE, times: Tensor, x: Tensor, teacher: Teacher, own: slice, other: slice) -> Tensor:
        n = len(x)
        plan = fit(ode.subset(own, n), times, x[own], teacher.subset(own))
        with torch.no_grad():
            return torch.cat([plan.run(ode.subset(i, n), x[i]) for i in chunks_of(other.start, other.stop, chunk_size)])

    return fold


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
    bench = Bench(fold_of(fit, chunk_size), RememberedODE.of(ode), x, teacher, nfe)
    return bench.search_grid(candidates, rounds=rounds, descent=descent, report=report)


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
    bench = Bench(fold_of(fit, chunk_size), RememberedODE.of(ode), x, teacher, nfe)
    return bench.search_levels(start, passes=passes, step=step, report=report)


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
    """What candidates are tried on; remembers what came of them.

    Attributes
    ----------
    fold : how a candidate is fitted to some samples and run on others.
    ode, x, teacher : the model, initial states [B, ...] and their trajectories.
    nfe : evaluations.
    trials : so far.
    """

    fold: Fold
    ode: ProbabilityFlowODE
    x: Tensor
    teacher: Teacher
    nfe: int
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
                errors = self._none(samples)
            self.trials.append(known := Trial(grid, errors, samples))
        return known

    def ranked(self, grids: Sequence[_Grid], samples: int, *, last: bool) -> list[_Grid]:
        """The grids, best first."""
        return by_robust_error(grids, lambda g: self.attempt(g, samples).errors, outliers_too=last)

    def judge(self, times: Tensor, samples: int) -> Tensor:
        """Errors of the first `samples`: each half is judged by the fit to the other; infinite where there is no such fit."""
        half = max(1, samples // 2)
        halves = (slice(0, half), slice(half, samples)) if samples > 1 else (slice(0, 1), slice(0, 1))
        whole = slice(0, samples)
        ode, x, teacher = self.ode.subset(whole, len(self.x)), self.x[whole], self.teacher.subset(whole)
        found = []
        try:
            for own, other in (halves, halves[::-1]):
                final = self.fold(ode, times, x, teacher, own, other).cpu().double()
                found.append(per_sample(final - teacher.final[other].cpu().double()))
        except (GridError, NonFiniteError):
            return self._none(samples)
        errors = torch.cat(found[::-1])[:samples]
        return errors if bool(torch.isfinite(errors).all()) else self._none(samples)

    def search_grid(
        self,
        candidates: Sequence[LeapGrid],
        *,
        rounds: Sequence[tuple[float, int]],
        descent: int,
        report: Callable[[str], None] | None = None,
    ) -> GridSearch[LeapGrid]:
        """See :func:`search_grid`."""
        check_rounds(rounds)
        top, floor = self.range
        alive = [g for g in dict.fromkeys(candidates) if _in_order(g, top, floor)]
        if self.nfe == 2:
            alive = list({g.sigma_1: g for g in alive}.values())
        samples = len(self.x)
        for i, (share, keep) in enumerate(rounds, start=1):
            samples = samples_of(share, len(self.x))
            alive = self.ranked(alive, samples, last=i == len(rounds))[:keep]
            if report and alive:
                report(
                    f"{len(self.trials)} grids tried on {samples} samples, error {self.attempt(alive[0], samples).error:.4g}"
                )
        if not alive or not math.isfinite(self.attempt(alive[0], samples).error):
            raise InputError("no grid could be fitted: the model is not finite, or the teacher reaches too few levels.")
        best, step = alive[0], 1.4
        for _ in range(descent):
            for name in ("sigma_1", "sigma_min", "rho") if self.nfe > 2 else ("sigma_1",):
                moved = [replace(best, **{name: getattr(best, name) * f}) for f in (step, 1 / step)]
                best = self.ranked([best, *(g for g in moved if _in_order(g, top, floor))], samples, last=True)[0]
            step = math.sqrt(step)
        return GridSearch(tuple(self.trials), (best, *(g for g in alive if g != best)))

    def search_levels(
        self,
        start: LeapGrid | FreeGrid,
        *,
        passes: int,
        step: float = 1.25,
        report: Callable[[str], None] | None = None,
    ) -> GridSearch[FreeGrid]:
        """See :func:`search_levels`."""
        if not step > 1:
            raise InputError(f"step is the factor by which levels are moved, above 1, got {step!r}.")
        top, floor = self.range
        best = FreeGrid.of(start.times(self.nfe, self.ode.schedule, self.start), self.ode.schedule)
        if not math.isfinite(self.attempt(best, len(self.x)).error):
            raise InputError("the grid to start from could not be fitted: the model is not finite on it.")
        for _ in range(passes):
            before = best
            for k in range(len(best.levels)):
                moved = [(*best.levels[:k], best.levels[k] * f, *best.levels[k + 1 :]) for f in (step, 1 / step)]
                inside = [FreeGrid(m) for m in moved if _decreasing((top, *m, floor)[k : k + 3])]
                best = self.ranked([best, *inside], len(self.x), last=True)[0]
            if report:
                report(f"{len(self.trials)} grids tried, error {self.attempt(best, len(self.x)).error:.4g}")
            if best == before:
                break
            step = math.sqrt(step)
        return GridSearch(tuple(self.trials), (best,))

    @staticmethod
    def _none(samples: int) -> Tensor:
        return torch.full((samples,), math.inf, dtype=torch.float64, device="cpu")
