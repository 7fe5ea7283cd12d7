"""Comparison of solvers by their endpoint error on unseen noise, at equal numbers of evaluations."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ..autofit import BUDGETS, Budget
from ..autofit import fit as find
from ..errors import GridError, InputError, one_run, unknown_name
from ..iia import IIA, PRESETS, FittedSolver, Teacher, preset
from ..integrate import sample
from ..metrics import rmse_with_error
from ..ode import ProbabilityFlowODE
from ..reference import solve
from ..solvers import Solver, get_solver
from .settings import Setting, batch_seed

__all__ = ["RECIPE", "Comparison", "Row", "compare"]

RECIPE = "iia"
"""Name of the solver found by :func:`iia_ode.fit`, among the solvers of a comparison."""

_CHUNK = 64  # samples per call of the model during a fit


@dataclass(frozen=True)
class Row:
    """Measurements of one solver at one number of evaluations.

    Attributes
    ----------
    solver : name of the solver.
    nfe : number of model evaluations per run.
    rmse : root mean square error per component of the final states, against a converged reference from the same unseen
        noise.
    standard_error : standard error of `rmse` over samples.
    fit_samples : number of samples of the fit, 0 for a solver without a fit.
    fit_evaluations : batched model evaluations of the fit, 0 without a fit. Accurate trajectories count in full for each
        fit, also where several fits share them.
    fit_seconds : wall-clock time of the fit in seconds, 0 without a fit, trajectories included in the same way.
    """

    solver: str
    nfe: int
    rmse: float
    standard_error: float
    fit_samples: int
    fit_evaluations: int
    fit_seconds: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """Result of :func:`compare`.

    Attributes
    ----------
    rows : measurements, a row for each solver and each number of evaluations possible for the solver.
    solvers, nfes : requested solvers and numbers of evaluations, in order.
    reference : converged final states, float64 [B, ...].
    samples : final states [B, ...] of each row, by (solver, nfe).
    fits : fitted solvers, by (solver, nfe).
    settings : arguments of the comparison and the grids, JSON-ready, to run the comparison again.
    """

    rows: tuple[Row, ...]
    solvers: tuple[str, ...]
    nfes: tuple[int, ...]
    reference: Tensor
    samples: dict[tuple[str, int], Tensor]
    fits: dict[tuple[str, int], FittedSolver]
    settings: dict[str, Any]

    def error(self, solver: str, nfe: int) -> float | None:
        """Look up an RMSE.

        Parameters
        ----------
        solver : name of the solver.
        nfe : number of evaluations.

        Returns
        -------
        The RMSE per component; None if the solver cannot make exactly `nfe` evaluations.
        """
        return next((r.rmse for r in self.rows if (r.solver, r.nfe) == (solver, nfe)), None)

    def table(self, markdown: bool = False) -> str:
        """Format the errors as a table: a line per solver, a column per number of evaluations.

        A star marks the lowest error of a column. A dash means the solver cannot make this number of evaluations.

        Parameters
        ----------
        markdown : whether to write a Markdown table instead of aligned text.

        Returns
        -------
        The table as text.
        """
        width = max(len("solver / NFE"), *(len(s) for s in self.solvers))
        best = {
            n: min((e for s in self.solvers if (e := self.error(s, n)) is not None), default=None) for n in self.nfes
        }

        def cell(solver: str, nfe: int) -> str:
            error = self.error(solver, nfe)
            return "-" if error is None else f"{error:.4f}{'*' if error == best[nfe] else ' '}"

        body = [[f"{s:<{width}}", *(f"{cell(s, n):>8}" for n in self.nfes)] for s in self.solvers]
        head = [f"{'solver / NFE':<{width}}", *(f"{n:>8}" for n in self.nfes)]
        if not markdown:
            return "\n".join(" ".join(row) for row in (head, *body))
        rule = ["-" * width, *(f"{'-' * 7}:" for _ in self.nfes)]
        return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))

    def csv(self) -> str:
        """Format all rows as comma-separated values, with a header line."""
        out = io.StringIO()
        writer = csv.DictWriter(out, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in self.rows)
        return out.getvalue()


@one_run()
def compare(
    setting: Setting,
    solvers: Sequence[str],
    nfes: Sequence[int],
    make_grid: Callable[[int], Tensor],
    *,
    samples: int = 128,
    fit_samples: int = 200,
    target: str = "substeps",
    budget: str = "closed-form",
    guidance_scale: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
    report: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare solvers: fit them where needed, sample from unseen noise, and measure against a converged reference.

    Parameters
    ----------
    setting : model and noise to compare on.
    solvers : names of registered solvers and of IIA's presets. The name ``"iia"`` stands for the solver found by
        :func:`iia_ode.fit`.
    nfes : numbers of evaluations. A solver is left out where it cannot make the number exactly.
    make_grid : family of grids, a function from a number of levels to a grid. The solver ``"iia"`` searches for its own
        grid; all others use this family.
    samples : number of unseen initial states to measure on.
    fit_samples : number of initial states to fit on. A `budget` may add more.
    target : target of the presets' steps: ``"substeps"`` as in the paper, ``"local"`` or ``"trajectory"``.
    budget : name of the budget of ``"iia"``: ``"closed-form"``, ``"standard"`` or ``"thorough"``.
    guidance_scale : scale of classifier-free guidance; 1 is no guidance.
    seed : seed of both batches. The batch to fit on and the batch to measure on come from different generators.
    device : device of the model.
    progress : whether to show a progress bar over the cells of the table.
    report : function called with a line of text at each stage.

    Returns
    -------
    A :class:`Comparison`: rows, samples, fits and settings.

    Raises
    ------
    UnknownNameError : no such solver, preset or budget.
    InputError : the comparison is empty: no solvers, no numbers of evaluations, no samples, or no solver can make any of
        the numbers. Or guidance is requested and the setting has no conditions.
    GridError : `make_grid` cannot make a grid of two levels.
    """
    if not solvers or not nfes or samples < 1 or fit_samples < 1:
        raise InputError("compare needs at least one solver, one number of evaluations and one sample.")
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    say = report or (lambda _: None)
    methods = {name: _method(name, target) for name in solvers}
    (fit_ode, fit_x), (ode, x) = (
        setting.draw(n, batch_seed(seed, unseen=unseen), guidance_scale=guidance_scale, device=device)
        for n, unseen in ((fit_samples, False), (samples, True))
    )
    grids = _grids(methods, nfes, make_grid, setting, say)
    start, end = (float(make_grid(2)[i]) for i in (0, -1))
    fits = _Fits(setting, fit_ode, fit_x, (start, end), BUDGETS[budget], max(nfes), seed, say, progress)
    say(f"reference: {samples} unseen samples by dopri8, tolerance {setting.reference_tolerance:g}")
    tolerance = setting.reference_tolerance
    reference = solve(ode, x, start, end, rtol=tolerance, atol=tolerance, sigma_min=setting.sigma_min)
    rows, finals = [], {}
    for (name, nfe), grid in tqdm(grids.items(), desc="compare", disable=not progress):
        method = methods[name]
        if isinstance(method, Solver):
            final, (seen, evaluations, seconds) = sample(ode, x, grid, method), (0, 0, 0.0)
        else:
            fit, (seen, evaluations, seconds) = fits.make(name, nfe, method, grid)
            final = sample(ode, x, solver=fit)
            grids[name, nfe] = fit.grid
        finals[name, nfe] = final
        rows.append(Row(name, nfe, *rmse_with_error(final, reference), seen, evaluations, seconds))
        say(f"{name:>10} at {nfe:>3} evaluations: RMSE {rows[-1].rmse:.4f}")
    settings = {
        "setting": setting.name,
        "schedule": setting.schedule.config(),
        "samples": samples,
        "fit_samples": fit_samples,
        "target": target,
        "budget": budget,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "device": device,
        "grids": {f"{name} {nfe}": grid.tolist() for (name, nfe), grid in grids.items() if grid is not None},
    }
    return Comparison(tuple(rows), tuple(solvers), tuple(nfes), reference, finals, fits.made, settings)


