"""The cells of a comparison: a line at a number of evaluations, fitted where needed, measured, or found in a folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..autofit import Budget
from ..errors import GridError, InputError
from ..iia import IIA, FittedSolver
from ..integrate import sample
from ..metrics import rmse_with_error
from ..plan import Plan, check_grid, traced
from ..schedules import Schedule
from ..sharing.records import surroundings
from ..solvers import Solver
from .fits import Fits, Spent
from .folder import Cell, Folder, opened
from .lines import Family, Line, Method, grid_of
from .results import Comparison, Protocol, Row
from .task import Task

__all__ = ["Options", "compared"]


@dataclass(frozen=True)
class Options:
    """Options of a comparison; see :func:`~iia_ode.experiments.compare`."""

    fit_samples: int
    target: str
    budget: str | Budget
    seed: int
    repeats: int
    resume: Path | None
    progress: bool
    say: Callable[[str], None]


def compared(
    task: Task, lines: list[Line], nfes: tuple[int, ...], families: Mapping[str, Family], options: Options
) -> Comparison:
    """Fill the cells."""
    ends, say, schedule = _ends(families, task), options.say, task.ode.schedule
    cells = _cells(lines, nfes, families, schedule, say)
    fits = Fits(task, ends, max(nfes), options.fit_samples, options.seed, options.budget, options.progress)
    folder = opened(options.resume, task, ends, options.repeats, say)
    exact = _reference(task, ends, folder, say)
    found: dict[tuple[str, int], Cell] = {}
    plans: dict[tuple[str, int], Plan] = {}
    for line, nfe, grid in tqdm(cells, desc="compare", disable=not options.progress):
        key = folder and folder.key(line, nfe, grid, fits)
        cell = folder.cell(key) if folder and key else None
        source = "" if cell is None else " (found)"
        if cell is None:
            cell = _measured(task, line, nfe, grid, fits, exact, ends, options.repeats)
            if folder and key:
                folder.keep(key, cell)
        row = replace(cell.row, solver=line.name, method=line.solver, grid=line.family)
        found[line.name, nfe] = replace(cell, row=row)
        plans[line.name, nfe] = _plan(schedule, cell.fit or line.method, grid)
        say(f"{line.name:>10} at {nfe:>3} evaluations: RMSE {row.rmse:.4g}{source}")
    own = {key: cell.fit for key, cell in found.items() if cell.fit is not None}
    return Comparison(
        tuple(cell.row for cell in found.values()),
        tuple(line.name for line in lines),
        nfes,
        exact,
        {key: cell.final for key, cell in found.items()},
        {key: torch.tensor(plan.grid, dtype=torch.float64, device="cpu") for key, plan in plans.items()},
        own,
        _protocol(task, options, len(fits.states[1]) if own else 0),
        plans,
    )


def _protocol(task: Task, options: Options, fit_samples: int) -> Protocol:
    """The conditions of the comparison."""
    scale = task.ode.guidance_scale
    return Protocol(
        setting=task.name,
        schedule=task.ode.schedule.config(),
        samples=len(task.x),
        fit_samples=fit_samples,
        target=options.target,
        budget=options.budget if isinstance(options.budget, str) else "own",
        guidance_scale=scale if isinstance(scale, int | float) else None,
        seed=options.seed,
        device=str(task.x.device),
        tolerance=None if task.reference is not None else task.tolerance,
        repeats=options.repeats,
        fingerprint=str(task.ode.fingerprint()),
        surroundings=surroundings(task.x.device),
    )


def _reference(task: Task, ends: tuple[float, float], folder: Folder | None, say: Callable[[str], None]) -> Tensor:
    """The accurate final states: given, found in the folder, or computed."""
    if task.reference is not None or folder is None:
        return task.accurate(ends, say)
    exact = folder.reference()
    if exact is not None:
        say(f"reference: {len(task.x)} unseen samples (found)")
    else:
        exact = task.accurate(ends, say)
        folder.keep_reference(exact)
    return exact


def _measured(
    task: Task,
    line: Line,
    nfe: int,
    grid: Tensor | None,
    fits: Fits,
    exact: Tensor,
    ends: tuple[float, float],
    repeats: int,
) -> Cell:
    """Fit the line where needed, sample, and compare with the accurate final states."""
    method, fit, cost = line.method, None, Spent()
    if method is None or isinstance(method, IIA):
        fit, cost = fits.make(nfe, method, grid)
        method = fit
    _check_ends(line.name, _plan(task.ode.schedule, method, grid).grid, ends, task.ode.schedule)
    own = isinstance(method, FittedSolver | Plan)
    with task.ode.counting() as spent:
        final, first = _timed(lambda: sample(task.ode, task.x, None if own else grid, method))
    seconds = [_timed(lambda: sample(task.ode, task.x, None if own else grid, method))[1] for _ in range(repeats)]
    row = Row(
        line.name,
        nfe,
        *rmse_with_error(final, exact),
        fit_samples=cost.samples,
        fit_evaluations=cost.evaluations,
        fit_seconds=cost.seconds,
        fitted=isinstance(method, FittedSolver),
        sample_evaluations=spent.samples,
        seconds=median(seconds or [first]),
        fit_sample_evaluations=cost.sample_evaluations,
    )
    return Cell(row, final, fit)


def _timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The states of a run and its wall-clock time in seconds, until the states are known on the host."""
    begun = time.perf_counter()
    final = run()
    final.reshape(-1)[-1:].cpu()  # waits for the device
    return final, time.perf_counter() - begun


def _plan(schedule: Schedule, method: Method, grid: Tensor | None) -> Plan:
    """The plan of a solver on a grid, or of a solver with a grid of its own."""
    if isinstance(method, Solver) and grid is not None:
        return traced(method, schedule, grid)
    return method.plan if isinstance(method, FittedSolver) else cast(Plan, method)


def _ends(families: Mapping[str, Family], task: Task) -> tuple[float, float]:
    """The first and the last time of all grids. A GridError here means that a family makes no grid at all."""
    schedule = task.ode.schedule
    pairs = {name: check_grid(schedule, family(2)) for name, family in families.items()}
    ends = next((times[0], times[-1]) for times in pairs.values())
    for name, times in pairs.items():
        _check_ends(name, times, ends, schedule)
    start = schedule.noise_to_signal(ends[0])
    if task.sigma_max is not None and not _same(start, task.sigma_max):
        raise GridError(
            f"the grids start at level {start:g}, and {task.name} draws states of level {task.sigma_max:g}: make the levels "
            "equal by the grid's sigma_max or by the setting's."
        )
    return ends


def _check_ends(name: str, grid: Sequence[float], ends: tuple[float, float], schedule: Schedule) -> None:
    """Raise GridError unless a grid has the same ends as the reference."""
    own, due = ([schedule.noise_to_signal(t) for t in pair] for pair in ((grid[0], grid[-1]), ends))
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
