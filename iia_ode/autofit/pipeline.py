"""Pipelines of a search (start, grid and kind of weights), and the contenders that pipelines produce."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..iia.batch import Batch
from ..iia.directions import Window
from ..iia.provenance import Ingredient, StageCost
from ..iia.ranking import cauchy_mean
from ..iia.refinement import Refinement
from ..iia.stepwise import Stepwise, StepwiseFit
from ..plan import Plan
from ..schedules import Schedule
from ..warm_starts import Moments, WarmStart
from .grids import FreeGrid, LeapGrid, Levels

__all__ = ["RIDGE", "SCALARS", "Contender", "Parts", "Pipeline", "Start", "Weights", "joined", "weights_of"]

RIDGE = 1e-7  # of fits without a choice of the ridge; keeps weights of nearly parallel directions small
_HELD_OUT = 0.2  # share of the samples for the choice of the ridge


@dataclass(frozen=True, eq=False)
class Weights:
    """A kind of weights in a closed-form fit.

    Attributes
    ----------
    name : name in reports.
    terms, intercept : options of :class:`~iia_ode.IIA`.
    """

    name: str
    terms: Window
    intercept: bool = False

    @property
    def groups(self) -> int:
        """Numbers per weight."""
        projections = self.terms.projections
        return 1 if projections is None else projections.count


SCALARS = Weights("scalars", Window())


def weights_of(shape: Sequence[int], *, intercepts: bool = True) -> list[Weights]:
    """The kinds of weights for samples of a shape, scalars first; bands are for images [C, H, W].

    The energy of images falls steeply with frequency. At any noise level, low frequencies have emerged further from the noise
    than high frequencies, and brightness further than color. A weight per band can therefore gain over a single weight.
    """
    found = [SCALARS]
    if len(shape) == 3 and min(shape[1:]) >= 4:
        bands = Window(4 if min(shape[1:]) >= 8 else 2, "luma-chroma" if shape[0] == 3 else None, tuple(shape))
        found.append(Weights("bands", bands))
    if intercepts:
        found += [Weights("intercept" if w is SCALARS else f"{w.name}, intercept", w.terms, True) for w in found]
    return found


@dataclass(frozen=True, eq=False)
class Hint:
    """Where a search for another number of evaluations of the same model begins.

    Attributes
    ----------
    family : the best leap grid.
    weights : the best kind of weights.
    """

    family: LeapGrid
    weights: Weights

    def near(self, levels: Levels) -> list[LeapGrid]:
        """Leap grids near the family, all of them inside the levels."""
        own = self.family
        near = [
            LeapGrid(own.sigma_1 * f, own.sigma_min * g, own.rho)
            for f in (1.0, 0.7, 0.5, 1.4)
            for g in (1.0, 0.7, 1.4, 2.0)
        ]
        return [grid for grid in near if grid.fits(levels)] or [own]


@dataclass(frozen=True, eq=False)
class Start:
    """A kind of warm start. Its fit uses all training samples, even where the weights are fitted to a few samples.

    Attributes
    ----------
    name : name in reports.
    train : the training samples.
    moments : moments of the data for a gain per direction; None for one gain.
    key, labels : a condition and its values [n], for a constant per value; None for one constant.
    """

    name: str
    train: Batch
    moments: Moments | None = None
    key: str | None = None
    labels: Tensor | None = None

    def take(self, batch: Batch, grid: Tensor) -> tuple[WarmStart, Batch, Tensor]:
        """Fit the warm start over the first interval of a grid; return it with the batch and the grid after the interval."""
        t, s = (float(v) for v in grid[:2])
        before, after = self.train.x.cpu(), self.train.taught.at(s)
        warm = WarmStart.affine(
            batch.ode.schedule, t, s, before, after, over=self.moments, labels=self.labels, per=self.key
        )
        y = warm.apply(batch.x, batch.ode)
        return warm, replace(batch, x=y, teacher=batch.taught.restarted(s, y)), grid[1:]


@dataclass(frozen=True, eq=False)
class Parts:
    """A warm start, if any, and the fit from its end."""

    warm: WarmStart | None
    fit: StepwiseFit

    @property
    def plan(self) -> Plan:
        """The plan from the start of the grid."""
        return joined(self.warm, self.fit.plan)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A recipe of a closed-form fit: the kind of start, the grid and the kind of weights.

    Attributes
    ----------
    method : the sequential fit; the pipeline replaces its terms, intercept and ridge.
    nfe : number of evaluations of the solver.
    t_start : time of the initial states.
    start : the warm start; None for a cold start.
    grid : the grid; by default the single step from start to data.
    family : the leap grid from which the levels of `grid` were moved.
    weights : the kind of weights.
    """

    method: Stepwise
    nfe: int
    t_start: float
    start: Start | None = None
    grid: LeapGrid | FreeGrid = FreeGrid(())
    family: LeapGrid | None = None
    weights: Weights = SCALARS

    @property
    def kind(self) -> tuple[bool, bool]:
        """Whether the start is warm, and whether it depends on a condition."""
        return self.start is not None, self.start is not None and self.start.key is not None

    @property
    def start_name(self) -> str:
        """Name of the warm start in reports; empty for a cold start."""
        return "" if self.start is None else f"warm start {self.start.name}, "

    @property
    def name(self) -> str:
        """Name in reports."""
        return f"{self.start_name}{self.weights.name}"

    @property
    def levels(self) -> int:
        """Number of grid points before the data: a warm start takes one interval without an evaluation."""
        return self.nfe + (self.start is not None)

    def times(self, schedule: Schedule) -> Tensor:
        """The grid, float64 [levels + 1]."""
        return self.grid.times(self.levels, schedule, self.t_start)

    def plan(self, batch: Batch, grid: Tensor) -> Plan:
        """The plan of a quick closed-form fit on a grid, with a fixed small ridge."""
        warm, batch, grid = self._started(batch, grid)
        return joined(warm, self._method(RIDGE).fit(batch, grid.tolist(), 0.0).plan)

    def fit(self, batch: Batch, *, ridge: float | str = "auto") -> Parts:
        """A closed-form fit on the pipeline's grid. For ``ridge="auto"`` a fifth of the batch is held out."""
        warm, batch, grid = self._started(batch, self.times(batch.ode.schedule))
        share = _HELD_OUT if ridge == "auto" else 0.0
        return Parts(warm, self._method(ridge).fit(batch, grid.tolist(), share))

    def _started(self, batch: Batch, grid: Tensor) -> tuple[WarmStart | None, Batch, Tensor]:
        return (None, batch, grid) if self.start is None else self.start.take(batch, grid)

    def _method(self, ridge: float | str) -> Stepwise:
        return replace(self.method, terms=self.weights.terms, intercept=self.weights.intercept, ridge=ridge)


