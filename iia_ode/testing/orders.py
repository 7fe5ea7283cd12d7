"""Measure the order of a solver with the start-up steps excluded.

A multistep method starts with fewer outputs than it combines later, and a single Euler step limits the order of the whole
integration to 2. The measurement therefore makes the first twelve steps exact: while the plan runs, the exact solution
overwrites the states there (:mod:`.startup`). Later steps then look back on evaluations along the exact solution, and the
final error is the error of the later steps.

The later steps fill the last three quarters of a track's range on every grid. A run begins twelve steps before the later
steps, inside the first quarter; on a grid of 24 intervals, the whole first quarter is used, six steps. The measured stretch of
time is fixed, so excluding the start-up does not bend the slope. A start-up that lengthens with the grid still shows, because
at most twelve of its steps are exact. Twelve and six steps are whole numbers of blocks, of two or of three steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..checks import check_whole
from ..errors import InputError
from ..plan import Plan, run_code, trace
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
    "order_summary",
]

TOLERANCE = 0.15
"""How far a measured order may lie from a whole number."""

COUNTS = (24, 48, 96, 192, 384)
"""Numbers of intervals of the grids, coarsest first; the measurement stops when the slopes settle."""

FINER = (768, 1536)  # used where no whole order shows by then
COARSER = 12  # used where at most two of the grids are above rounding
EXACT_STEPS = 12  # a corrector of order 5 needs eight: its memory holds outputs at states predicted with lower order
LONG = 192  # smallest number of intervals of the finest grid on one track: 156 steps, exact steps included

SETTLED = 0.03  # a local slope p + c h moves by c h / 2 when h is halved, and c h / 2 is also its remaining error
NEAR = (
    0.1  # largest distance of a slope and of its extrapolation to h = 0 from the whole number that the slopes approach
)
FLOOR = 1e-12  # smallest relative error in a slope: rounding, a few 1e-14, moves no slope by 0.1 above it


@dataclass(frozen=True)
class OrderMeasurement:
    """The error of a solver on one problem over refined grids.

    Attributes
    ----------
    problem, schedule, grid : the test problem, the schedule, and the variable in which the grid is uniform.
    from_exact_start : whether the start-up steps were excluded.
    counts, errors : numbers of intervals, and the root mean square error of the final state relative to its size.
    slopes : local orders between successive counts.
    ended : the reason to stop refining: the slopes have ``"settled"``, the errors reached ``"rounding"``, or the grid was the
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
        """The last slope; infinite where the errors are rounding on every grid."""
        return self.slopes[-1] if self.slopes else math.inf

    def agrees_with(self, claimed: int) -> bool:
        """Whether the measured order is the claimed order, or a higher whole order that this problem allows.

        Where rounding ended the refinement, a slope above the claim need not be whole: the slope may still be falling.
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
    """Measure the order on both problems, for every schedule and track.

    The first schedule and track are refined to at least 192 intervals: a start-up that takes a small part of the run cannot
    hide there.

    Parameters
    ----------
    solver : a registered name, or a solver.
    schedules : one or more schedules.
    from_exact_start : exclude the start-up steps. False measures whole integrations from a cold start.

    Returns
    -------
    Two measurements, Gaussian data and mixture, for each schedule and track.

    Raises
    ------
    UnknownNameError, InputError : `solver` is no solver, or `schedules` holds no schedule.
    PlanError : the solver's step cannot be traced.
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
    """The given schedules as a tuple.

    Raises
    ------
    InputError : `value` is neither a schedule nor a non-empty sequence of schedules.
    """
    if isinstance(value, Schedule):
        return (value,)
    found = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if not found or not all(isinstance(one, Schedule) for one in found):
        raise InputError(
            f"schedules must be one schedule or more, such as [iia_ode.VP(), iia_ode.EDM()], got {value!r}; omit the "
            "argument for the schedules of the suite."
        )
    return found


