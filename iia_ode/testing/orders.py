"""The measured order of a solver, its start-up steps aside.

A multistep method starts with fewer outputs than it combines later, and one step of Euler's limits the order of everything
after it to 2. So the first twelve steps are made exact, without any co-operation of the solver: the states there are
overwritten by the exact solution while the plan runs (:mod:`.startup`). The evaluations that later steps look back on are then
those that the solver makes along the exact solution, and what remains at the end is the error of the other steps.

Those fill the last three quarters of a track's range on every grid: a run begins twelve steps before them, wherever in the
first quarter that is (with the whole quarter, six steps, on a grid of 24). So the measured stretch of time is fixed, and
leaving out the start-up does not bend the slope; and a start-up that lengthens with the grid shows, because no more than
twelve of its steps are exact. Both counts are whole blocks of two or three.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..checks import check_whole
from ..errors import InputError
from ..plan import Plan, trace
from ..plan.instructions import run_code
from ..schedules import Schedule
from ..solvers import Solver, SolverLike, as_solver
from .cases import PROBLEMS, SCHEDULES, TRACKS, Model, Track, exact_states, model_of, rms
from .startup import known_states

__all__ = [
    "COUNTS",
    "TOLERANCE",
    "OrderMeasurement",
    "as_schedules",
    "claimed_order",
    "local_slopes",
    "measure_order",
    "measure_orders",
    "order_misses",
]

TOLERANCE = 0.15
"""How far a measured order may lie from a whole number."""

COUNTS = (24, 48, 96, 192, 384)
"""Intervals of the grids, as many of them as it takes."""

FINER = (768, 1536)  # where no whole order shows by then
COARSER = 12  # where two of the grids or fewer are above rounding
EXACT_STEPS = 12  # a corrector of order 5 needs eight: outputs at states predicted with lower order stay in memory
LONG = 192  # intervals that one track refines to at least: 156 steps, exact ones included

SETTLED = 0.03  # a local slope p + c h moves by c h / 2 when h is halved, and c h / 2 is also its remaining error
NEAR = 0.1  # distance from a whole number, of a slope and of its extrapolation, at which no finer grid can change the verdict
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
    ended : why no finer grid was tried: the slopes have ``"settled"``, errors reached ``"rounding"``, or the grid was the
        ``"finest"``.
    """

    problem: str
    schedule: str
    grid: str
    from_exact_start: bool
    counts: tuple[int, ...]
    errors: tuple[float, ...]
    slopes: tuple[float, ...]
    ended: str = "settled"

    @property
    def order(self) -> float:
        """The last slope; infinite where the errors are rounding from the coarsest grid on."""
        return self.slopes[-1] if self.slopes else math.inf

    def agrees_with(self, claimed: int) -> bool:
        """Whether this is the claimed order, or a higher whole one that this problem happens to allow.

        Where rounding ended the refinement a slope above the claim need not be whole: it may still be on its way down.
        """
        if not math.isfinite(self.order):
            return self.order > 0
        if self.ended == "rounding" and self.order > claimed:
            return True
        return round(self.order) >= claimed and abs(self.order - round(self.order)) <= TOLERANCE

    def __str__(self) -> str:
        shown = ", ".join(f"{n}: {e:.2g}" for n, e in zip(self.counts, self.errors, strict=True))
        order = "none (errors are rounding)" if self.order == math.inf else f"{self.order:.2f}"
        return f"{order} on {self.schedule}, {self.problem}, uniform in {self.grid} (errors {shown})"


def measure_orders(
    solver: SolverLike, schedules: Schedule | Iterable[Schedule] = SCHEDULES, *, from_exact_start: bool = True
) -> tuple[OrderMeasurement, ...]:
    """The order on both problems, for every schedule and track; arguments as for :func:`measure_order`.

    The first of them is refined to 192 intervals at least, so that a start-up of a small part of the run cannot hide.
    """
    found, asked = as_solver(solver), as_schedules(schedules)
    return tuple(
        measurement
        for i, schedule in enumerate(asked)
        for j, track in enumerate(TRACKS)
        for measurement in measure_order(
            found,
            schedule,
            track,
            from_exact_start=from_exact_start,
            finest_at_least=LONG if from_exact_start and i == j == 0 else 0,
        )
    )


def as_schedules(value: object) -> tuple[Schedule, ...]:
    """The schedules that are asked for: one, or some.

    Raises
    ------
    InputError : none, or something else.
    """
    if isinstance(value, Schedule):
        return (value,)
    found = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if not found or not all(isinstance(one, Schedule) for one in found):
        raise InputError(
            f"schedules must be one schedule or more, such as [iia_ode.VP(), iia_ode.EDM()], got {value!r}; leave it out for "
            "those of the suite."
        )
    return found


def claimed_order(solver: Solver) -> int:
    """The solver's attribute ``order``.

    Raises
    ------
    InputError : it is missing, or not a whole number from 1 on.
    """
    return check_whole(f"attribute `order` of {solver.label}", getattr(solver, "order", None), least=1)