@dataclass(frozen=True, eq=False)
class Contender:
    """A solver of a search, and a candidate for the result.

    Attributes
    ----------
    name : name in reports.
    plan : the solver.
    errors : endpoint errors per sample, float64 [n], on the held-out samples, then on fresh samples if there are any.
    cost : cost of the solver.
    pipeline : recipe of the solver; None for a solver without a fit.
    fit : the closed-form fit; None for a refined solver.
    refinement : the refinement; None for a closed-form fit.
    warm : the warm start; None for a cold start.
    risk : for a closed-form fit, the risk of its errors and changes; see :class:`~iia_ode.autofit.nearby.Watched`.
    """

    name: str
    plan: Plan
    errors: Tensor
    cost: StageCost
    pipeline: Pipeline | None = None
    fit: StepwiseFit | None = None
    refinement: Refinement | None = None
    warm: WarmStart | None = None
    risk: float | None = None

    def __str__(self) -> str:
        error = self.error
        found = "not finite" if error is None else f"error {error:.4g}, median {float(self.errors.median()):.4g}"
        return f"{self.name}: {found}"

    @property
    def error(self) -> float | None:
        """Root mean square endpoint error; None if not finite."""
        error = cauchy_mean(self.errors, math.inf)
        return error if math.isfinite(error) else None

    def judged(self, errors: Tensor) -> Contender:
        """The contender with the errors of more samples, which count in place of the risk."""
        return replace(self, errors=torch.cat([self.errors, errors]), risk=None)

    def ingredient(self, *, chosen: bool) -> Ingredient:
        """The entry in the record of the search."""
        return Ingredient(self.name, self.error, self.cost.sample_evaluations, self.cost.seconds, chosen)


def joined(warm: WarmStart | None, rest: Plan) -> Plan:
    """The plan of a warm start, if any, followed by a plan."""
    return rest if warm is None else warm.then(rest)
