"""IIA, improved integration approximation: options, presets, and the fit of a solver on a grid [Zhang et al. 2024]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..__about__ import __version__
from ..checks import check_flag, check_whole
from ..errors import InputError, MismatchError, unknown_name
from ..ode import ProbabilityFlowODE
from ..ode.distributed import agree
from ..plan import check_grid, check_start
from ..solvers import Solver, SolverLike, as_solver
from .batch import Batch
from .directions import Terms, Window, resolve_terms
from .fitted import FittedSolver
from .origin import Origin
from .provenance import Endpoint, Named, Record
from .stepwise import Stepwise
from .targets import Target, TeacherTrajectory, resolve_target
from .teacher import Teacher

__all__ = ["IIA", "PRESETS", "preset"]


@dataclass(frozen=True)
class IIA:
    """A meta-solver: the base solver's step plus a few directions, weighted by least squares [Zhang et al. 2024].

    Fitting is sequential: step i is fitted on states that the fitted steps before it produce. The fitted solver makes as many
    evaluations as its base.

    Parameters
    ----------
    base : registered name, or a :class:`~iia_ode.Solver`.
    terms : directions that a step may add. ``"paper"``: the paper's for this base (``"iia-edm"`` or ``"iia-ddim"``); one of
        these or ``"biia-edm"`` by name; ``"window"``: all states and data estimates at hand, for any base; a
        :class:`~iia_ode.iia.Window` with options; or a function, see :mod:`iia_ode.iia.directions`.
    target : states that a step should have reached. ``"substeps"``: sub-steps of the base (the paper's); ``"local"``:
        high-accuracy integration of each step; ``"trajectory"``: the accurate trajectory from the same initial state, which
        repairs earlier error; or a :class:`~iia_ode.iia.Target`.
    history : r, number of earlier steps that the terms may use.
    substeps : M, number of sub-steps of the ``"substeps"`` target.
    ridge : relative ridge towards the base. 0 is the paper's plain least squares; ``"auto"`` chooses the ridge of each step by
        the loss on held-out samples. With ``"auto"`` or a guard, a step's ridge is raised where terms larger than 30 times the
        state would cancel each other. A step's report has the ridge in use.
    guard : keep the base where held-out samples do not favor the fit. A step whose correction does not lower their loss keeps
        the base's weights. A fit whose final states are not clearly nearer the truth is replaced by the base, with a
        `GuardWarning`; :func:`~iia_ode.iia.ranking.verdict` has the criterion. A failure with rate 1/n is missed by n samples
        with probability 1/e.
    intercept : also fit a constant in each step, the mean residual, with the shape of one sample.
    name : name of the fitted solver; ``iia(<base>)`` by default.

    Raises
    ------
    InputError : an option is not usable.
    UnknownNameError : no such base, set of terms or target.
    """

    base: SolverLike
    terms: str | Terms = "paper"
    target: str | Target = "substeps"
    history: int = 1
    substeps: int = 3
    ridge: float | str = 0.0
    guard: bool = True
    intercept: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        check_whole("history", self.history, least=0)
        check_whole("substeps", self.substeps, least=1)
        check_flag("guard", self.guard)
        check_flag("intercept", self.intercept)
        number = isinstance(self.ridge, int | float) and not isinstance(self.ridge, bool) and 0 <= self.ridge < math.inf
        if not number and self.ridge != "auto":
            raise InputError(f"ridge must be a number from 0, or 'auto', got {self.ridge!r}.")
        resolve_terms(self.terms, self.base_solver.label)
        resolve_target(self.target, self.substeps)

    @property
    def base_solver(self) -> Solver:
        """The base as an instance."""
        return as_solver(self.base)

    def fit(
        self,
        ode: ProbabilityFlowODE,
        x: Tensor,
        grid: Tensor,
        *,
        teacher: Teacher | None = None,
        held_out: float | None = None,
        chunk_size: int | None = None,
        progress: bool = False,
    ) -> FittedSolver:
        """Fit the steps of the base on a grid, for this model.

        Parameters
        ----------
        ode : the model with its schedule. Conditions have one entry per sample of x, or one for all samples. For several
            processes pass :func:`iia_ode.distributed` of it, and the same x, grid and options in each.
        x : initial states [B, ...] at ``grid[0]``, float32 or float64, on the host or on the model's device. The paper's
            expectation is the mean over these samples. Between steps they rest on the host.
        grid : times, float64 [N + 1].
        teacher : accurate trajectories of x, for the target ``"trajectory"`` and for the guard; made here if needed.
        held_out : share of the batch, its last samples, that no coefficient is fitted to, from 0 to below 1. The guard and
            ``ridge="auto"`` judge by these samples. A quarter by default if one of them is on, else 0. Samples that repeat
            earlier ones are left out where the share is above 0. A batch below 4 samples holds none out, and a guard then
            keeps the base. With ``held_out=0`` there is no guard.
        chunk_size : number of samples that go through the model at once; by default all. The least squares does not depend
            on it; a network whose rounding depends on the batch size still may.
        progress : show a bar over the steps.

        Returns
        -------
        The fitted solver.

        Raises
        ------
        GridError, InputError : the grid, the states or an option are not usable.
        MismatchError : the teacher is of another ODE or of other states.
        NonFiniteError : the model is not finite on this batch.
        RankError : of a distributed ODE: another process failed, or was asked for another fit.

        Warns
        -----
        GuardWarning : the fit is not clearly better than the base, which is returned.
        DuplicateWarning : some samples repeat others, and are left out.
        """
        check_start(ode, x)
        times = check_grid(ode.schedule, grid)
        share = (0.25 if self.guard or self.ridge == "auto" else 0.0) if held_out is None else held_out
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise InputError(f"held_out must be a share of the batch, from 0 to below 1, got {held_out!r}.")
        batch = Batch(ode, x, teacher, chunk_size)
        agree(ode, "IIA", self._options(), x, times, share, chunk_size, teacher is not None)
        if teacher is not None:
            _check_teacher(batch, times)
        return self.fit_batch(batch.without_copies() if share else batch, times, share, progress=progress)

    @torch.no_grad()
    def fit_batch(self, batch: Batch, times: list[float], held_out: float, *, progress: bool = False) -> FittedSolver:
        """The fit to a batch without copies; `times` is the grid, and `held_out` a share. See :meth:`fit`."""
        terms = self.terms.for_shape(batch.x.shape[1:]) if isinstance(self.terms, Window) else self.terms
        base, target = self.base_solver, resolve_target(self.target, self.substeps)
        count = len(batch)
        held = min(max(1, int(held_out * count)), count - 1) if held_out and count >= 4 else 0
        fit = Stepwise(
            base,
            resolve_terms(terms, base.label)[1],
            target,
            self.history,
            self.ridge,
            self.guard,
            self.intercept,
            self.name or f"iia({base.label})",
        )
        with batch.ode.counting() as spent:
            if batch.teacher is None and target.needs_teacher:
                batch = _taught(batch, times, target, progress)
            plan, reports, endpoint = fit.fit(batch, times, held, judged=self.guard and held_out > 0, progress=progress)
        account = {"evaluations": spent.evaluations, "sample_evaluations": spent.samples}
        record = self.record(batch, endpoint=endpoint, held_out=held, **account)
        return FittedSolver(plan, reports, record)

    def record(self, batch: Batch, *, endpoint: Endpoint, **account: Any) -> Record:
        """The account of a fit by this method to a batch; `account` has the remaining fields of the record."""
        return Record(
            library=__version__,
            **self._options(),
            origin=Origin.of(batch.ode, batch.x),
            batch=len(batch),
            endpoint=endpoint,
            teacher=None if batch.teacher is None else batch.teacher.record.options,
            **account,
        )

    def _options(self) -> dict[str, Any]:
        base, target = self.base_solver, resolve_target(self.target, self.substeps)
        return {
            "base": Named(base.label.partition("(")[0], base.options()),
            "terms": resolve_terms(self.terms, base.label)[0],
            "target": Named(target.name, {k: v for k, v in target.options().items() if k != "name"}),
            "history": self.history,
            "ridge": self.ridge,
            "guard": self.guard,
            "intercept": self.intercept,
        }


def _check_teacher(batch: Batch, times: list[float]) -> None:
    """Raise unless the given teacher is of this batch and grid."""
    teacher = batch.teacher
    if not isinstance(teacher, Teacher):
        raise InputError(f"teacher must be a Teacher, made with Teacher.solve(ode, x, ...), got {teacher!r}.")
    teacher.check(batch.ode, batch.x)
    if teacher.t_start != times[0]:
        raise MismatchError(
            f"the teacher starts at t = {teacher.t_start:g} and the grid at {times[0]:g}, from the same states."
        )
    teacher.at(times[-1], slice(0, 1))  # a GridError before the work


def _taught(batch: Batch, times: list[float], target: Target, progress: bool) -> Batch:
    """The batch with a teacher."""
    steps = target.steps if isinstance(target, TeacherTrajectory) else None
    size = batch.chunk_size
    teacher = Teacher.for_grid(batch.ode, batch.x, times, steps=steps, chunk_size=size, progress=progress)
    return Batch(batch.ode, batch.x, teacher, size)


def _of_paper(name: str, base: str, terms: str) -> IIA:
    return IIA(base, terms=terms, guard=False, name=name)


PRESETS: dict[str, IIA] = {
    "biia-edm": _of_paper("biia-edm", "heun", "biia-edm"),
    "iia-edm": _of_paper("iia-edm", "heun", "iia-edm"),
    **{f"iia-{base}": _of_paper(f"iia-{base}", base, "iia-ddim") for base in ("ddim", "spndm", "ipndm", "dpmpp_2m")},
}
"""The paper's methods with its defaults (M, r) = (3, 1), fitted to the whole batch, without a guard."""


def preset(name: str, **changes: Any) -> IIA:
    """One of the paper's methods by name, with some options changed: ``preset("iia-edm", history=0)``.

    Parameters
    ----------
    name : ``"biia-edm"``, ``"iia-edm"``, ``"iia-ddim"``, ``"iia-spndm"``, ``"iia-ipndm"`` or ``"iia-dpmpp_2m"``.
    changes : options of :class:`IIA`.

    Returns
    -------
    The method, ready to fit.

    Raises
    ------
    UnknownNameError : no such preset or option.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    known = PRESETS[name].__dict__
    for key in changes:
        if key not in known:
            raise unknown_name("option of IIA", key, known)
    return IIA(**{**known, **changes})
