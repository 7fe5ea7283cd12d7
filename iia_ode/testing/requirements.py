"""Requirements of the checks: a kept promise, and an error that falls with the number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..errors import ConformanceError
from ..integrate import sample
from ..schedules import Schedule
from ..solvers import Solver
from .cases import draw, gaussian, rms

__all__ = ["name_of", "require", "require_convergence"]

ENOUGH = 2e-3  # relative error at the last noise level of the grids, 0.002


def require(kept: bool, solver: Solver, what: str) -> None:
    """Raise ConformanceError with the solver's label and `what` unless `kept`."""
    if not kept:
        raise ConformanceError(f"{solver.label}: {what}.")


def name_of(schedule: Schedule) -> str:
    """The class of a schedule, for messages."""
    return type(schedule).__name__


def require_convergence(
    solver: Solver, schedule: Schedule, make_grid: Callable[[int], Tensor], counts: tuple[int, int]
) -> None:
    """Require a final error on Gaussian data that is small, or at most half as large at the second count as at the first."""
    errors = []
    for n in counts:
        grid = make_grid(n)
        start, end = float(grid[0]), float(grid[-1])
        x = draw(gaussian(), 8, schedule, start)
        exact = gaussian().flow(x, schedule, start, end)
        errors.append(rms(sample(gaussian().ode(schedule), x, grid, solver) - exact) / rms(exact))
    require(
        math.isfinite(errors[1]) and errors[1] <= max(errors[0] / 2, ENOUGH),
        solver,
        f"on {name_of(schedule)} from t = {start:.3g} to {end:.3g}, {counts[0]} steps leave a relative error of "
        f"{errors[0]:.2g} and {counts[1]} steps {errors[1]:.2g}; expected half of it",
    )
