"""GITS: times on a teacher's fine grid, by dynamic programming [Chen et al. 2024].

The paper is "On the trajectory regularity of ODE-based diffusion sampling". The cost from level i to level j is the error at j
of one Euler step from the teacher's state at i. The steps of a schedule are assumed to act alone, so the cost of a schedule is
the sum of the costs of its steps, and dynamic programming finds the cheapest schedule. A coefficient above 1 multiplies the
costs of later steps: the states there also have earlier errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import InputError, unknown_name
from ...grids import karras
from ...metrics import flat
from ...ode import ProbabilityFlowODE
from ...solvers import get_solver
from .pairs import Learned, Pairs

__all__ = ["best_path", "gits", "local_costs"]

_F64 = torch.float64
TEACHER = "ipndm3"
METRICS = ("deviation", "distance")


@torch.no_grad()
def gits(
    pairs: Pairs,
    nfe: int,
    *,
    solver: str = "ddim",
    coefficient: float = 1.15,
    metric: str = "deviation",
    levels: int = 60,
    costs: Mapping[str, Tensor] | None = None,
) -> Learned:
    """Learn the times of a solver.

    Parameters
    ----------
    pairs : draws of noise; their final states are not used.
    nfe : evaluations of the solver.
    solver : solver with one evaluation a step, which runs on the grid; the costs are Euler's for every solver.
    coefficient : factor on the costs after each step, 1.15 in the paper.
    metric : ``"deviation"`` or ``"distance"``; see :func:`local_costs`.
    levels : levels of the teacher's grid, a Karras grid.
    costs : the costs of :func:`local_costs`, if known.

    Returns
    -------
    The solver on its grid.

    Raises
    ------
    InputError : the grid has fewer levels than evaluations.
    UnknownNameError : no such metric.
    """
    if metric not in METRICS:
        raise unknown_name("metric", metric, METRICS)
    grid = karras(levels, pairs.sigma_min, pairs.sigma_max)
    found = local_costs(pairs.ode, pairs.x, grid) if costs is None else costs
    path = best_path(found[metric], nfe, coefficient)
    return Learned(get_solver(solver).plan(pairs.ode.schedule, grid[path]), levels * len(pairs))


@torch.no_grad()
def local_costs(ode: ProbabilityFlowODE, x: Tensor, grid: Tensor) -> dict[str, Tensor]:
    """Costs of single Euler steps between any two times of a teacher's grid.

    Parameters
    ----------
    ode : the model, on the schedule EDM.
    x : initial states [B, ...].
    grid : times of the teacher, to the data, float64 [N + 1].

    Returns
    -------
    Mean costs over samples by metric, float64 [N + 1, N + 1]; infinite on and below the diagonal. ``"distance"`` is the
    Euclidean distance of the step's end from the teacher. ``"deviation"``, the default of the authors, is the distance of the
    step's end from the straight line between the trajectory's ends, minus the same distance of the teacher.
    """
    estimates: list[Tensor] = []

    def keep(k: int, t: float, state: Tensor, data: Tensor) -> None:
        estimates.append(flat(data.double()))

    plan = get_solver(TEACHER).plan(ode.schedule, grid)
    states = [flat(state.double()) for state in plan.run(ode, x, trajectory=True, callback=keep)]
    times, n = grid.tolist(), len(grid)
    costs = {metric: torch.full((n, n), math.inf, dtype=_F64, device="cpu") for metric in METRICS}
    first, line = states[0], _unit(states[-1] - states[0])
    teacher = [_distance(state - first, line) for state in states]
    for i in range(n - 1):
        slope = (states[i] - estimates[i]) / times[i]
        for j in range(i + 1, n):
            end = states[i] + (times[j] - times[i]) * slope
            costs["distance"][i, j] = (end - states[j]).norm(dim=1).mean()
            costs["deviation"][i, j] = (_distance(end - first, line) - teacher[j]).mean()
    return costs


def best_path(costs: Tensor, steps: int, coefficient: float = 1.0) -> list[int]:
    """The cheapest path from the first to the last level in a number of steps, by dynamic programming.

    The cost of a path is c_1 + coefficient (c_2 + coefficient (c_3 + ...)), with c_k the cost of its step k.

    Parameters
    ----------
    costs : cost of a step from level i to level j > i, [N, N].
    steps : number of steps.
    coefficient : factor on the costs after each step.

    Returns
    -------
    Indices of the levels, increasing, `steps` + 1 of them.

    Raises
    ------
    InputError : there are fewer than `steps` + 1 levels.
    """
    n = len(costs)
    if not 1 <= steps < n:
        raise InputError(f"a path over {n} levels has from 1 to {n - 1} steps, got {steps}.")
    above = torch.ones(n, n, dtype=torch.bool, device="cpu").triu(1)
    table = torch.where(above, costs.to(_F64), math.inf)
    value = table[:, -1]  # of the rest of the path, from each level in one step
    choices: list[Tensor] = []
    for _ in range(steps - 1):
        total = table + coefficient * value
        total[:, -1] = math.inf  # the last level is reached by the last step alone
        value, chosen = total.min(dim=1)
        choices.append(chosen)
    path = [0]
    for chosen in reversed(choices):
        path.append(int(chosen[path[-1]]))
    return [*path, n - 1]


def _unit(v: Tensor) -> Tensor:
    out: Tensor = v / v.norm(dim=1, keepdim=True)
    return out


def _distance(v: Tensor, line: Tensor) -> Tensor:
    """Distance of points [B, D] from lines through the origin with unit directions [B, D]."""
    out: Tensor = (v - (v * line).sum(dim=1, keepdim=True) * line).norm(dim=1)
    return out
