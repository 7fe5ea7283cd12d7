"""The measured order of a solver, its start-up steps aside.

A multistep method starts with fewer outputs than it combines later, and one step of Euler's limits the order of everything
after it to 2. So the first quarter of every grid is made exact, without any co-operation of the solver: the states there are
overwritten by the exact solution while the plan runs (:mod:`.startup`). The evaluations that later steps look back on are then
those that the solver makes along the exact solution, and what remains at the end is the error of the other three quarters.

A quarter of the grid is a fixed stretch of time, so that leaving it out does not bend the slope; it holds six steps or more,
and whole blocks of two or three.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..plan import Plan, trace
from ..plan.plan import run_code
from ..schedules import Schedule
from ..solvers import SolverLike, as_solver
from .cases import PROBLEMS, SCHEDULES, TRACKS, Model, Track, exact_states, model_of, rms
from .startup import known_states

__all__ = ["COUNTS", "TOLERANCE", "OrderMeasurement", "local_slopes", "measure_order", "measure_orders", "order_misses"]

TOLERANCE = 0.15
"""How far a measured order may lie from a whole number."""

COUNTS = (24, 48, 96, 192, 384)
"""Intervals of the grids, as many of them as it takes."""

SETTLED = 0.03  # a local slope p + c h moves by c h / 2 when h is halved, which is what it is still off by
FLOOR = 1e-12  # relative error at which the rounding of references and sums, a few 1e-14, still moves no slope by 0.1


@dataclass(frozen=True)
class OrderMeasurement:
    """The error of a solver on one problem over refined grids.

    Attributes
    ----------
    problem, schedule, grid : what was integrated, on which schedule, and what the grid is uniform in.
    from_exact_start : whether the start-up steps were left out.
    counts, errors : intervals, and the root mean square error of the state at the end.
    slopes : local orders, between successive counts.
    """

    problem: str
    schedule: str
    grid: str
    from_exact_start: bool
    counts: tuple[int, ...]
    errors: tuple[float, ...]
    slopes: tuple[float, ...]

    @property
    def order(self) -> float:
        """The last slope; infinite where the errors are rounding from the coarsest grid on."""
        return self.slopes[-1] if self.slopes else math.inf

    def agrees_with(self, claimed: int) -> bool:
        """Whether this is the claimed order, or a higher whole one that this problem happens to allow."""
        if not math.isfinite(self.order):
            return self.order > 0
        return round(self.order) >= claimed and abs(self.order - round(self.order)) <= TOLERANCE

    def __str__(self) -> str:
        shown = ", ".join(f"{n}: {e:.2g}" for n, e in zip(self.counts, self.errors, strict=True))
        order = "none (errors are rounding)" if self.order == math.inf else f"{self.order:.2f}"
        return f"{order} on {self.schedule}, {self.problem}, uniform in {self.grid} (errors {shown})"


def measure_orders(
    solver: SolverLike, schedules: Iterable[Schedule] = SCHEDULES, *, from_exact_start: bool = True
) -> tuple[OrderMeasurement, ...]:
    """The order on both problems, for every schedule and track; arguments as for :func:`measure_order`."""
    found = as_solver(solver)
    return tuple(
        measurement
        for schedule in schedules
        for track in TRACKS
        for measurement in measure_order(found, schedule, track, from_exact_start=from_exact_start)
    )


def measure_order(
    solver: SolverLike, schedule: Schedule, track: Track, *, from_exact_start: bool = True
) -> tuple[OrderMeasurement, ...]:
    """The order on each problem along one track.

    The grid is refined until the slopes settle, or until the error is near rounding.

    Parameters
    ----------
    solver : a registered name or a solver.
    schedule, track : where.
    from_exact_start : leave out the start-up steps; False measures what a user sees who starts from x_T.
    """
    found = as_solver(solver)
    errors: dict[str, list[float]] = {problem: [] for problem in PROBLEMS}
    open_problems = list(PROBLEMS)
    for n in COUNTS:
        plan = trace(found, schedule, track.grid(schedule, n), consistent=False)
        for problem in open_problems:
            model = model_of(PROBLEMS[problem](), schedule)
            errors[problem].append(_relative_error(plan, model, problem, track, n, from_exact_start))
        open_problems = [problem for problem in open_problems if not _settled(errors[problem])]
        if not open_problems:
            break
    return tuple(_measurement(problem, schedule, track, from_exact_start, errors[problem]) for problem in PROBLEMS)


def order_misses(measurements: Sequence[OrderMeasurement], claimed: int) -> list[str]:
    """What is wrong with a claimed order, in words; nothing if it is right.

    The order of a method is the least that it shows. On one problem or grid an error term may vanish (the midpoint rule has
    order 3 on Gaussian data where alpha and sigma are linear in t; weights made for a uniform grid have their full order on
    one), and then it must show a higher whole order. On every schedule, though, it must somewhere show the order it claims.
    """
    misses = [f"measured order {m}, claimed {claimed}" for m in measurements if not m.agrees_with(claimed)]
    for schedule in dict.fromkeys(m.schedule for m in measurements):
        least = min((m for m in measurements if m.schedule == schedule), key=lambda m: m.order)
        if least.order > claimed + TOLERANCE:
            misses.append(f"claims order {claimed}, which is too low: the least measured order is {least}")
    return misses


def local_slopes(counts: Sequence[int], errors: Sequence[float]) -> tuple[float, ...]:
    """Orders between successive counts; minus infinity where an error is not finite."""
    slopes = []
    for (n, coarse), (m, fine) in zip(
        zip(counts, errors, strict=True), zip(counts[1:], errors[1:], strict=True), strict=False
    ):
        usable = math.isfinite(coarse) and math.isfinite(fine) and coarse > 0
        slopes.append(math.log(coarse / max(fine, 1e-300)) / math.log(m / n) if usable else -math.inf)
    return tuple(slopes)


def _relative_error(plan: Plan, model: Model, problem: str, track: Track, n: int, from_exact_start: bool) -> float:
    """RMS error of the final state over its size."""
    exact = exact_states(problem, plan.schedule, track, n)
    given = known_states(plan, n // 4) if from_exact_start else {}
    values = {0: exact[0]}
    for k, _ in run_code(plan.code, values, model, last_use=plan.last_use):
        if k in given:
            point, scale = given[k]
            values[k] = scale * exact[point]
    return rms(values[len(plan.code)] - exact[-1]) / rms(exact[-1])


def _settled(errors: list[float]) -> bool:
    slopes = local_slopes(COUNTS[: len(errors)], errors)
    if not all(map(math.isfinite, slopes)) or errors[-1] < FLOOR:
        return True
    return len(slopes) > 1 and abs(slopes[-1] - slopes[-2]) <= SETTLED


def _measurement(
    problem: str, schedule: Schedule, track: Track, from_exact_start: bool, errors: list[float]
) -> OrderMeasurement:
    used = [e for e in errors if not e < FLOOR]  # an error that is not a number stays
    counts = COUNTS[: len(used)]
    slopes = local_slopes(counts, used)
    name = type(schedule).__name__
    return OrderMeasurement(problem, name, track.name, from_exact_start, counts, tuple(used), slopes)
