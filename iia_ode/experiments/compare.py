"""Comparison of solvers by their endpoint error on unseen noise, at equal numbers of evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..autofit import Budget
from ..autofit import fit as find
from ..autofit.budget import budget_of
from ..autofit.draws import start_time
from ..checks import check_whole
from ..errors import GridError, InputError, one_run
from ..iia import IIA, FittedSolver
from ..integrate import sample
from ..metrics import rmse_with_error
from ..ode import ProbabilityFlowODE
from ..plan import Plan, check_grid
from ..schedules import Schedule
from ..teacher import Teacher
from .lines import RECIPE, Families, Family, Line, Solvers, families_of, grid_of, lines_of
from .results import Comparison, Protocol, Row
from .settings import Setting, get_setting
from .task import Task, of_ode, of_setting

__all__ = ["RECIPE", "compare"]


@one_run()
def compare(
    model: Setting | str | ProbabilityFlowODE,
    solvers: Solvers,
    nfes: int | Sequence[int],
    grids: Families = "karras",
    *,
    x: Tensor | None = None,
    fit_x: Tensor | None = None,
    reference: Tensor | None = None,
    samples: int | None = None,
    fit_samples: int = 200,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    tolerance: float | None = None,
    target: str = "substeps",
    budget: str | Budget = "closed-form",
    guidance_scale: float | None = None,
    seed: int = 0,
    device: str | None = None,
    name: str | None = None,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare solvers: fit them where needed, sample from unseen noise, and measure against an accurate reference.

    Every :class:`~iia_ode.IIA`, every preset and the solver ``"iia"`` is fitted anew for each number of evaluations, on noise
    drawn apart from the noise of the measurement. A :class:`~iia_ode.FittedSolver` or a :class:`~iia_ode.Plan` is used as it
    stands, at its own number of evaluations. Whether the comparison is fair to such a solver depends on the noise of its own
    fit.

    Parameters
    ----------
    model : a setting, the name of a setting, or the ODE of a model of your own with the conditions of `x`.
    solvers : a list of registered names, presets' names, :class:`~iia_ode.Solver` instances, mappings ``{"name": ...,
        "options": ...}``, :class:`~iia_ode.IIA` instances, fitted solvers and plans; or a mapping from your own names to such
        entries. The name ``"iia"`` stands for the solver found by :func:`iia_ode.fit`.
    nfes : numbers of evaluations. A solver is left out where it cannot make the number exactly.
    grids : one or more families of grids: names in :data:`iia_ode.grids.GRIDS`, functions from a number of levels to a grid,
        or a mapping from your own names to such entries. Solvers with grids of their own (``"iia"``, fitted solvers, plans) do
        not use them. All grids start and end at the same levels.
    x : for an ODE: the unseen initial states [B, ...] at the start of the grids, float32 or float64.
    fit_x : for an ODE: initial states [B', ...] for the fits, none of them in `x`. By default `fit_samples` draws of
        ``sigma * randn``. The fits reuse the conditions of `x` evenly.
    reference : for an ODE: accurate final states [B, ...] of `x`; by default a solution by dopri8.
    samples : for a setting: number of unseen initial states, by default 128.
    fit_samples : number of initial states to fit on, where `fit_x` is not given. A `budget` may add more.
    sigma_min, sigma_max : for an ODE: last positive and first level sigma/alpha of the families given by name; by default the
        levels of each family. References and teachers stop at `sigma_min`, or by default at the smallest level of the model. A
        setting has both levels as attributes.
    tolerance : relative and absolute tolerance of the reference; by default the setting's, or 1e-8 for a model in float64 and
        1e-6 else.
    target : target of presets given by name: ``"substeps"`` as in the paper, ``"local"`` or ``"trajectory"``.
    budget : budget of ``"iia"``: ``"closed-form"``, ``"standard"``, ``"thorough"`` or a :class:`~iia_ode.Budget`.
    guidance_scale : for a setting: scale of classifier-free guidance, by default 1, without guidance.
    seed : seed of all draws. The draws for fits and for measurements come from different generators.
    device : for a setting: device of the model, by default ``"cpu"``.
    name : name of an ODE's model in the result; by default the name of its class or function.
    progress : whether to show a progress bar over the cells of the table.
    report : function called with a line of text at each stage.

    Returns
    -------
    A :class:`Comparison`: rows, states, grids, fits and the conditions.

    Raises
    ------
    UnknownNameError : no such setting, solver, preset, family or budget.
    InputError : an argument is not usable or does not go with the model; the comparison is empty; two lines have one name;
        or `fit_x` and `x` share samples.
    GridError : a family cannot make a grid of two levels, or grids start or end at different levels.

    Examples
    --------
    >>> result = compare(
    ...     ode, ["heun", iia.IIA("ddim", "window")], [5, 9], ["karras", "log_snr"], x=80.0 * torch.randn(64, 3)
    ... )
    >>> print(result.table())
    """
    counts = _counts(nfes)
    budget_of(budget)  # before the work
    check_whole("seed", seed, least=0, below=2**31)
    check_whole("fit_samples", fit_samples, least=1)
    if isinstance(model, ProbabilityFlowODE):
        given: dict[str, object] = {"samples": samples, "guidance_scale": guidance_scale, "device": device}
        _refuse(given, "the model is an ODE, which has its own guidance and runs on the states x")
        task = of_ode(model, x, fit_x, reference, sigma_min, tolerance, name)
        families = families_of(grids, model.schedule, sigma_min, sigma_max)
    else:
        setting = get_setting(model) if isinstance(model, str) else model
        if not isinstance(setting, Setting):
            raise InputError(f"compare takes a Setting, the name of a setting or a ProbabilityFlowODE, got {model!r}.")
        given = {"x": x, "fit_x": fit_x, "reference": reference, "name": name}
        given |= {"sigma_min": sigma_min, "sigma_max": sigma_max}
        _refuse(given, "the model is a setting, which has its own levels and draws its own states")
        scale = 1.0 if guidance_scale is None else guidance_scale
        count = check_whole("samples", 128 if samples is None else samples, least=1)
        task = of_setting(setting, count, fit_samples, tolerance, scale, seed, device or "cpu")
        families = families_of(grids, setting.schedule, setting.sigma_min, setting.sigma_max)
    lines = lines_of(solvers, families, target)
    about = {"fit_samples": fit_samples, "target": target, "budget": budget, "seed": seed}
    return _compared(task, lines, counts, families, about, progress, report or (lambda _: None))


