"""The order of a solver on irregular grids, whose steps are alternately twice as long and half as long as the one before."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..checks import check_whole
from ..plan import run_code, trace
from ..schedules import Schedule
from ..solvers import Solver
from .cases import draw, gaussian, model_of, rms
from .orders import TOLERANCE, claimed_order, local_slopes
from .startup import known_states

__all__ = ["irregular_misses", "irregular_order", "uneven"]

COUNTS = (48, 96, 192, 384)
ENOUGH = 1e-11  # relative error at and below which a slope would be rounding
EXACT_STEPS = 12  # first states that are exact, as for other orders


def uneven(schedule: Schedule, n: int, high: float = 5.0, low: float = 0.3) -> torch.Tensor:
    """A grid from sigma/alpha `high` to `low` with n steps in log-SNR, alternately of lengths 2 and 1, float64 [n + 1]."""
    lengths = torch.tensor([0.0, *((2.0, 1.0)[i % 2] for i in range(n))], dtype=torch.float64, device="cpu").cumsum(0)
    lams = -math.log(high) + (math.log(high) - math.log(low)) * lengths / lengths[-1]
    times: torch.Tensor = schedule.t_of_lam(lams)
    return times


def irregular_order(solver: Solver) -> int:
    """The order that a solver claims on irregular grids: its attribute ``irregular_order``, by default its order."""
    claimed_order(solver)
    return check_whole(f"attribute `irregular_order` of {solver.label}", solver.irregular_order, least=1)


def irregular_misses(solver: Solver, schedules: Sequence[Schedule]) -> list[str]:
    """Describe how the orders measured on irregular grids contradict the claim; empty for a correct claim.

    The measurement is the same as in :func:`~iia_ode.testing.measure_orders` on Gaussian data, with exact first steps. Grids
    are refined from 48 steps until the slope has the claimed order, or the error is rounding, up to 384 steps.

    Parameters
    ----------
    solver : the solver.
    schedules : schedules of the measurement.

    Returns
    -------
    One message for each schedule with another order.
    """
    claimed, misses = irregular_order(solver), []
    for schedule in schedules:
        counts, errors = [], []
        for n in COUNTS:
            counts.append(n)
            errors.append(_error(solver, schedule, n))
            slope = local_slopes(counts, errors)[-1] if len(errors) > 1 else -math.inf
            if errors[-1] < ENOUGH or (len(errors) > 1 and slope >= claimed - TOLERANCE):
                break
        else:
            shown = ", ".join(f"{n}: {e:.2g}" for n, e in zip(counts, errors, strict=True))
            misses.append(f"order {slope:.2f} on {type(schedule).__name__} (errors {shown})")
    return misses


def _error(solver: Solver, schedule: Schedule, n: int) -> float:
    plan = trace(solver, schedule, uneven(schedule, n), consistent=False)
    problem = gaussian()
    x = draw(problem, 8, schedule, plan.grid[0])
    exact = [problem.flow(x, schedule, plan.grid[0], t) for t in (*plan.grid[: EXACT_STEPS + 1], plan.grid[-1])]
    given = known_states(plan, EXACT_STEPS)
    values = {0: x}
    for k, _ in run_code(plan.code, values, model_of(problem, schedule), last_use=plan.last_use):
        if k in given:
            point, scale = given[k]
            values[k] = scale * exact[point]
    return rms(values[len(plan.code)] - exact[-1]) / rms(exact[-1])
