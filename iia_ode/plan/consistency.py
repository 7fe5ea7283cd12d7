"""Consistency and zero-stability of a traced solver: whether its plans converge as the grid is refined.

Three models have solutions in closed form on every schedule: constant data (the state is alpha_t D + c sigma_t), constant
noise (c alpha_t + sigma_t eps), and constant velocity (a straight line in t). An exponential integrator keeps the first or the
second solution exactly, a Runge-Kutta or Adams method in t the third. A plan whose every step keeps one of them, and lets no
disturbance of a state grow, is accepted as it is.

Another solver may keep none of the three and still converge, such as an integrating-factor method. For such a solver the test
is the definition: the error per unit of log-SNR falls with the length of the step. Short stretches of the grid's range are
traced with two lengths of step, alternately long and short, and the steps at a singular end with two distances from that end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from ..schedules import Schedule
from .instructions import Combine, Evaluate, Program, last_uses, originals
from .maps import LinearMap

__all__ = ["consistency_error", "inconsistency", "step_errors"]

_F64 = torch.float64
Array = npt.NDArray[np.float64]

EXACT = 1e-8  # relative error of one step that counts as rounding; the cosine schedule near alpha = 0 has some 1e-10
GROWTH = 1e-6  # growth of a disturbance in one step that counts as rounding
STEPS = (12, 32)  # of the two runs of a stretch; over 32 steps a disturbance that grows by 1.5% per step is seen
LAST = 8  # steps of a stretch at a singular end, which outlast the start-up of a multistep method
SHORT = (1e-4, 1e-5)  # mean lengths in log-SNR of the steps of the two runs
PLACES = (0.0, 0.5, 1.0)  # of the stretches in the range: its start, its middle and its end
SHIFTS = (0.0, 1.37, 2.91)  # of a stretch at a place, in widths
NEAR = (0.1, 0.01)  # distances from a singular end, relative to that of the grid's own point
FALLS = 3.0  # least factor by which an error falls from the first of two lengths or distances to the second
FLOOR = 1e-6  # error that counts as rounding there
UNEVEN, EVEN = (4 / 3, 2 / 3), (1.0, 1.0)  # lengths of successive steps, in turn

DISTURBED = 16  # states of a plan that `step_errors` disturbs at most

WAY_OUT = (
    "For a method that is meant so, set `consistent = False` in its class, or make the plan by "
    "iia_ode.plan.trace(solver, schedule, grid, consistent=False)."
)


@dataclass(frozen=True)
class _Answer:
    """Errors and disturbances of a run on the three problems.

    Attributes
    ----------
    gaps : largest relative error of the solutions, float64 [problem, state after the first].
    growth : size of each disturbance, 1 where it has its exact size, float64 [problem, state after the first, disturbance];
        0 before the disturbance.
    """

    gaps: Array
    growth: Array


def consistency_error(plan: Program) -> float:
    """Largest error of a step on the best of the solutions that consistent solvers keep, relative to the solution.

    The solutions are those of constant data, constant noise and constant velocity; every step starts from the exact state. The
    error is rounding for exponential integrators and for Runge-Kutta and Adams methods in t. Another consistent solver has the
    truncation error of its longest step. For weights with linear maps, a sample has components in every group.

    Parameters
    ----------
    plan : the plan, with numbers, tensors or linear maps as weights.

    Returns
    -------
    The relative error.
    """
    return float(_answer(plan, (), exact=True).gaps.min(0).max())


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
    answer = _answer(plan, range(1, min(len(plan.grid) - 1, DISTURBED + 1)), exact=True)
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
    answer = _answer(plan, kicks, exact=True)
    kept = answer.gaps <= EXACT
    if kicks:
        before = np.maximum.accumulate(np.concatenate([np.ones((3, 1, len(kicks))), answer.growth[:, :-1]], 1), 1)
        kept &= (answer.growth <= (1 + GROWTH) * before).all(-1)
    return None if bool(kept.any(0).all()) else _fault(plan, retrace)


# ---- runs on solutions in closed form --------------------------------------------------------------------------------


@torch.no_grad()
def _answer(plan: Program, kicks: Sequence[int], *, exact: bool, least: Array | None = None) -> _Answer:
    """Run a plan on two basis solutions of each problem, and on disturbances of some of the states.

    Parameters
    ----------
    plan : the plan.
    kicks : grid points whose states are disturbed, each in a row of its own.
    exact : replace the state at every grid point by the exact state: errors are those of single steps.
    least : smallest sizes to which errors are relative, float64 [problem, solution].
    """
    times = torch.tensor(plan.grid, dtype=_F64, device="cpu")
    t, a, s = times.numpy(), plan.schedule.alpha(times).numpy(), plan.schedule.sigma(times).numpy()
    one = np.ones_like(t)
    solutions = np.stack([a, s, a, s, t - t[0], one], axis=1).reshape(-1, 3, 2)
    sizes = np.maximum(np.abs(solutions[1:]), np.abs(solutions[:-1]))
    scales = np.stack([s, a, one], axis=1)
    # A disturbance that should vanish at a singular end is relative to its size before.
    scales[1:] = np.where(scales[1:] > 0, scales[1:], GROWTH * scales[:-1])
    added = np.zeros((len(t), 3, 2 + len(kicks)))
    if exact:
        added[:, :, :2] = solutions
    for i, k in enumerate(kicks):
        added[k, :, 2 + i] = scales[k]
    sample = _sample(plan)
    states = _states(plan, solutions[0], added, sample, keep=not exact)
    y = states.reshape(len(states), 3, 2 + len(kicks), -1)
    gap = np.abs(y[:, :, :2] - solutions[1:, ..., None] * sample.reshape(-1)).max(-1)
    sizes = sizes if least is None else np.maximum(sizes, least)
    with np.errstate(all="ignore"):
        growth = np.abs(y[:, :, 2:]).max(-1) / scales[1:, :, None]
        return _Answer((gap / sizes).max(-1).T, growth.swapaxes(0, 1))


def _states(plan: Program, start: Array, added: Array, sample: Array, *, keep: bool) -> Array:
    """States after the first, [point, row, *sample], before `added` is put in place of the solutions, or is added to them."""
    width, axes = added.shape[-1], (1,) * sample.ndim
    rows = added.reshape(len(added), -1, *axes) * sample
    kept = np.ones((3, width))
    kept[:, :2] = float(keep)
    kept = kept.reshape(-1, *axes)
    asked = [ins for ins in plan.code if isinstance(ins, Evaluate)]
    p, q = _factors(plan.schedule, asked) if asked else (np.zeros((0, 3)), np.zeros((0, 3, 2)))
    slopes = iter(np.repeat(p, width, axis=1).reshape(len(p), 3 * width, *axes))
    offset = np.zeros((len(q), 3, width))
    offset[:, :, :2] = q
    offsets = iter(offset.reshape(len(q), 3 * width, *axes))
    first = np.zeros((3, width))
    first[:, :2] = start
    values, states, ends = {0: first.reshape(-1, *axes) * sample}, [], {0}
    same, last = originals(plan.code), last_uses(plan.code)
    with np.errstate(all="ignore"):
        for k, ins in enumerate(plan.code, start=1):
            if isinstance(ins, Evaluate):
                values[k] = next(slopes) * values[ins.state] + next(offsets) * sample
            else:
                values[k] = _sum(ins, values)
                if ins.step is not None:
                    states.append(values[k])
                    values[k] = values[k] * kept + rows[ins.step]
                    if (
                        same[k] in values and same[k] not in ends
                    ):  # later steps may read the vector that the state copies
                        values[same[k]] = values[k]
                    ends |= {k, same[k]}
            for j in (*ins.reads, k):
                if last[j] == k and k < len(plan.code):
                    values.pop(j, None)
    return np.stack(states)


def _sum(ins: Combine, values: dict[int, Array]) -> Array:
    """The combination of an instruction: in NumPy where the weights are numbers, otherwise as a run computes it."""
    if ins.terms and ins.constant is None and all(type(w) is float for _, w in ins.terms):
        (j, weight), *rest = ins.terms
        total: Array = weight * values[j]
        for j, weight in rest:
            total += weight * values[j]
        return total
    like = torch.from_numpy(next(iter(values.values())))
    return ins.ready(like)(lambda j: torch.from_numpy(values[j]), like).numpy()


def _factors(schedule: Schedule, asked: Sequence[Evaluate]) -> tuple[Array, Array]:
    """What each evaluation gives, as p x + q in its own form: p [evaluation, problem], q [evaluation, problem, solution]."""
    t = torch.tensor([ins.t for ins in asked], dtype=_F64, device="cpu")
    a, s, da, ds = (f(t).numpy() for f in (schedule.alpha, schedule.sigma, schedule.alpha_prime, schedule.sigma_prime))
    zero, one = np.zeros(len(t)), np.ones(len(t))
    with np.errstate(all="ignore"):
        # The outputs for (data, noise) = (1, 0) and (0, 1), the two solutions of the first two problems.
        forms = {"data": (one, zero), "noise": (zero, one), "score": (zero, -1 / s), "v": (-s, a), "velocity": (da, ds)}
        of = [list(forms).index(ins.form) for ins in asked]
        g, h = (np.stack(parts)[of, range(len(t))] for parts in zip(*forms.values(), strict=True))
        slope = a * ds - s * da
        p = np.stack([h / s, g / a, (g * ds - h * da) / slope], axis=1)
        q = np.stack([g - a * h / s, zero, zero, h - s * g / a, (a * h - s * g) / slope, zero], axis=1).reshape(
            -1, 3, 2
        )
    for k, (form, pair) in enumerate((("data", (1.0, 0.0)), ("noise", (0.0, 1.0)), ("velocity", (1.0, 0.0)))):
        own = [ins.form == form for ins in asked]  # exactly, also where a product above is 0 times infinity
        p[own, k], q[own, k] = 0.0, pair
    for k, end in ((0, s == 0), (1, a == 0)):  # x does not determine the output there; the solutions do
        p[end, k], q[end, k] = 0.0, np.stack([g, h], axis=1)[end]
    return p, q


def _sample(plan: Program) -> Array:
    """A sample of the shape of the weights: all one for tensors, with components in every group for linear maps."""
    shapes = []
    for ins in plan.code:
        for v in (*(w for _, w in ins.terms), ins.constant) if isinstance(ins, Combine) else ():
            if isinstance(v, LinearMap):
                return np.sin(np.arange(1.0, math.prod(v.shape) + 1) * math.pi * math.e).reshape(v.shape)
            if v is not None and not isinstance(v, float | int):
                shapes.append(tuple(v.shape))
    return np.ones(np.broadcast_shapes(*shapes))


# ---- short steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stretch:
    """A part of the range for two runs, the second with shorter steps or nearer to a singular end.

    Attributes
    ----------
    place : where, in words.
    grids : the two grids.
    widths : what the errors of the two runs are divided by: the widths in log-SNR; 1 at a singular end.
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
        for stretch in _ends(plan.schedule, plan.grid):
            if fault := _problem(stretch, retrace):
                return fault
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
    """The first fault that shows at a place of the range and beside it; None if there is none.

    A schedule made of pieces has kinks, such as a table of timesteps. An error at a kink is none of the solver: a place counts
    as bad only if two others beside it are bad too.
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
        answer = _answer(retrace(grid), kicks, exact=False, least=least)
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


def _ends(schedule: Schedule, grid: Sequence[float]) -> Iterator[_Stretch]:
    """Stretches at the ends of the range where log-SNR is infinite, each nearer to its end than the grid's own point."""
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
        grids = []
        for near in NEAR:
            inside = base - side * math.log(near)
            lams = inside - side * near * torch.arange(LAST, -1, -1, dtype=_F64, device="cpu")
            times = [*schedule.t_of_lam(lams).tolist(), grid[end]]
            grids.append(times[::-1] if first else times)
        what = "sigma = 0" if side > 0 else "alpha = 0"
        yield _Stretch(what, tuple(grids), (1.0, 1.0), (least, least))  # type: ignore[arg-type]


def _is_equal(schedule: Schedule, grid: Sequence[float]) -> bool:
    """Whether the steps of a grid are equal in t or in log-SNR, singular ends apart."""
    for values in (list(grid), [lam for lam in map(schedule.lam, grid) if math.isfinite(lam)]):
        steps = [b - a for a, b in pairwise(values)]
        if steps and max(steps) - min(steps) <= 1e-6 * max(map(abs, steps)):
            return True
    return False