def _refuse(given: Mapping[str, object], reason: str) -> None:
    """Raise InputError if an argument was given that does not go with the model."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise InputError(f"{reason}: omit {' and '.join(names)}.")


def _counts(nfes: int | Sequence[int]) -> tuple[int, ...]:
    counts = [nfes] if isinstance(nfes, int) else list(nfes)
    if not counts:
        raise InputError("compare needs at least one number of evaluations, such as nfes=[5, 10].")
    return tuple(dict.fromkeys(check_whole("a number of evaluations", n, least=1) for n in counts))


# ---- grids, fits and measurements ------------------------------------------------------------------------------------


def _compared(
    task: Task,
    lines: list[Line],
    nfes: tuple[int, ...],
    families: Mapping[str, Family],
    about: dict[str, Any],
    progress: bool,
    say: Callable[[str], None],
) -> Comparison:
    """Fill the cells."""
    ends = _ends(families, task)
    cells = _cells(lines, nfes, families, task.ode.schedule, say)
    fits = _Fits(task, ends, max(nfes), about, progress)
    exact = task.accurate(ends, say)
    rows: list[Row] = []
    finals: dict[tuple[str, int], Tensor] = {}
    grids: dict[tuple[str, int], Tensor] = {}
    for line, nfe, grid in tqdm(cells, desc="compare", disable=not progress):
        key, method, cost = (line.name, nfe), line.method, (0, 0, 0.0)
        if method is None or isinstance(method, IIA):
            method, cost = fits.make(key, method, grid)
        used = method.grid if isinstance(method, FittedSolver) else cast(Tensor, grid)  # None is for iia_ode.fit alone
        _check_ends(line.name, used, ends, task.ode.schedule)
        own = isinstance(method, FittedSolver | Plan)
        finals[key], grids[key] = sample(task.ode, task.x, None if own else used, method), used
        error, spread = rmse_with_error(finals[key], exact)
        seen, evaluations, seconds = cost
        fitted = isinstance(method, FittedSolver)
        rows.append(Row(*key, error, spread, line.family, seen, evaluations, seconds, fitted))
        say(f"{line.name:>10} at {nfe:>3} evaluations: RMSE {rows[-1].rmse:.4g}")
    protocol = Protocol(
        setting=task.name,
        schedule=task.ode.schedule.config(),
        samples=len(task.x),
        fit_samples=len(fits.states[1]) if fits.made else 0,
        target=about["target"],
        budget=about["budget"] if isinstance(about["budget"], str) else "own",
        guidance_scale=scale if isinstance(scale := task.ode.guidance_scale, int | float) else None,
        seed=about["seed"],
        device=str(task.x.device),
    )
    names = tuple(line.name for line in lines)
    return Comparison(tuple(rows), names, nfes, exact, finals, grids, fits.made, protocol)


def _ends(families: Mapping[str, Family], task: Task) -> tuple[float, float]:
    """The first and the last time of all grids. A GridError here means that a family makes no grid at all."""
    schedule = task.ode.schedule
    pairs = {name: check_grid(schedule, family(2)) for name, family in families.items()}
    ends = next((times[0], times[-1]) for times in pairs.values())
    for name, times in pairs.items():
        _check_ends(name, torch.tensor(times, dtype=torch.float64, device="cpu"), ends, schedule)
    start = schedule.noise_to_signal(ends[0])
    if task.sigma_max is not None and not _same(start, task.sigma_max):
        raise GridError(
            f"the grids start at level {start:g}, and {task.name} draws states of level {task.sigma_max:g}: make the levels "
            "equal by the grid's sigma_max or by the setting's."
        )
    return ends


def _check_ends(name: str, grid: Tensor, ends: tuple[float, float], schedule: Schedule) -> None:
    """Raise GridError unless a grid has the same ends as the reference."""
    own, due = ([schedule.noise_to_signal(t) for t in pair] for pair in ((float(grid[0]), float(grid[-1])), ends))
    if not all(_same(a, b) for a, b in zip(own, due, strict=True)):
        raise GridError(
            f"{name} goes from level {own[0]:g} to {own[1]:g}, and the comparison from {due[0]:g} to {due[1]:g}: errors are "
            "comparable between equal levels only."
        )


def _same(level: float, other: float) -> bool:
    return level == other or math.isclose(level, other, rel_tol=1e-6)


def _cells(
    lines: Sequence[Line],
    nfes: Sequence[int],
    families: Mapping[str, Family],
    schedule: Schedule,
    say: Callable[[str], None],
) -> list[tuple[Line, int, Tensor | None]]:
    """The possible cells with their grids. None stands for a grid found by :func:`iia_ode.fit`."""
    cells = []
    for line in lines:
        missing = []
        for nfe in nfes:
            try:
                cells.append((line, nfe, grid_of(line, nfe, families, schedule)))
            except GridError:
                missing.append(nfe)
        if missing:
            counts = ", ".join(map(str, missing))
            say(f"{line.name} is left out at {counts} evaluations: no grid gives exactly this number")
    if not cells:
        names = ", ".join(line.name for line in lines)
        raise InputError(f"none of {names} can make any of {', '.join(map(str, nfes))} evaluations.")
    return cells


class _Fits:
    """The fits of a comparison, all on one batch. Fits to accurate trajectories share the trajectories."""

    def __init__(
        self, task: Task, ends: tuple[float, float], most: int, about: Mapping[str, Any], progress: bool
    ) -> None:
        self.task, self.ends, self.most, self.progress = task, ends, most, progress
        self.count, self.seed, self.budget = about["fit_samples"], about["seed"], budget_of(about["budget"])
        self.made: dict[tuple[str, int], FittedSolver] = {}

    @cached_property
    def states(self) -> tuple[ProbabilityFlowODE, Tensor]:
        """The ODE and the states to fit on."""
        return self.task.states(self.count, self.ends[0], self.seed)

    @property
    def _highest(self) -> float | None:
        """Level of the initial states for :func:`iia_ode.fit`; None where it is infinite."""
        level = self.states[0].schedule.noise_to_signal(self.ends[0])
        return level if math.isfinite(level) else None

    @cached_property
    def _teacher(self) -> tuple[Teacher, float]:
        """Accurate trajectories for IIA, and their wall-clock time in seconds."""
        begun = time.perf_counter()
        teacher = Teacher.solve(*self.states, *self.ends, sigma_min=self.task.lowest(self.ends[0]))
        return teacher, time.perf_counter() - begun

    @cached_property
    def _found_teacher(self) -> tuple[Teacher | None, float]:
        """Accurate trajectories for :func:`iia_ode.fit`, shared by all numbers of evaluations, and their time in seconds.

        The trajectories are None if :func:`iia_ode.fit` must make its own, because it adds noise samples.
        """
        begun, (ode, x) = time.perf_counter(), self.states
        if self.budget.draws > len(x):
            return None, 0.0
        start, end, steps = start_time(ode, self._highest), ode.schedule.t_data, self.budget.steps(self.most)
        low, chunk = self.task.lowest(start), self.budget.chunk_size
        teacher = Teacher.solve(ode, x, start, end, steps=steps, sigma_min=low, chunk_size=chunk)
        return teacher, time.perf_counter() - begun

    def make(
        self, key: tuple[str, int], method: IIA | None, grid: Tensor | None
    ) -> tuple[FittedSolver, tuple[int, int, float]]:
        """Fit by IIA on a grid, or by :func:`iia_ode.fit` if there is no method.

        Return the fit and its cost: samples, evaluations, seconds.
        """
        (ode, x), teacher, shared = self.states, None, 0.0
        if method is None:
            teacher, shared = self._found_teacher
        elif method.target == "trajectory":
            teacher, shared = self._teacher
        begun = time.perf_counter()
        if method is not None and grid is not None:
            fit = method.fit(ode, x, grid, teacher=teacher)
        else:
            fit = find(
                ode,
                key[1],
                x=x,
                budget=self.budget,
                sigma_max=self._highest,
                sigma_min=self.task.lowest(self.ends[0]),
                teacher=teacher,
                seed=self.seed,
                progress=self.progress,
            )
        self.made[key] = fit
        evaluations = fit.record.evaluations + (teacher.evaluations if teacher is not None else 0)
        return fit, (fit.record.batch, evaluations, time.perf_counter() - begun + shared)
