"""Provenance of a fitted solver: typed accounts of the fit, its steps, its model and its search, and their JSON form.

The type annotations of the dataclasses are the schema of a file; :mod:`iia_ode.files` has the rules of a schema. JSON has no
number for NaN and infinity: a field stores None instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..errors import InputError
from ..ode.origin import Origin
from ..schedules.stored import brief
from ..sharing.records import InUse, Served
from ..teacher import TeacherOptions

__all__ = [
    "UNJUDGED",
    "Endpoint",
    "Ingredient",
    "Named",
    "Record",
    "RefinementRecord",
    "SearchRecord",
    "Split",
    "StageCost",
    "StepReport",
    "finite",
    "later",
    "raised",
]


@dataclass(frozen=True)
class Named:
    """A registered name with its options: a base solver or a target.

    Attributes
    ----------
    name : the registered name.
    options : every option by name, JSON-ready.
    """

    name: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return brief({**self.options, "name": self.name})


@dataclass(frozen=True)
class Endpoint:
    """Errors of the final states on held-out noise, and the decision made by them.

    Attributes
    ----------
    base, fit : root mean square endpoint error of the base and of the fit; None if not measured or not finite. After a
        search, `base` is the error of its rival, a solver without a fit.
    fell_back : whether the base is in use instead of the fit.
    reference : how the true final states were computed; ``"none"`` without a guard.
    why : reason of the guard for using the base; empty where the fit is in use.
    judged : number of held-out samples behind the decision; 0 without a guard. Training samples are not counted.
    needed : number of samples needed. Where the fit is in use: the samples that show, with a probability of at least 95%, any
        failure frequent enough to undo the gain. Where the base is in use: the samples for a clear gain, if further samples
        are like the samples seen. None where such a number does not exist.
    teacher_error : estimate of the root mean square error of the true final states themselves; None without them. The errors
        of base and fit are never reported below this error.
    """

    base: float | None
    fit: float | None
    fell_back: bool
    reference: str
    why: str
    judged: int = 0
    needed: int | None = None
    teacher_error: float | None = None

    @property
    def limits(self) -> str:
        """The failures that the judged samples cannot show, as a sentence without a full stop; empty without a guard."""
        if not self.judged:
            return ""
        share = "of any share" if self.judged <= 3 else f"with a share below {3 / self.judged:.2g}"
        told = f"judged on {self.judged} sample{'s' * (self.judged > 1)}, which may miss modes of the data {share}"
        if self.fell_back:
            number = "no number of" if self.needed is None else f"about {self.needed}"
            return f"{told}; {number} samples like these would show a clear gain"
        if self.needed is None:
            return told
        enough = "enough samples" if self.needed <= self.judged else f"{self.needed} samples would be needed"
        return f"{told}; {enough} to rule out failures that undo the gain"

    def known_to(self, teacher_error: float | None) -> Endpoint:
        """The same errors, raised to the error of the true final states where they are below it."""
        base, fit = (raised(error, teacher_error) for error in (self.base, self.fit))
        return replace(self, base=base, fit=fit, teacher_error=teacher_error)


UNJUDGED = Endpoint(None, None, False, "none", "")
"""The endpoint of a fit without a guard."""


@dataclass(frozen=True)
class StepReport:
    """The fit of one step.

    Attributes
    ----------
    index, t, s : number of the step, and its interval.
    symbols, values, base_values : symbols of the coefficients, values in use, and values of the base.
    corrections : corrections in use, in units of the directions; zeros where the step keeps the base.
    before, after : root mean square distance to the target per component on the training samples, of the base and of the
        least-squares solution.
    held_before, held_after : the same on held-out samples; None without any.
    accepted : whether the least-squares solution is in use; False where it did not help held-out samples.
    rank, condition : rank and condition number of the least-squares problem with columns of unit length.
    ridge : relative ridge in use.
    intercept : root mean square of the fitted constant; 0 without an intercept.
    """

    index: int
    t: float
    s: float
    symbols: tuple[str, ...]
    values: tuple[float, ...]
    base_values: tuple[float, ...]
    corrections: tuple[float, ...]
    before: float
    after: float
    held_before: float | None
    held_after: float | None
    accepted: bool
    rank: int
    condition: float
    ridge: float
    intercept: float

    def __post_init__(self) -> None:
        if not len(self.symbols) == len(self.values) == len(self.base_values) == len(self.corrections):
            raise InputError("fields `symbols`, `values`, `base_values` and `corrections` must have equal lengths")

    @property
    def gain(self) -> float:
        """Share of the residual removed by the fit, on held-out samples if there are any; negative if the residual grew."""
        before, after = self.before, self.after
        if self.held_before is not None and self.held_after is not None:
            before, after = self.held_before, self.held_after
        return 1 - after / before if before else 0.0


def later(reports: tuple[StepReport, ...], steps: int) -> tuple[StepReport, ...]:
    """The reports of a fit that follows `steps` other steps."""
    return tuple(replace(r, index=r.index + steps) for r in reports)


@dataclass(frozen=True)
class Ingredient:
    """One solver of a search: its error and its cost.

    Attributes
    ----------
    name : description of the solver.
    error : root mean square endpoint error on held-out noise; None if not finite, or if the attempt failed.
    sample_evaluations : cost in sample evaluations.
    seconds : cost in wall-clock time.
    chosen : whether the solver is the result.
    """

    name: str
    error: float | None
    sample_evaluations: int
    seconds: float
    chosen: bool = False


@dataclass
class StageCost:
    """Cost of one stage of a search, in sample evaluations and in seconds of wall-clock time."""

    sample_evaluations: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Split:
    """Size of a batch, and the number of held-out samples in it."""

    batch: int
    held_out: int


@dataclass(frozen=True)
class RefinementRecord:
    """The refinement behind the result of a search.

    Attributes
    ----------
    train, held_out : root mean square endpoint error (Cauchy mean) at the start and after each iteration, on training and
        on held-out samples; None where not finite.
    best : index of the iteration in use; 0 is the start.
    reason : why the refinement stopped.
    """

    train: tuple[float | None, ...]
    held_out: tuple[float | None, ...]
    best: int
    reason: str

    def __post_init__(self) -> None:
        if len(self.train) != len(self.held_out) or not 0 <= self.best < len(self.held_out):
            raise InputError("fields `train` and `held_out` must have equal lengths, and an entry at index `best`")

    @property
    def iterations(self) -> int:
        """Number of iterations."""
        return len(self.held_out) - 1


@dataclass(frozen=True)
class SearchRecord:
    """Account of one call of :func:`iia_ode.fit`.

    Attributes
    ----------
    rival : name of a solver without a fit, which competes with every fit of the search.
    budget : fields of the :class:`~iia_ode.iia.Budget`.
    ingredients : every solver of the search in order, then every failed attempt.
    refinement : the refinement behind the result; None if the weights come from a fit in closed form.
    steps : split into training and held-out samples behind the step reports; None without step reports.
    costs : costs of the stages by name: ``"teacher"``, ``"finals"`` and ``"last"``.
    fitted_to_all : whether the result was fitted once more, to all samples.
    given : number of draws that the caller gave or requested.
    final_draws : number of draws made for the last choice.
    checkpointed : whether refinements recomputed each evaluation on the backward pass.
    seconds : wall-clock time of the search.
    from_images : whether the initial states were images with noise.
    """

    rival: str
    budget: dict[str, Any]
    ingredients: tuple[Ingredient, ...]
    refinement: RefinementRecord | None
    steps: Split | None
    costs: dict[str, StageCost]
    fitted_to_all: bool
    given: int
    final_draws: int
    checkpointed: bool
    seconds: float
    from_images: bool = False

    def __post_init__(self) -> None:
        if [i.error is not None for i in self.ingredients if i.chosen] != [True]:
            raise InputError("field `ingredients` must have exactly one chosen entry, with an error")

    @property
    def chosen(self) -> Ingredient:
        """The result of the search among the ingredients."""
        return next(i for i in self.ingredients if i.chosen)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Provenance of a fit.

    Attributes
    ----------
    library : version of iia_ode.
    base, terms, target, history, ridge, guard, intercept, last_step : options of the method; see :class:`~iia_ode.IIA`.
    origin : the ODE and the states.
    batch, held_out : number of samples, and how many of them were held out.
    endpoint : errors of the final states.
    teacher : how the teacher was made; None without one.
    evaluations, sample_evaluations : cost of the fit, in model calls and in samples; a backward pass counts as two
        evaluations of its samples.
    seed : seed of a search; None for a single fit, which draws no random numbers.
    search : account of the search; None for a single fit.
    surroundings : versions and hardware of the fit, by name.
    served : errors at further guidance scales; see :meth:`~iia_ode.FittedSolver.serves`.
    notes : values added by :meth:`~iia_ode.FittedSolver.note`, JSON-ready.
    in_use : errors of the schedulers in use for the model; see ``iia_ode.diffusers.against``.
    """

    library: str
    base: Named
    terms: str
    target: Named
    history: int
    ridge: float | Literal["auto"]
    guard: bool
    intercept: bool
    origin: Origin
    batch: int
    held_out: int
    endpoint: Endpoint
    teacher: TeacherOptions | None
    evaluations: int
    sample_evaluations: int
    seed: int | None = None
    search: SearchRecord | None = None
    last_step: bool = True
    surroundings: dict[str, str] = field(default_factory=dict)
    served: tuple[Served, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    in_use: tuple[InUse, ...] = ()

    @property
    def from_images(self) -> bool:
        """Whether the fit was made on images with noise, at any level."""
        return self.search is not None and self.search.from_images


def finite(value: float) -> float | None:
    """The number, or None if it is not finite."""
    return value if math.isfinite(value) else None


def raised(error: float | None, least: float | None) -> float | None:
    """An error, raised to at least the error of the true states used in its measurement."""
    return error if error is None or least is None else max(error, least)
