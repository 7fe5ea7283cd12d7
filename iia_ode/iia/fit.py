"""IIA: improved integration approximation, a meta-solver [Zhang, Niwa, Kleijn 2024]."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import __about__
from ..checks import check_flag, check_seed, check_whole
from ..errors import InputError, MismatchError, unknown_name
from ..ode import ProbabilityFlowODE
from ..plan import check_grid, check_start
from ..solvers import Solver, SolverLike, as_solver
from .chunks import Chunk, device_of
from .directions import Terms, Window, resolve_terms
from .endpoint import chunks_of
from .fitted import FittedSolver
from .fitting import Fitting
from .gather import Alone, Gather, gather_over
from .initial import distinct, warn_of_copies
from .origin import Origin
from .provenance import Endpoint, Named, Record, TeacherOptions
from .targets import Samples, Target, TeacherTrajectory, resolve_target
from .teacher import Teacher

__all__ = ["IIA", "PRESETS", "preset"]


@dataclass(frozen=True)
class IIA:
    """A meta-solver: the base solver's step plus a few directions, weighted by least squares against a better integration.

    Fitting is sequential: step i is fitted on states that the already fitted steps before it produce. The result costs
    what the base costs.

    Parameters
    ----------
    base : registered name or a :class:`~iia_ode.Solver`.
    terms : ``"paper"`` (what the paper has for this base: ``"iia-edm"`` or ``"iia-ddim"``), one of these or ``"biia-edm"`` by
        name, ``"window"`` (all states and data estimates at hand, for any base), or a function; see `iia_ode.iia.directions`.
    target : ``"substeps"`` (the paper's), ``"local"`` (high-accuracy integration of each step), ``"trajectory"`` (the accurate
        trajectory from the same initial state, which repairs earlier error) or a `Target`.
    history : r, how many earlier steps the terms may use.
    substeps : M, sub-steps of the ``"substeps"`` target.
    ridge : relative ridge towards the base; 0 is the paper's plain least squares, ``"auto"`` chooses for each step by the loss
        on held-out samples. With ``"auto"`` or a guard a step's ridge is raised where terms larger than 30 times the state
        would cancel each other; its report has the ridge that was used.
    guard : judge by held-out samples: a step whose correction does not help them keeps the base's weights, and if the whole
        fit does not end clearly nearer the truth than the base, it is the base that is returned, with a `GuardWarning`.
        Clearly: its mean square error on held-out samples is no larger; and on all whose true ends are known more end nearer
        than chance would make, the mean square is lower by three standard errors (more for few samples), and the sum of
        squares by more than three times the largest of one sample. What befalls one sample in n goes unseen in n samples
        one time in three. A fit whose error is rounding is kept anyway; and where its base is not finite on every sample,
        one that is and that ends nearer on at least half.
    intercept : also fit a constant in each step, the mean residual, with the shape of one sample.
    name : what the fitted solver is called; ``iia(<base>)`` by default.
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
            raise InputError(f"ridge is a number, 0 or more, or 'auto', got {self.ridge!r}.")
        resolve_terms(self.terms, self.base_solver.label)
        resolve_target(self.target, self.substeps)

    @property
    def base_solver(self) -> Solver:
        """The base as an instance."""
        return as_solver(self.base)

    @torch.no_grad()
    def fit(
        self,
        ode: ProbabilityFlowODE,
        grid: Tensor,
        x: Tensor,
        *,
        teacher: Teacher | None = None,
        held_out: float | None = None,
        chunk_size: int | None = None,
        group: Any = None,
        seed: int | None = None,
        progress: bool = False,
    ) -> FittedSolver:
        """Fit every step that the terms do not leave alone, for this model and grid.

        Where ``torch.distributed`` is initialised, this is a collective call: each process passes samples of its own, with
        their conditions, and all get the same fit of the whole batch, which are those of all ranks in order.

        Parameters
        ----------
        ode : the model with its schedule; conditioning has one entry per sample of x, or one for all.
        grid : float64 [N + 1] times.
        x : initial states [B, ...], float32 or float64, on the host or on the model's device: the expectation of the paper
            is the mean over these. Between steps they rest on the host.
        teacher : accurate trajectories of x, for the target ``"trajectory"`` and for the guard; made here if needed.
        held_out : share of the batch, its last samples, that coefficients are not fitted to: the guard and ``ridge="auto"``
            judge by it. By default a quarter where one of these needs it, else none. Where a share is, samples that repeat
            an earlier one are left out. A batch of less than 4 holds out none, and a guard then keeps the base; where
            none is to be held out (0), there is no guard.
        chunk_size : samples that go through the model at once (all by default). The least squares does not depend on it;
            a network whose rounding depends on the batch size still may.
        group : processes that fit together; by default all of ``torch.distributed``, if that is initialised.
        seed : recorded in the file; the fit itself draws no random numbers.
        progress : show a bar over the steps.

        Raises
        ------
        GridError, InputError : the grid, the states or an option are not usable, or a process has only samples of others.
        MismatchError : the teacher is of another ODE or of other states.
        NonFiniteError : the model is not finite on this batch.
        RankError : another process of the group failed.

        Warns
        -----
        GuardWarning : the fit was not clearly better than the base, which is what is returned.
        DuplicateWarning : some samples repeat others, and were left out.
        """
        found, _ = self._fitted(
            ode, grid, x, None, teacher=teacher, held_out=held_out, chunk_size=chunk_size, group=group, seed=seed,
            progress=progress,
        )  # fmt: skip
        return found

    @torch.no_grad()
    def fit_and_run(
        self,
        ode: ProbabilityFlowODE,
        grid: Tensor,
        x: Tensor,
        own: slice,
        *,
        teacher: Teacher | None = None,
        chunk_size: int | None = None,
    ) -> tuple[FittedSolver, Tensor]:
        """The fit to some of the samples, and where it takes all of them.

        The others run along, in the same calls of the model: no more evaluations than to run them afterwards, in half as many
        calls. In this process alone, all of `own` fitted to, without a guard.

        Parameters
        ----------
        ode, grid, x, chunk_size : as for :meth:`fit`.
        own : the samples to fit to, one after the other.
        teacher : as for :meth:`fit`, of all samples.

        Returns
        -------
        The fitted solver, and final states [B, ...] of all samples, in the dtype of x, on the host.

        Raises
        ------
        InputError : also where there are no such samples, or where a ridge is to be chosen by samples held out.
        """
        if self.ridge == "auto":
            raise InputError("fit_and_run holds nothing out to choose a ridge by: give ridge= as a number.")
        first, last, step = own.indices(len(x))
        if step != 1 or last <= first:
            raise InputError(f"own must be some of the {len(x)} samples, one after the other, got {own!r}.")
        found, fitting = replace(self, guard=False)._fitted(
            ode, grid, x, slice(first, last), teacher=teacher, held_out=0.0, chunk_size=chunk_size, group=Alone(), seed=None,
            progress=False,
        )  # fmt: skip
        return found, fitting.ends

    def _fitted(
        self,
        ode: ProbabilityFlowODE,
        grid: Tensor,
        x: Tensor,
        own: slice | None,
        *,
        teacher: Teacher | None,
        held_out: float | None,
        chunk_size: int | None,
        group: Any,
        seed: int | None,
        progress: bool,
    ) -> tuple[FittedSolver, Fitting]:
        """The fit to the samples in `own`, or to all, and the work behind it."""
        check_start(ode, x)
        own = slice(0, len(x)) if own is None else own
        method = self
        if isinstance(self.terms, Window):
            method = replace(self, terms=self.terms.for_shape(x.shape[1:]))
        if chunk_size is not None:
            check_whole("chunk_size", chunk_size, least=1)
        if seed is not None:
            check_seed(seed)
        times = check_grid(ode.schedule, grid)
        share = (0.25 if self.guard or self.ridge == "auto" else 0.0) if held_out is None else held_out
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise InputError(f"held_out is a share of the batch, from 0 to below 1, got {held_out!r}.")
        gather = gather_over(group)
        made_for = Origin.of(ode, x)
        first, total = gather.begin(
            own.stop - own.start, (self._options(), times, share, made_for, teacher is not None)
        )
        with ode.counting() as spent:
            if teacher is not None:
                _check_teacher(ode, x, times, teacher)
            if share:
                ode, x, teacher, first, total = _without_copies(ode, x, teacher, first, total, gather)
                own = slice(0, len(x))
            target = resolve_target(self.target, self.substeps)
            if teacher is None and target.needs_teacher:
                steps = target.steps if isinstance(target, TeacherTrajectory) else None
                teacher = Teacher.for_grid(ode, x, times, steps=steps, chunk_size=chunk_size, progress=progress)
            size, device = chunk_size or len(x), device_of(ode, x)
            chunks = [
                Chunk(Samples(ode.subset(i, len(x)), x[i], i, teacher), device, _within(i, own))
                for i in chunks_of(0, len(x), size)
            ]
            held = min(max(1, int(share * total)), total - 1) if share and total >= 4 else 0
            judged = self.guard and share > 0
            fitting = Fitting(method, ode, times, chunks, own.start, first, total, held, judged, teacher, gather)
            plan, reports, outcome = fitting.run(progress)
        cost = gather.sum(torch.tensor([spent.evaluations, spent.samples], dtype=torch.float64, device="cpu")).tolist()
        record = self.record(
            made_for,
            batch=total,
            held_out=held,
            endpoint=outcome,
            teacher=teacher,
            seed=seed,
            evaluations=int(cost[0]),
            sample_evaluations=int(cost[1]),
        )
        return FittedSolver(plan, reports, record), fitting

    def record(self, origin: Origin, *, endpoint: Endpoint, teacher: Teacher | None, **account: Any) -> Record:
        """The account of a fit by this method.

        Parameters
        ----------
        origin : the ODE and the states that the fit was made for.
        endpoint : errors of the final states.
        teacher : the trajectories that the fit used, if any.
        account : the other fields of :class:`~iia_ode.iia.provenance.Record`: numbers of samples, cost, seed, search.
        """
        return Record(
            library=__about__.__version__,
            **self._options(),
            origin=origin,
            endpoint=endpoint,
            teacher=None if teacher is None else TeacherOptions(**teacher.way),
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


def _check_teacher(ode: ProbabilityFlowODE, x: Tensor, times: list[float], given: Teacher) -> None:
    """Raise unless the teacher that was given is of this batch and grid."""
    if not isinstance(given, Teacher):
        raise InputError(f"teacher must be a Teacher, made with Teacher.solve(ode, x, ...), got {given!r}.")
    given.check(ode, x, stacklevel=7)
    if given.about["t_start"] != times[0]:
        raise MismatchError(
            f"the teacher starts at t = {given.about['t_start']:g} and the grid at {times[0]:g}, from the same states."
        )
    given.at(times[-1], slice(0, 1))  # a GridError now rather than after the work


def _without_copies(
    ode: ProbabilityFlowODE, x: Tensor, teacher: Teacher | None, first: int, total: int, gather: Gather
) -> tuple[ProbabilityFlowODE, Tensor, Teacher | None, int, int]:
    """The same without samples that repeat earlier ones, of this process or another: those would judge their own fit."""
    new = distinct(ode, x, first, total, gather)
    if bool(new.all()):
        return ode, x, teacher, first, total
    own = new[first : first + len(x)].nonzero()[:, 0]
    if not gather.all(len(own) > 0):
        raise InputError(
            "all samples of one process repeat those of others: give each process noise of its own, such as of another seed."
        )
    left = int(new.sum())
    # In every process: where a filter makes an error of it, none is left waiting for one that is gone.
    warn_of_copies(total - left, total, stacklevel=6)
    parts = ode.subset(own, len(x)), x[own], None if teacher is None else teacher.subset(own)
    return *parts, int(new[:first].sum()), left


def _within(chunk: slice, own: slice) -> slice:
    """Those of a chunk that are in `own`, counted from its first."""
    first, last = (min(max(i, chunk.start), chunk.stop) - chunk.start for i in (own.start, own.stop))
    return slice(first, last)


def _of_paper(name: str, base: str, terms: str) -> IIA:
    return IIA(base, terms=terms, guard=False, name=name)


PRESETS: dict[str, IIA] = {
    "biia-edm": _of_paper("biia-edm", "heun", "biia-edm"),
    "iia-edm": _of_paper("iia-edm", "heun", "iia-edm"),
    **{f"iia-{base}": _of_paper(f"iia-{base}", base, "iia-ddim") for base in ("ddim", "spndm", "ipndm", "dpmpp_2m")},
}
"""The paper's methods, with its defaults (M, r) = (3, 1), fitted to the whole batch as there: without guard."""


def preset(name: str, **changes: Any) -> IIA:
    """One of the paper's methods by name, with some options changed: ``preset("iia-edm", history=0)``.

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
