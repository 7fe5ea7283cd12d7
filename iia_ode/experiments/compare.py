"""The main job: solvers against each other, fitted ones on unseen noise, by endpoint error at equal evaluations."""

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

from ..errors import GridError, InputError, unknown_name
from ..iia import BUDGETS, IIA, PRESETS, Budget, FittedSolver, Teacher, preset
from ..iia.recipe import fit as find
from ..integrate import sample
from ..metrics import rmse_with_error
from ..ode import ProbabilityFlowODE
from ..reference import solve
from ..solvers import Solver, get_solver
from .settings import Setting, batch_seed

__all__ = ["RECIPE", "Comparison", "Row", "compare"]

RECIPE = "iia"
"""The name of what :func:`iia_ode.fit` finds, among the solvers of a comparison."""

_CHUNK = 64  # samples of a fit that go through the model at once
_SMALL = 3.0  # below this level, `iia_ode.fit` could take initial states for the noise that it would scale


@dataclass(frozen=True)
class Row:
    """One solver at one number of evaluations.

    Attributes
    ----------
    rmse, standard_error : root mean square difference per component between the final states and a converged reference
        from the same unseen noise, and its standard error over samples.
    fit_samples, fit_evaluations, fit_seconds : what fitting took, 0 for a solver that is not fitted. Where fits share
        accurate trajectories, those count in each of them.
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
    """The outcome of :func:`compare`.

    Attributes
    ----------
    rows : one per solver and number of evaluations that the solver can make.
    solvers, nfes : what was asked for, in order.
    reference : converged final states [B, ...].
    samples : final states of each row, by (solver, nfe).
    fits : the fitted solvers, by (solver, nfe).
    settings : everything needed to run it again, JSON-ready.
    """

    rows: tuple[Row, ...]
    solvers: tuple[str, ...]
    nfes: tuple[int, ...]
    reference: Tensor
    samples: dict[tuple[str, int], Tensor]
    fits: dict[tuple[str, int], FittedSolver]
    settings: dict[str, Any]

    def error(self, solver: str, nfe: int) -> float | None:
        """The RMSE of a cell; None where the solver cannot make that many evaluations."""
        return next((r.rmse for r in self.rows if (r.solver, r.nfe) == (solver, nfe)), None)

    def table(self, markdown: bool = False) -> str:
        """Solvers down, evaluations across; a dash where the count is not possible, a star on the lowest of a column."""
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
        """All rows as comma-separated values."""
        out = io.StringIO()
        writer = csv.DictWriter(out, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in self.rows)
        return out.getvalue()


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
    """Fit what has to be fitted, sample from unseen noise, and measure against a converged reference.

    Parameters
    ----------
    setting : the model and its noise.
    solvers : registered solvers and presets of IIA, by name, and ``"iia"``: what :func:`iia_ode.fit` finds.
    nfes : numbers of evaluations; a solver that cannot make one exactly has no entry there.
    make_grid : from a number of levels to a grid; all solvers but ``"iia"``, which finds its own, use this family.
    samples, fit_samples : unseen initial states that are measured, and initial states that fits see; a `budget` may add
        to these.
    target : what presets are fitted to: ``"substeps"`` as in the paper, ``"local"`` or ``"trajectory"``.
    budget : what ``"iia"`` may spend on a fit.
    guidance_scale : of classifier-free guidance.
    seed : of both batches, which come from different generators.
    device : where the model runs.
    progress : show a bar over the cells of the table.
    report : called with a line of text about what is going on.

    Raises
    ------
    UnknownNameError, InputError : a solver is not known, or there is nothing to compare.
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
    """The fits of a comparison, on one batch; those to accurate trajectories share them."""

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
        self.most = most  # evaluations
        self.say, self.progress = say, progress
        self.made: dict[tuple[str, int], FittedSolver] = {}

    @cached_property
    def _teacher(self) -> tuple[Teacher, float]:
        """The trajectories that presets aim at, and the seconds that they took."""
        begun = time.perf_counter()
        teacher = Teacher.solve(self.ode, self.x, *self.ends, sigma_min=self.setting.sigma_min)
        return teacher, time.perf_counter() - begun

    @cached_property
    def _found_teacher(self) -> tuple[Teacher | None, float]:
        """Those of :func:`iia_ode.fit`, made once for all numbers of evaluations; None where it adds noise of its own."""
        begun = time.perf_counter()
        if self.budget.draws > len(self.x) or self.setting.sigma_max < _SMALL:
            return None, 0.0
        start, end = self.setting.schedule.t_of_noise_to_signal(self.setting.sigma_max), self.setting.schedule.t_data
        steps, low = self.budget.steps(self.most), self.setting.sigma_min
        teacher = Teacher.solve(self.ode, self.x, start, end, steps=steps, sigma_min=low, chunk_size=_CHUNK)
        return teacher, time.perf_counter() - begun

    def make(
        self, name: str, nfe: int, method: IIA | None, grid: Tensor | None
    ) -> tuple[FittedSolver, tuple[int, int, float]]:
        """A fit, by IIA on a grid or else by :func:`iia_ode.fit`, and its cost: samples, evaluations, seconds."""
        teacher, shared = None, 0.0
        if method is None:
            teacher, shared = self._found_teacher
        elif method.target == "trajectory":
            teacher, shared = self._teacher
        begun = time.perf_counter()
        if method is not None and grid is not None:
            fit = method.fit(self.ode, grid, self.x, teacher=teacher, seed=self.seed)
        else:
            top = self.setting.sigma_max
            noise = self.x if top >= _SMALL else self.x / top
            fit = find(
                self.ode, nfe, noise, budget=self.budget, sigma_max=top, sigma_min=self.setting.sigma_min,
                teacher=teacher, chunk_size=_CHUNK, seed=self.seed,
                report=lambda line: self.say(f"  {line}"), progress=self.progress,
            )  # fmt: skip
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
    """Every cell that exists, for not every solver can make every number of evaluations; None where a fit finds the grid."""
    make_grid(2)  # a family that makes no grid at all is an error, not a count that cannot be had
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
            say(f"{name} cannot make exactly {', '.join(map(str, missing))} evaluations and sits those out")
    if not grids:
        raise InputError(f"none of {', '.join(methods)} can make any of {', '.join(map(str, nfes))} evaluations.")
    return grids


def _method(name: str, target: str) -> Solver | IIA | None:
    """The solver of that name; None for what :func:`iia_ode.fit` finds."""
    if name == RECIPE:
        return None
    return preset(name, target=target) if name in PRESETS else get_solver(name)
