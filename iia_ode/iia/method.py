"""IIA, improved integration approximation: options, presets, and the fit of a solver on a grid [Zhang et al. 2024]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..__about__ import __version__
from ..checks import check_flag, check_number, check_whole
from ..errors import InputError, one_run, unknown_name
from ..ode import Ledger, ProbabilityFlowODE
from ..ode.distributed import agree
from ..ode.origin import Origin
from ..plan import check_grid, check_ode, check_states
from ..sharing.records import surroundings
from ..solvers import Solver, SolverLike, as_solver
from ..teacher.teacher import Teacher, check_teacher
from .batch import Batch
from .directions import Terms, Window, resolve_terms
from .fitted import FittedSolver
from .provenance import Endpoint, Named, Record, SearchRecord
from .stepwise import Stepwise
from .targets import Target, TeacherTrajectory, resolve_target

__all__ = ["IIA", "PRESETS", "SETTINGS", "preset", "record_of"]


@dataclass(frozen=True)
class IIA:
    """A meta-solver: the base solver's step plus a few directions, weighted by least squares [Zhang et al. 2024].

    The fit is sequential: the states of step i come from the fitted steps before step i. The fitted solver makes as many
    evaluations as its base.

    Parameters
    ----------
    base : registered name, or a :class:`~iia_ode.Solver`.
    terms : directions of a step. ``"paper"`` selects the paper's set for the base, ``"iia-edm"`` or ``"iia-ddim"``. These two
        sets and ``"biia-edm"`` are also valid names. ``"window"`` takes all available states and data estimates, for any base.
        A :class:`~iia_ode.iia.Window` is the window with options. A function defines other directions, see
        :mod:`iia_ode.iia.directions`.
    target : the accurate state of a step. ``"substeps"``, the target of the paper, composes sub-steps of the base. ``"local"``
        integrates over the step accurately. ``"trajectory"`` takes the accurate trajectory from the same initial state; a step
        then also repairs errors of earlier steps. Other targets are instances of :class:`~iia_ode.iia.Target`.
    history : r, the number of earlier steps behind the directions.
    substeps : M, number of sub-steps of the ``"substeps"`` target.
    ridge : relative ridge towards the base. 0 is plain least squares, as in the paper. ``"auto"`` chooses the ridge of each
        step by the loss on held-out samples. With ``"auto"`` or a guard, the ridge of a step is raised until no term is larger
        than 30 times the state. The report of a step has the ridge in use.
    guard : keep the base where held-out samples do not favor the fit. A step without a lower held-out loss keeps the weights
        of the base. If the final states of the fit are not clearly nearer the true final states, the base replaces the whole
        fit, with a `GuardWarning`; :func:`~iia_ode.iia.ranking.verdict` has the criterion. A failure with rate p is missed by
        n samples with probability (1 - p)^n: the report has the number of judging samples, and the number needed.
    intercept : also fit a constant in each step, the mean residual, with the shape of one sample.
    last_step : whether a step to the data (sigma = 0) is fitted where the terms have directions for this step; False leaves
        the step to the base. ``"iia-edm"`` and ``"biia-edm"`` have no such directions: algorithm 1 of the paper leaves this
        step to EDM.
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
    last_step: bool = True
    name: str | None = None

    def __post_init__(self) -> None:
        check_whole("history", self.history, least=0)
        check_whole("substeps", self.substeps, least=1)
        check_flag("guard", self.guard)
        check_flag("intercept", self.intercept)
        check_flag("last_step", self.last_step)
        number = isinstance(self.ridge, int | float) and not isinstance(self.ridge, bool) and 0 <= self.ridge < math.inf
        if not number and self.ridge != "auto":
            raise InputError(f"ridge must be a number from 0, or 'auto', got {self.ridge!r}.")
        resolve_terms(self.terms, self.base_solver.label)
        resolve_target(self.target, self.substeps)

    @property
    def base_solver(self) -> Solver:
        """The base as an instance."""
        return as_solver(self.base)

    @one_run()
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
        ode : the ODE with the conditions of x, an entry per sample or a single entry for all. For several processes pass
            :func:`iia_ode.distributed` of the ODE, and the same x, grid and options in each process.
        x : initial states [B, ...] at ``grid[0]``, float32 or float64, on the host or on the model's device. The mean over the
            samples replaces the expectation of the paper. Between steps the states are kept on the host.
        grid : times, float64 [N + 1].
        teacher : accurate trajectories of x, for the target ``"trajectory"`` and for the guard; made here if needed.
        held_out : share of held-out samples, from 0 to below 1: the last samples of the batch, for the guard and for
            ``ridge="auto"``. By default 0.25 with a guard or with ``ridge="auto"``, else 0. Where the share is above 0, copies
            among the samples are left out. A batch of fewer than 4 samples holds none out, and a guard then keeps the base.
            With ``held_out=0`` there is no guard: ``record.guard`` is False.
        chunk_size : number of samples per model call; by default all. Chunks have no influence on the least squares, but the
            rounding of a network may depend on the batch size.
        progress : show a bar over the steps.

        Returns
        -------
        The fitted solver.

        Raises
        ------
        GridError, InputError : the grid, the states or an option are not usable.
        MismatchError : the teacher is of another ODE or of other states.
        NonFiniteError : the states or the model are not finite on some samples, which the message names.
        RankError : for a distributed ODE: another process failed, or has other arguments.

        Warns
        -----
        GuardWarning : the fit is not clearly better than the base, and the result is the base. Or the fit is kept, and some
            samples end far outside the range of the judged samples.
        DuplicateWarning : copies among the samples are left out.
        StateSizeWarning : the states are too small for the noise level at the start of the grid.
        """
        times = check_grid(check_ode(ode).schedule, grid)
        check_states(ode, x, times[0])
        share = (0.25 if self.guard or self.ridge == "auto" else 0.0) if held_out is None else held_out
        share = check_number("held_out, a share of the batch,", share, least=0, below=1)
        batch = Batch(ode, x, teacher, chunk_size)
        agree(ode, "IIA", self.options(), x, times, share, chunk_size, teacher is not None)
        if teacher is not None:
            check_teacher(teacher, ode, x, times[0])
            teacher.at(times[-1], slice(0, 1))  # a GridError before the work
        batch = batch.without_copies() if share else batch
        stepwise = self.stepwise(x.shape[1:])
        with ode.counting() as spent:
            if batch.teacher is None and stepwise.target.needs_teacher:
                steps = stepwise.target.steps if isinstance(stepwise.target, TeacherTrajectory) else None
                made = Teacher.for_grid(
                    batch.ode, batch.x, times, steps=steps, chunk_size=chunk_size, progress=progress
                )
                batch = replace(batch, teacher=made)
            fit = stepwise.fit(batch, times, share, progress=progress)
        method = self if share else replace(self, guard=False)  # nothing judged
        return FittedSolver(fit.plan, fit.reports, record_of(method, batch, fit.split.held_out, fit.endpoint, spent))

    def stepwise(self, shape: Sequence[int]) -> Stepwise:
        """The sequential fit with every option resolved, for samples of this shape."""
        terms = self.terms.for_shape(shape) if isinstance(self.terms, Window) else self.terms
        base = self.base_solver
        return Stepwise(
            base,
            resolve_terms(terms, base.label)[1],
            resolve_target(self.target, self.substeps),
            self.history,
            self.ridge,
            self.guard,
            self.intercept,
            self.last_step,
            self.name or f"iia({base.label})",
        )

    def options(self) -> dict[str, Any]:
        """The options as fields of a :class:`~iia_ode.iia.Record`."""
        base, target = self.base_solver, resolve_target(self.target, self.substeps)
        return {
            "base": Named(base.label.partition("(")[0], base.options()),
            "terms": resolve_terms(self.terms, base.label)[0],
            "target": Named(target.name, {k: v for k, v in target.options().items() if k != "name"}),
            "history": self.history,
            "ridge": self.ridge,
            "guard": self.guard,
            "intercept": self.intercept,
            "last_step": self.last_step,
        }


def record_of(
    method: IIA,
    batch: Batch,
    held_out: int,
    endpoint: Endpoint,
    spent: Ledger,
    *,
    seed: int | None = None,
    search: SearchRecord | None = None,
) -> Record:
    """Provenance of a fit of `method` to `batch`, of which the last `held_out` samples were held out."""
    return Record(
        library=__version__,
        **method.options(),
        origin=Origin.of(batch.ode, batch.x),
        batch=len(batch),
        held_out=held_out,
        endpoint=endpoint if batch.teacher is None else endpoint.known_to(batch.teacher.record.error),
        teacher=None if batch.teacher is None else batch.teacher.record.options,
        evaluations=spent.evaluations,
        sample_evaluations=spent.samples,
        seed=seed,
        search=search,
        surroundings=surroundings(batch.device),
    )


def _of_paper(name: str, base: str, terms: str) -> IIA:
    return IIA(base, terms=terms, guard=False, name=name)


PRESETS: dict[str, IIA] = {
    "biia-edm": _of_paper("biia-edm", "heun", "biia-edm"),
    "iia-edm": _of_paper("iia-edm", "heun", "iia-edm"),
    **{f"iia-{base}": _of_paper(f"iia-{base}", base, "iia-ddim") for base in ("ddim", "spndm", "ipndm", "dpmpp_2m")},
}
"""The methods of the paper with the paper's defaults (M, r) = (3, 1), fitted to the whole batch, without a guard."""

