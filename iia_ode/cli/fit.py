"""``iia-ode fit``: search for the best solver with a number of evaluations, or fit IIA on a given grid."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
from torch import Tensor
from tqdm import tqdm

from ..autofit import BUDGETS, Budget, fit
from ..autofit.draws import start_time
from ..errors import unknown_name
from ..experiments import batch_seed
from ..files import check_writable
from ..iia import IIA, PRESETS, FittedSolver, TeacherTrajectory, preset
from ..iia.targets import resolve_target
from ..noise import sample_seeds
from ..ode import ProbabilityFlowODE, distributed
from ..solvers import solver_names
from ..teacher import Teacher
from ..teacher.teacher import read_teacher
from .drawing import FOLDER, draw_fit
from .options import COUNT, NFE, Job, Range, findings_as_lines, given, interactive, on_a_model, warnings_as_lines
from .ranks import Process, joined

__all__ = ["fit_command"]

_OF_IIA = ("terms", "target", "history", "substeps", "ridge", "guard", "intercept")


def _ridge(ctx: click.Context, param: click.Parameter, value: str | None) -> float | str | None:
    if value is None or value == "auto":
        return value
    convert: Callable[..., float] = Range(0, 1e9).convert
    return convert(value, param, ctx)


@click.command("fit")
@on_a_model
@click.option("--nfe", type=NFE, default=9, show_default=True, help="Evaluations of the fitted solver.")
@click.option("--budget", type=click.Choice(list(BUDGETS)), help="Budget of the search [default: standard].")
@click.option(
    "--solver",
    "--preset",
    "solver",
    help=f"Fit IIA on the given grid instead: a preset ({', '.join(PRESETS)}), or any registered solver as base.",
)
@click.option(
    "--terms",
    type=click.Choice(["paper", "window", "biia-edm", "iia-edm", "iia-ddim"]),
    help="Directions added to a step of the base [default: paper].",
)
@click.option(
    "--target",
    type=click.Choice(["substeps", "local", "trajectory"]),
    help="Target of each step: sub-steps of the base, an accurate integration of the step, or the accurate trajectory "
    "[default: substeps].",
)
@click.option("--history", type=click.IntRange(0, 10_000), help="Earlier steps to use, r [default: 1].")
@click.option("--substeps", type=click.IntRange(1, 10_000), help="Sub-steps of the target, M [default: 3].")
@click.option("--ridge", callback=_ridge, metavar="NUMBER|auto", help="Relative ridge towards the base [default: 0].")
@click.option(
    "--guard/--no-guard",
    default=None,
    help="Hold out samples, and keep the base where they show no gain [default: for a base yes, for a preset no].",
)
@click.option("--intercept", is_flag=True, default=None, help="Also fit a constant in each step.")
@click.option(
    "--samples",
    type=COUNT,
    help="Initial states to fit on [default: 256, with --solver 200]. --budget thorough adds more if there are few, and "
    "draws as many for its final choice.",
)
@click.option("--chunk-size", type=COUNT, help="Samples per call of the model [default: 64, with --solver all].")
@click.option(
    "--teacher",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Read the accurate trajectories from this file, written by --save-teacher.",
)
@click.option(
    "--save-teacher",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Save the accurate trajectories in this file.",
)
@click.option(
    "--checkpointed",
    is_flag=True,
    help="Refine with the memory of one evaluation instead of all, at 1.5 times the work.",
)
@click.option("--plots", type=FOLDER, help="Also draw the fit into this folder.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write.")
def fit_command(
    job: Job,
    nfe: int,
    budget: str | None,
    solver: str | None,
    samples: int | None,
    chunk_size: int | None,
    teacher: Path | None,
    save_teacher: Path | None,
    checkpointed: bool,
    plots: Path | None,
    out: Path,
    **options: Any,
) -> None:
    """Fit a solver to a model and save it as one safetensors file.

    Searches for the grid and the weights with the lowest error at --nfe evaluations, within --budget. With --solver, fits
    the weights of a solver on the given grid, by improved integration approximation. Under torchrun, several processes
    share the samples: torchrun --nproc-per-node=2 -m iia_ode fit --nfe 6 --out fit.safetensors
    """
    if teacher is not None and save_teacher is not None:
        raise click.UsageError("--teacher reads trajectories and --save-teacher makes new ones: choose one.")
    files = _Files(teacher, save_teacher, out, plots)
    if solver is None:
        _find(job, nfe, budget or "standard", samples, chunk_size or 64, checkpointed, files)
    else:
        if checkpointed:
            raise click.UsageError(
                "--checkpointed is for refinements, and --solver fits in closed form: leave one out."
            )
        method = _method(solver, budget, {k: v for k, v in options.items() if v is not None}, files)
        _fit_iia(job, nfe, method, samples or 200, chunk_size, files)


@dataclass(frozen=True)
class _Files:
    """Paths of the files that a fit reads and writes."""

    teacher: Path | None
    save_teacher: Path | None
    out: Path
    plots: Path | None

    def check(self) -> None:
        """Raise OSError now, before the work, if a file cannot be written."""
        for path in (self.save_teacher, self.out, self.plots and self.plots / "coefficients.png"):
            if path is not None:
                check_writable(path)

    @cached_property
    def kept(self) -> Teacher | None:
        """The teacher read from --teacher, if given."""
        return None if self.teacher is None else read_teacher(self.teacher)

    def teach(self, solve: Callable[[], Teacher], leads: bool) -> Teacher | None:
        """Read the teacher of --teacher, or make a teacher for --save-teacher and write it.

        Return None if neither option is given; the fit then makes its own teacher.
        """
        if self.kept is not None or self.save_teacher is None:
            return self.kept
        teacher = solve()
        if leads:
            path = teacher.save(self.save_teacher)
            _say(f"teacher: {teacher.sample_evaluations} sample evaluations; written: {path}")
        return teacher


def _find(
    job: Job, nfe: int, budget: str, samples: int | None, chunk_size: int, checkpointed: bool, files: _Files
) -> None:
    """Search for the best solver with `nfe` evaluations, in one process or several, and write the fit."""
    for name in (*_OF_IIA, "grid", "rho"):
        if given(name):
            option = "--guard/--no-guard" if name == "guard" else f"--{name}"
            raise click.UsageError(f"{option} goes with --solver: without --solver, grid and weights are searched for.")
    if checkpointed and not BUDGETS[budget].starts:
        raise click.UsageError(
            f"--checkpointed is for refinements, and --budget {budget} has none: leave out --checkpointed, or use --budget "
            "standard."
        )
    with joined(job.device) as process, warnings_as_lines(process.leads), findings_as_lines(_say):
        if process.leads:
            files.check()
        options = replace(BUDGETS[budget], chunk_size=chunk_size, checkpointed=checkpointed)
        found = _search(replace(job, device=process.device), nfe, options, samples, files, process.leads)
        if process.leads:
            _write(found, files)


def _search(job: Job, nfe: int, budget: Budget, samples: int | None, files: _Files, leads: bool) -> FittedSolver:
    """Call `iia_ode.fit` with the command's options."""
    count = samples or (256 if files.kept is None else len(files.kept.initial))
    if files.save_teacher is not None:
        # `iia_ode.fit` adds no noise to a given teacher, so all samples of the budget are drawn here.
        count = max(count, budget.draws)
    states = _states(job, count)
    schedule, low = job.setting.schedule, states.sigma_min

    def solve() -> Teacher:
        start, steps = start_time(states.ode, states.sigma_max, states.draws), budget.steps(nfe)
        return Teacher.solve(
            states.ode,
            states.at(schedule.sigma(start)),
            start,
            schedule.t_data,
            steps=steps,
            sigma_min=job.lowest if low is None else low,
            chunk_size=budget.chunk_size,
            progress=leads and interactive(),
        )

    return fit(
        states.ode,
        nfe,
        noise=states.draws if states.is_noise else None,
        x=None if states.is_noise else states.draws,
        budget=budget,
        sigma_max=states.sigma_max,
        sigma_min=low,
        teacher=files.teach(solve, leads),
        seed=job.seed,
        progress=leads and interactive(),
    )