class _Fits:
    """The fits of a comparison, all on one batch. Fits to accurate trajectories share the trajectories."""

    def __init__(
        self,
        setting: Setting,
        ode: ProbabilityFlowODE,
        x: Tensor,
        ends: tuple[float, float],
        budget: Budget,
        most: int,
        seed: int,
        say: Callable[[str], None],
        progress: bool,
    ) -> None:
        self.setting, self.ode, self.x, self.ends, self.budget, self.seed = setting, ode, x, ends, budget, seed
        self.most = most  # the largest number of evaluations
        self.say, self.progress = say, progress
        self.made: dict[tuple[str, int], FittedSolver] = {}

    @cached_property
    def _teacher(self) -> tuple[Teacher, float]:
        """Accurate trajectories for presets, and their wall-clock time in seconds."""
        begun = time.perf_counter()
        teacher = Teacher.solve(self.ode, self.x, *self.ends, sigma_min=self.setting.sigma_min)
        return teacher, time.perf_counter() - begun

    @cached_property
    def _found_teacher(self) -> tuple[Teacher | None, float]:
        """Accurate trajectories for :func:`iia_ode.fit`, shared by all numbers of evaluations, and their time in seconds.

        The trajectories are None if :func:`iia_ode.fit` must make its own, because it adds noise samples.
        """
        begun = time.perf_counter()
        if self.budget.draws > len(self.x):
            return None, 0.0
        start, end = self.setting.schedule.t_of_noise_to_signal(self.setting.sigma_max), self.setting.schedule.t_data
        steps, low = self.budget.steps(self.most), self.setting.sigma_min
        teacher = Teacher.solve(self.ode, self.x, start, end, steps=steps, sigma_min=low, chunk_size=_CHUNK)
        return teacher, time.perf_counter() - begun

    def make(
        self, name: str, nfe: int, method: IIA | None, grid: Tensor | None
    ) -> tuple[FittedSolver, tuple[int, int, float]]:
        """Fit by IIA on a grid, or by :func:`iia_ode.fit` if there is no method.

        Return the fit and its cost: samples, evaluations, seconds.
        """
        teacher, shared = None, 0.0
        if method is None:
            teacher, shared = self._found_teacher
        elif method.target == "trajectory":
            teacher, shared = self._teacher
        begun = time.perf_counter()
        if method is not None and grid is not None:
            fit = method.fit(self.ode, self.x, grid, teacher=teacher)
        else:
            fit = find(
                self.ode,
                nfe,
                x=self.x,
                budget=self.budget,
                sigma_max=self.setting.sigma_max,
                sigma_min=self.setting.sigma_min,
                teacher=teacher,
                seed=self.seed,
                progress=self.progress,
            )
        self.made[name, nfe] = fit
        evaluations = fit.record.evaluations + (teacher.evaluations if teacher is not None else 0)
        return fit, (fit.record.batch, evaluations, time.perf_counter() - begun + shared)