SETTINGS: dict[str, dict[str, dict[str, int]]] = {
    "usual": {name: {"substeps": 3, "history": 1} for name in PRESETS},
    "ffhq": {"biia-edm": {"substeps": 3, "history": 0}, "iia-edm": {"substeps": 3, "history": 1}},
}
"""Settings (M, r) of the paper by name, for each preset [Zhang et al. 2024, table 1]: ``"ffhq"`` has r = 0 for BIIA-EDM."""


def preset(name: str, *, settings: str = "usual", **changes: Any) -> IIA:
    """A method of the paper by name, with some options changed: ``preset("iia-edm", history=0)``.

    Parameters
    ----------
    name : ``"biia-edm"``, ``"iia-edm"``, ``"iia-ddim"``, ``"iia-spndm"``, ``"iia-ipndm"`` or ``"iia-dpmpp_2m"``.
    settings : settings of the paper's table 1: ``"ffhq"``, (M, r) = (3, 0) for ``"biia-edm"`` and (3, 1) for ``"iia-edm"``; or
        ``"usual"``, (M, r) = (3, 1).
    changes : options of :class:`IIA`.

    Returns
    -------
    The method, ready to fit.

    Raises
    ------
    UnknownNameError : no such preset or option, or no such settings of this preset.
    InputError : the value of an option is not usable.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    if settings not in (of_name := [s for s, rows in SETTINGS.items() if name in rows]):
        raise unknown_name(f"settings of {name}", settings, of_name)
    known = {**PRESETS[name].__dict__, **SETTINGS[settings][name]}
    for key in changes:
        if key not in known:
            raise unknown_name("option of IIA", key, known)
    return IIA(**{**known, **changes})