@dataclass(frozen=True)
class _States:
    """The states of a search: initial states, or noise for the noisiest level that the search chooses."""

    ode: ProbabilityFlowODE
    draws: Tensor
    is_noise: bool
    sigma_min: float | None
    sigma_max: float | None

    def at(self, sigma: float) -> Tensor:
        """The initial states [B, ...], where the noise has the standard deviation `sigma`."""
        return sigma * self.draws if self.is_noise else self.draws


def _states(job: Job, count: int) -> _States:
    """Draw the states of a search; a model of the user's own leaves its levels to the search, unless they are given."""
    if job.own is None:
        ode, x = job.draw(count)
        return _States(distributed(ode), x, False, job.lowest, job.setting.sigma_max)
    ode, noise = job.own.noise(sample_seeds(batch_seed(job.seed, unseen=False), range(count)), job.device)
    return _States(distributed(ode), noise, True, *job.own.levels)


def _method(solver: str, budget: str | None, changes: dict[str, Any], files: _Files) -> IIA:
    """Make the IIA method of the command's options."""
    if budget is not None:
        raise click.UsageError("--budget is for a search, and --solver leaves nothing to search for: leave one out.")
    if solver not in PRESETS and solver not in solver_names():
        raise unknown_name("preset or solver", solver, [*PRESETS, *solver_names()])
    if solver in PRESETS and "terms" in changes:
        raise click.UsageError(
            f"preset {solver} brings its own terms: --terms goes with a registered solver as --solver."
        )
    method = preset(solver, **changes) if solver in PRESETS else IIA(solver, **changes)
    if "substeps" in changes and method.target != "substeps":
        raise click.UsageError(f"--substeps is for --target substeps, not for {method.target}: leave it out.")
    if (files.teacher or files.save_teacher) and method.target != "trajectory" and not method.guard:
        raise click.UsageError("a file of trajectories goes with --target trajectory or with --guard.")
    return method