def measure_order(
    solver: SolverLike,
    schedule: Schedule,
    track: Track,
    *,
    from_exact_start: bool = True,
    finest_at_least: int = 0,
) -> tuple[OrderMeasurement, ...]:
    """The order on each problem along one track.

    The grid is refined until the slopes settle, or until the error is near rounding: from 24 intervals to 384, and on to 1536
    where the last slope is not near a whole number. Where only two grids or fewer are above rounding, one of 12 intervals is
    measured as well.

    Parameters
    ----------
    solver : a registered name or a solver.
    schedule, track : where.
    from_exact_start : leave out the start-up steps; False measures what a user sees who starts from x_T.
    finest_at_least : intervals of the finest grid, even where slopes settle before.
    """
    found = as_solver(solver)
    errors: dict[str, dict[int, float]] = {problem: {} for problem in PROBLEMS}

    def measure(problems: Iterable[str], n: int) -> None:
        begin = n // 4 - _exact_steps(n) if from_exact_start else 0
        plan = trace(found, schedule, track.grid(schedule, n)[begin:], consistent=False)
        for problem in problems:
            model = model_of(PROBLEMS[problem](), schedule)
            errors[problem][n] = _relative_error(plan, model, problem, track, n, from_exact_start)

    open_problems = list(PROBLEMS)
    for n in (*COUNTS, *FINER):
        if n in FINER:
            open_problems = [problem for problem in open_problems if not _is_whole(errors[problem])]
        if not open_problems:
            break
        measure(open_problems, n)
        open_problems = [p for p in open_problems if not _is_enough(errors[p], finest_at_least)]
    few = [problem for problem in PROBLEMS if sum(not error < FLOOR for error in errors[problem].values()) <= 2]
    if few:
        measure(few, COARSER)
    return tuple(_measurement(problem, schedule, track, from_exact_start, errors[problem]) for problem in PROBLEMS)


def order_misses(measurements: Sequence[OrderMeasurement], claimed: int) -> list[str]:
    """What is wrong with a claimed order, in words; nothing if it is right.

    The order of a method is the least that it shows. On one problem or grid an error term may vanish (the midpoint rule has
    order 3 on Gaussian data where alpha and sigma are linear in t; weights made for a uniform grid have their full order on
    one), and then it must show a higher whole order. On every schedule, though, it must somewhere show the order it claims.
    """
    misses = [_miss(m, claimed) for m in measurements if not m.agrees_with(claimed)]
    for schedule in dict.fromkeys(m.schedule for m in measurements):
        least = min((m for m in measurements if m.schedule == schedule), key=lambda m: m.order)
        if least.order > claimed + TOLERANCE:
            misses.append(f"claims order {claimed}, which is too low: the least measured order is {least}")
    return misses


def _miss(measurement: OrderMeasurement, claimed: int) -> str:
    shown = f"measured order {measurement}, claimed {claimed}"
    if measurement.ended != "finest":
        return shown
    slopes = ", ".join(f"{slope:.2f}" for slope in measurement.slopes)
    return f"not asymptotic, the local orders {slopes} have not settled and do not decide the claim: {shown}"


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
    exact, given = exact_states(problem, plan.schedule, track, n), {}
    if from_exact_start:
        steps = _exact_steps(n)
        exact, given = exact[-steps - 2 :], known_states(plan, steps)
    values = {0: exact[0]}
    for k, _ in run_code(plan.code, values, model, last_use=plan.last_use):
        if k in given:
            point, scale = given[k]
            values[k] = scale * exact[point]
    return rms(values[len(plan.code)] - exact[-1]) / rms(exact[-1])


def _exact_steps(n: int) -> int:
    return min(EXACT_STEPS, n // 4)


def _slopes(errors: Mapping[int, float]) -> tuple[float, ...]:
    return local_slopes(list(errors), list(errors.values()))


def _is_enough(errors: Mapping[int, float], finest_at_least: int) -> bool:
    """Whether no finer grid is needed."""
    last = max(errors)
    if not all(map(math.isfinite, _slopes(errors))) or errors[last] < FLOOR:
        return True
    return last >= finest_at_least and _settled(_slopes(errors))


def _settled(slopes: Sequence[float]) -> bool:
    """Whether the last slope is final: it has stopped moving, or it and its extrapolation are near one whole number."""
    if len(slopes) < 2:
        return False
    before, last = slopes[-2:]
    limit = 2 * last - before  # of p + c h
    whole = round(last)
    return abs(last - before) <= SETTLED or max(abs(last - whole), abs(limit - whole)) <= NEAR


def _is_whole(errors: Mapping[int, float]) -> bool:
    slope: float = _slopes(errors)[-1]
    return abs(slope - round(slope)) <= TOLERANCE


def _measurement(
    problem: str, schedule: Schedule, track: Track, from_exact_start: bool, errors: Mapping[int, float]
) -> OrderMeasurement:
    used = {n: errors[n] for n in sorted(errors) if not errors[n] < FLOOR}  # an error that is not a number stays
    slopes = _slopes(used)
    if not all(map(math.isfinite, slopes)) or _settled(slopes):
        ended = "settled"
    else:
        ended = "rounding" if len(used) < len(errors) else "finest"
    name, errors_used = type(schedule).__name__, tuple(used.values())
    return OrderMeasurement(problem, name, track.name, from_exact_start, tuple(used), errors_used, slopes, ended)