def _grids(
    methods: dict[str, Solver | IIA | None],
    nfes: Sequence[int],
    make_grid: Callable[[int], Tensor],
    setting: Setting,
    say: Callable[[str], None],
) -> dict[tuple[str, int], Tensor | None]:
    """Make the grid of every possible cell, by (solver, nfe). None stands for a grid found by :func:`iia_ode.fit`."""
    make_grid(2)  # raises here if the family cannot make any grid; below, a GridError means an impossible cell
    grids: dict[tuple[str, int], Tensor | None] = {}
    for name, method in methods.items():
        missing = []
        for nfe in nfes:
            try:
                base = method.base_solver if isinstance(method, IIA) else method
                grids[name, nfe] = None if base is None else base.grid_for(nfe, make_grid, setting.schedule)
            except GridError:
                missing.append(nfe)
        if missing:
            say(f"{name} is left out at {', '.join(map(str, missing))} evaluations: no grid gives exactly this number")
    if not grids:
        raise InputError(f"none of {', '.join(methods)} can make any of {', '.join(map(str, nfes))} evaluations.")
    return grids


def _method(name: str, target: str) -> Solver | IIA | None:
    """Look up a solver or preset by name; None stands for the solver found by :func:`iia_ode.fit`."""
    if name == RECIPE:
        return None
    return preset(name, target=target) if name in PRESETS else get_solver(name)