def _fit_iia(job: Job, nfe: int, method: IIA, samples: int, chunk_size: int | None, files: _Files) -> None:
    """Fit a solver on the given grid, in one process or several, and write the fit."""
    grid = method.base_solver.grid_for(nfe, job.family(), job.setting.schedule)
    with joined(job.device) as process, warnings_as_lines(process.leads):
        if process.leads:
            files.check()
            _say(_spending(method, nfe, samples, process))
        ode, x = replace(job, device=process.device).draw(samples)
        ode, progress = distributed(ode), process.leads and interactive()
        teacher = files.teach(lambda: _teacher(method, ode, grid, x, chunk_size, progress), process.leads)
        fitted = method.fit(ode, x, grid, teacher=teacher, chunk_size=chunk_size, progress=progress)
        if process.leads:
            _write(fitted, files)


def _teacher(
    method: IIA, ode: ProbabilityFlowODE, grid: Tensor, x: Tensor, chunk_size: int | None, progress: bool
) -> Teacher:
    """Make the teacher that the fit would make itself."""
    target = resolve_target(method.target, method.substeps)
    steps = target.steps if isinstance(target, TeacherTrajectory) else None
    return Teacher.for_grid(ode, x, grid, steps=steps, chunk_size=chunk_size, progress=progress)


def _spending(method: IIA, nfe: int, samples: int, process: Process) -> str:
    """Describe the cost of a fit."""
    target = resolve_target(method.target, method.substeps)
    work = {
        "substeps": f"{method.substeps} sub-steps of {method.base_solver.name} in each step as targets",
        "local": "an adaptive integration of each step as target",
        "trajectory": f"accurate trajectories of {getattr(target, 'steps', 0)} steps",
    }[target.name]
    where = f", in {process.size} processes" if process.size > 1 else ""
    return f"{samples} initial states, {nfe} evaluations each, and {work}{where}"


def _write(fitted: FittedSolver, files: _Files) -> None:
    fitted.save(files.out)
    _say(f"\n{fitted}\n\nwritten: {files.out}")
    if files.plots is not None and (drawn := draw_fit(fitted, files.plots)):
        _say(f"written: {', '.join(map(str, drawn))}")


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)  # keeps progress bars intact
