"""Consistency and zero-stability of a traced solver: whether its plans converge as the grid is refined.

Three models have solutions in closed form on every schedule: constant data (the state is alpha_t D + c sigma_t), constant
noise (c alpha_t + sigma_t eps), and constant velocity (a straight line in t). An exponential integrator keeps the first or the
second solution exactly. A Runge-Kutta or Adams method in t keeps the third. A plan is accepted if every step keeps one of the
three solutions and no disturbance of a state grows.

Another solver may keep none of the three and still converge, such as an integrating-factor method. Such a solver is tested by
the definition of consistency: the error per unit of log-SNR falls with the length of the step. Short stretches of the grid's
range are traced with two step lengths, on grids of alternately long and short steps. Steps at a singular end are traced at two
distances from the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from ..schedules import Schedule
from .instructions import Evaluate, Program
from .solutions import Array, answers

__all__ = ["consistency_error", "inconsistency", "step_errors"]

_F64 = torch.float64

EXACT = 1e-8  # relative error of one step that counts as rounding; the cosine schedule near alpha = 0 has some 1e-10
GROWTH = 1e-6  # growth of a disturbance in one step that counts as rounding
STEPS = (12, 32)  # of the two runs of a stretch; over 32 steps a disturbance that grows by 1.5% per step is seen
LAST = 8  # steps of a stretch at a singular end, which outlast the start-up of a multistep method
SHORT = (1e-4, 1e-5)  # mean lengths in log-SNR of the steps of the two runs
PLACES = (0.0, 0.5, 1.0)  # of the stretches in the range: its start, its middle and its end
SHIFTS = (0.0, 1.37, 2.91)  # of a stretch at a place, in widths
# Pairs of distances from a singular end, relative to that of the grid's own point.
NEAR = ((0.1, 0.01), (0.01, 0.001), (0.003, 0.0003))
FALLS = 3.0  # least factor by which an error falls from the first of two lengths or distances to the second
FLOOR = 1e-6  # error that counts as rounding there
UNEVEN, EVEN = (4 / 3, 2 / 3), (1.0, 1.0)  # lengths of successive steps, in turn

_CONSTANT = {"data": 0, "noise": 1, "velocity": 2}  # the problem with a constant output of a form

DISTURBED = 16  # states of a plan that `step_errors` disturbs at most

WAY_OUT = (
    "For a method that is meant so, set `consistent = False` in its class, or make the plan by "
    "iia_ode.plan.trace(solver, schedule, grid, consistent=False)."
)


def consistency_error(plan: Program) -> float:
    """Largest error of a step on the best of the solutions that consistent solvers keep, relative to the solution.

    The solutions are those of constant data, constant noise and constant velocity; every step starts from the exact state.
    Exponential integrators, and Runge-Kutta and Adams methods in t, have errors of rounding. Another consistent solver has the
    truncation error of its longest step. For weights with linear maps, a sample has components in every group.

    Parameters
    ----------
    plan : the plan, with numbers, tensors or linear maps as weights.

    Returns
    -------
    The relative error.
    """
    return float(answers(plan, (), exact=True).gaps.min(0).max())


def step_errors(plan: Program) -> tuple[list[float], list[float]]:
    """For each step, its error and the growth of disturbances on the solution that it keeps best.

    Parameters
    ----------
    plan : the plan.

    Returns
    -------
    The relative errors of :func:`consistency_error`, and the largest size that a disturbance of an earlier state has after the
    step; 1 for a disturbance that is neither damped nor amplified, 0 where there is none.
    """
    answer = answers(plan, range(1, min(len(plan.grid) - 1, DISTURBED + 1)), exact=True)
    best = answer.gaps.argmin(0)
    steps = np.arange(len(best))
    growth = answer.growth[best, steps].max(-1, initial=0.0)
    return answer.gaps[best, steps].tolist(), growth.tolist()


def inconsistency(plan: Program, retrace: Callable[[list[float]], Program]) -> str | None:
    """The reason for which a solver does not converge on the range of a plan, as the end of a sentence about the solver.

    Parameters
    ----------
    plan : the solver's plan.
    retrace : makes the plan of the same solver and schedule on another grid of the same range.

    Returns
    -------
    The reason; None for a solver that converges.
    """
    kicks = sorted({k for k in (1, 2, (len(plan.grid) - 1) // 2) if 0 < k < len(plan.grid) - 1})
    answer = answers(plan, kicks, exact=True)
    kept = answer.gaps <= EXACT
    hidden = False
    if kicks:
        before = np.maximum.accumulate(np.concatenate([np.ones((3, 1, len(kicks))), answer.growth[:, :-1]], 1), 1)
        bounded = np.all(answer.growth <= (1 + GROWTH) * before, axis=-1)
        # On the problem whose output is constant, a disturbance passes the weights of the earlier states alone, as in the
        # limit of short steps. On another problem long steps may damp it.
        forms = {ins.form for ins in plan.code if isinstance(ins, Evaluate)}
        own = _CONSTANT.get(forms.pop()) if len(forms) == 1 else None
        hidden = own is not None and bool(np.all(kept[own])) and not bool(np.all(bounded[own]))
        kept &= bounded
    return None if bool(kept.any(0).all()) and not hidden else _fault(plan, retrace)


# ---- short steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stretch:
    """A part of the range for two runs, the second with shorter steps or nearer to a singular end.

    Attributes
    ----------
    place : where, in words.
    grids : the two grids.
    widths : divisors of the errors of the two runs: the widths in log-SNR; 1 at a singular end.
    least : sizes to which errors are relative at least, [problem, solution], for each of the two runs.
    """

    place: str
    grids: tuple[list[float], list[float]]
    widths: tuple[float, float]
    least: tuple[Array, Array]

    @property
    def singular(self) -> bool:
        """Whether the stretch is at a singular end."""
        return self.widths[0] == 1.0


def _fault(plan: Program, retrace: Callable[[list[float]], Program]) -> str | None:
    """The reason for which the error does not fall with the step, or the distance from a singular end; None if it falls."""
    try:
        uneven = _inner_problem(plan, retrace, UNEVEN)
        if uneven and (fault := _inner_problem(plan, retrace, EVEN)):
            return fault
        for end in _ends(plan.schedule, plan.grid):
            # As inside the range, an error at a kink is no fault of the solver.
            first: str | None = None
            for stretch in end:
                fault = _problem(stretch, retrace)
                first = first or fault
                if fault is None:
                    break
            else:
                return first
    except Exception as error:  # a solver under test may fail in any way
        return (
            f"is off by {consistency_error(plan):.2g} on the solutions that a step may keep (constant data, noise or "
            f"velocity), and whether its error falls with shorter steps cannot be seen: on a finer grid its step fails with "
            f"{type(error).__name__}: {str(error).rstrip('.')}"
        )
    if uneven is None or _is_equal(plan.schedule, plan.grid):
        return None
    return (
        "converges on grids of equal steps only, and this grid has steps of several lengths. With steps alternately long and "
        f"short it {uneven}"
    )


def _inner_problem(
    plan: Program, retrace: Callable[[list[float]], Program], pattern: tuple[float, float]
) -> str | None:
    """The first fault at a place of the range that also appears beside the place; None without a fault.

    A schedule made of pieces has kinks, such as a table of timesteps. An error at a kink is no fault of the solver: a place
    counts as bad only if two other places beside it are bad too.
    """
    for place in PLACES:
        for shift in SHIFTS:
            fault = _problem(_inner(plan.schedule, plan.grid, pattern, place, shift), retrace)
            if fault is None:
                break
        else:
            return fault
    return None


def _problem(stretch: _Stretch, retrace: Callable[[list[float]], Program]) -> str | None:
    """The fault that two runs show, if there is one."""
    errors = []
    for grid, width, least in zip(stretch.grids, stretch.widths, stretch.least, strict=True):
        kicks = (1, 2, STEPS[1] // 2) if len(grid) > STEPS[1] else ()
        answer = answers(retrace(grid), kicks, exact=False, least=least)
        if kicks and (factor := _growth(answer.growth, kicks)) > 1.0:
            return (
                f"is zero-unstable: close to {stretch.place} a disturbance of a state grows by a factor of {factor:.3g} per "
                "step while the output of the model stays, however short the steps are. Check the weights of the earlier "
                "states: no root of their polynomial may be larger than 1, and none of size 1 may be double"
            )
        errors.append(float(answer.gaps.max()) / width)
    if errors[1] <= max(errors[0] / FALLS, FLOOR):
        return None
    how = "however near it is" if stretch.singular else "per unit of log-SNR, however short the steps are"
    return (
        f"is not a consistent solver: close to {stretch.place} its error stays at {errors[1]:.2g} {how}. Check that the "
        "weights of the step sum to what they should: in the limit of short steps, constant data, constant noise and constant "
        "velocity are kept"
    )


def _growth(growth: Array, kicks: Sequence[int]) -> float:
    """The growth per step of a disturbance from the first to the second half of a stretch; 1 for one that stays bounded."""
    worst = 1.0
    for k, size in zip(kicks, np.moveaxis(growth, -1, 0), strict=True):
        half = (size.shape[1] - k) // 2
        early, late = max(1.0, float(size[:, k : k + half].max())), float(size[:, k + half :].max())
        if not late <= 1.1 * early:
            worst = max(worst, (late / early) ** (1 / half) if math.isfinite(late) else math.inf)
    return worst


def _inner(
    schedule: Schedule, grid: Sequence[float], pattern: tuple[float, float], place: float, shift: float
) -> _Stretch:
    """A stretch in the range of finite log-SNR: at its start (place 0), its end (1) or between, moved inwards by `shift`."""
    lams = [lam for lam in map(schedule.lam, grid) if math.isfinite(lam)]
    first, last = (lams[0], lams[-1]) if lams else (0.0, 0.0)
    way = 1.0 if schedule.lam(grid[-1]) > schedule.lam(grid[0]) else -1.0
    if first == last:  # a single finite level has room on the side of the singular end
        room = 2 * (1 + shift) * SHORT[0] * STEPS[0]
        first, last = (first, last + way * room) if math.isfinite(schedule.lam(grid[0])) else (first - way * room, last)
    room = abs(last - first) / (1 + shift)
    grids, widths, least = [], [], []
    for h, steps in zip(SHORT, STEPS, strict=True):
        h = min(h, room / STEPS[0] * h / SHORT[0])
        lengths = torch.tensor([0.0, *(h * pattern[i % 2] for i in range(steps))], dtype=_F64, device="cpu").cumsum(0)
        width = float(lengths[-1])
        spare = abs(last - first) - width
        begin = min(max(place * spare + (1 - 2 * (place > 0.5)) * shift * width, 0.0), spare)
        times = schedule.t_of_lam(first + way * (begin + lengths)).tolist()
        sizes = np.zeros((3, 2))
        sizes[2, 0] = abs(times[-1] - times[0]) / width  # the slope of the straight line
        grids.append(times)
        widths.append(width)
        least.append(sizes)
    return _Stretch(f"t = {grids[1][0]:.4g}", tuple(grids), tuple(widths), tuple(least))  # type: ignore[arg-type]


def _ends(schedule: Schedule, grid: Sequence[float]) -> Iterator[list[_Stretch]]:
    """For each end of the range where log-SNR is infinite, stretches nearer to the end than the grid's own point."""
    levels = [schedule.lam(t) for t in grid]
    for end, own, first in ((0, 1, True), (-1, -2, False)):
        if math.isfinite(levels[end]):
            continue
        side = math.copysign(1.0, levels[end])
        base = levels[own] if math.isfinite(levels[own]) else 0.0
        here = schedule.t_of_lam(base)
        least = np.zeros((3, 2))
        least[:2] = schedule.alpha(here), schedule.sigma(here)
        if side < 0:  # towards the noise, alpha vanishes and sigma does not
            least[:2, 1] = 0.0
        else:
            least[:2, 0] = 0.0
        least[2, 0] = abs(here - grid[end])
        yield [_end(schedule, grid[end], base, side, near, least, first) for near in NEAR]


def _end(
    schedule: Schedule, t: float, base: float, side: float, pair: tuple[float, float], least: Array, first: bool
) -> _Stretch:
    """A stretch at a singular end t, at two distances relative to the distance of log-SNR `base`."""
    grids = []
    for near in pair:
        inside = base - side * math.log(near)
        lams = inside - side * near * torch.arange(LAST, -1, -1, dtype=_F64, device="cpu")
        times = [*schedule.t_of_lam(lams).tolist(), t]
        grids.append(times[::-1] if first else times)
    what = "sigma = 0" if side > 0 else "alpha = 0"
    return _Stretch(what, tuple(grids), (1.0, 1.0), (least, least))  # type: ignore[arg-type]


def _is_equal(schedule: Schedule, grid: Sequence[float]) -> bool:
    """Whether the steps of a grid are equal in t or in log-SNR, singular ends apart."""
    for values in (list(grid), [lam for lam in map(schedule.lam, grid) if math.isfinite(lam)]):
        steps = [b - a for a, b in pairwise(values)]
        if steps and max(steps) - min(steps) <= 1e-6 * max(map(abs, steps)):
            return True
    return False