def claimed_order(solver: Solver) -> int:
    """The solver's attribute ``order``.

    Raises
    ------
    InputError : the attribute is missing, or is no whole number of at least 1.
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
    """Measure the order on each problem along one track.

    The grid is refined from 24 to 384 intervals, until the slopes settle or the error is near rounding. Where the last slope
    is not near a whole number, the refinement continues to 1536 intervals. Slopes have settled once the last two differ by at
    most 0.03, or once they approach a whole number and the last slope and its extrapolation to h = 0 are within 0.1 of it.
    Where at most two grids are above rounding, a grid of 12 intervals is measured as well.

    Parameters
    ----------
    solver : a registered name, or a solver.
    schedule, track : the schedule, and the family of grids.
    from_exact_start : exclude the start-up steps. False measures whole integrations from a cold start.
    finest_at_least : smallest number of intervals of the finest grid, even where slopes settle on coarser grids.

    Returns
    -------
    The measurements on Gaussian data and on the mixture.

    Raises
    ------
    UnknownNameError, InputError : `solver` is no solver.
    PlanError : the solver's step cannot be traced.
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


def order_summary(measurements: Sequence[OrderMeasurement], claimed: int) -> str:
    """One sentence on how measured orders contradict a claimed order, such as 'order 1.00 on all 18 tracks, claimed 3'.

    Parameters
    ----------
    measurements : from :func:`measure_orders` or :func:`measure_order`.
    claimed : the claimed order.

    Returns
    -------
    The sentence, without its full stop; empty for a correct claim.
    """
    if not order_misses(measurements, claimed):
        return ""
    wrong = [m for m in measurements if not m.agrees_with(claimed)]
    found = sorted(m.order for m in wrong or measurements if math.isfinite(m.order))
    if not found:
        return f"no order on {len(wrong)} of {len(measurements)} tracks, claimed {claimed}"
    low, high = f"{found[0]:.2f}", f"{found[-1]:.2f}"
    orders = f"order {low}" if low == high else f"order {low} to {high}"
    if not wrong:
        return f"{orders}, claimed {claimed}: the claim is too low"
    places = list(dict.fromkeys(m.schedule for m in wrong))
    every = len(wrong) == len(measurements)
    where = f"all {len(wrong)}" if every else f"{len(wrong)} of {len(measurements)}"
    named = "" if every else f" ({', '.join(places)})"
    return f"{orders} on {where} tracks{named}, claimed {claimed}"


def order_misses(measurements: Sequence[OrderMeasurement], claimed: int) -> list[str]:
    """Describe how measured orders contradict a claimed order; empty for a correct claim.

    The order of a method is its least measured order. On some problems and grids an error term vanishes, and the measured
    order must be a higher whole number: the midpoint rule has order 3 on Gaussian data where alpha and sigma are linear in
    t, and weights of a uniform grid have their full order on a uniform grid. On every schedule, at least one measurement
    must show the claimed order.

    Parameters
    ----------
    measurements : from :func:`measure_orders` or :func:`measure_order`.
    claimed : the claimed order, a whole number of at least 1.

    Returns
    -------
    One message for each contradiction.
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
    return f"not asymptotic, the local orders {slopes} have not settled and decide nothing about the claim: {shown}"


def local_slopes(counts: Sequence[int], errors: Sequence[float]) -> tuple[float, ...]:
    """Local orders between successive counts; minus infinity where an error is not finite."""
    slopes = []
    for (n, coarse), (m, fine) in zip(
        zip(counts, errors, strict=True), zip(counts[1:], errors[1:], strict=True), strict=False
    ):
        usable = math.isfinite(coarse) and math.isfinite(fine) and coarse > 0
        slopes.append(math.log(coarse / max(fine, 1e-300)) / math.log(m / n) if usable else -math.inf)
    return tuple(slopes)


def _relative_error(plan: Plan, model: Model, problem: str, track: Track, n: int, from_exact_start: bool) -> float:
    """RMS error of the final state, relative to its size."""
    steps = _exact_steps(n) if from_exact_start else 0
    exact = exact_states(problem, plan.schedule, track, n, steps)
    given = known_states(plan, steps) if steps else {}
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
    """Whether the last slope is final: the slopes stand still, or approach a whole number and are near it."""
    if len(slopes) < 2:
        return False
    before, last = slopes[-2:]
    whole, limit = round(last), 2 * last - before  # the limit of p + c h
    approaches = abs(last - whole) <= abs(before - whole)
    return abs(last - before) <= SETTLED or (approaches and max(abs(last - whole), abs(limit - whole)) <= NEAR)


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
