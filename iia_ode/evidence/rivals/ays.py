"""AYS, align your steps: times that minimize a bound on the KL divergence of the discretized SDE [Sabour et al. 2024].

On the schedule EDM, with levels t_0 > t_1 > ... > t_n and D the data estimate, the bound is proportional to

    sum_i int_{t_{i+1}}^{t_i} t^-3 E |D(x_t, t) - D(x_{t_i}, t_i)|^2 dt,

where x_t and x_{t_i} lie on one path of the forward process. The expectation is a Monte Carlo estimate over samples, on a
fixed grid of levels t: all levels of a sample are on one path, so one set of evaluations serves all schedules. The authors
draw levels at random, by importance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...grids import karras, log_snr
from ...metrics import flat
from ...ode import ProbabilityFlowODE
from ...solvers import get_solver
from .pairs import Learned, Pairs

__all__ = ["align", "bound_costs", "squared_differences"]

_F64 = torch.float64
_SWEEPS = 50


@torch.no_grad()
def align(
    pairs: Pairs,
    nfe: int,
    *,
    solver: str = "dpmpp_2m",
    levels: int = 60,
    floor: float = 0.0,
    seed: int = 0,
    differences: Tensor | None = None,
) -> Learned:
    """Learn the times of a solver.

    Coordinate search from the Karras grid moves one time after the other to its best place between its neighbors, until none
    moves.

    Parameters
    ----------
    pairs : draws of noise; their final states are the data of the forward process.
    nfe : evaluations of the solver.
    solver : solver with one evaluation a step, which runs on the grid.
    levels : levels of the Monte Carlo estimate, equidistant in log-SNR.
    floor : lower end of the bound, where it lies above ``sigma_min`` of the pairs.
    seed : of the forward process.
    differences : those of :func:`squared_differences`, if known.

    Returns
    -------
    The solver on its grid; the last level is replaced by the data.
    """
    fine = log_snr(levels, pairs.sigma_min, pairs.sigma_max, to_data=False)
    if differences is None:
        differences = squared_differences(pairs.ode, pairs.final, fine, seed)
    cost = pairs.sample_evaluations + levels * len(pairs)
    fine = fine[fine >= floor]
    costs = bound_costs(differences[: len(fine), : len(fine)], fine)
    start = karras(nfe, pairs.sigma_min, pairs.sigma_max)[1:-1]
    places = [int((fine.log() - level.log()).abs().argmin()) for level in start]
    path = _spread([0, *places, len(fine) - 1])
    for _ in range(_SWEEPS):
        moved = [*path]
        for k in range(1, len(path) - 1):
            inner = torch.arange(moved[k - 1] + 1, moved[k + 1], device="cpu")
            totals = costs[moved[k - 1], inner] + costs[inner, moved[k + 1]]
            moved[k] = int(inner[totals.argmin()])
        if moved == path:
            break
        path = moved
    grid = torch.cat([fine[path[:-1]], torch.zeros(1, dtype=_F64, device="cpu")])
    return Learned(get_solver(solver).plan(pairs.ode.schedule, grid), cost)


@torch.no_grad()
def squared_differences(ode: ProbabilityFlowODE, data: Tensor, levels: Tensor, seed: int = 0) -> Tensor:
    """E |D(x_t, t) - D(x_s, s)|^2 for all pairs of levels, on paths of the forward process.

    Parameters
    ----------
    ode : the model, on the schedule EDM.
    data : samples of the data [B, ...].
    levels : falling levels, float64 [N].
    seed : of the noise.

    Returns
    -------
    Means over samples, float64 [N, N].
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    x, before = data.cpu().double(), 0.0
    estimates: list[Tensor] = []
    for t in reversed(levels.tolist()):
        noise = torch.randn(x.shape, generator=generator, dtype=_F64, device="cpu")
        x, before = x + (t * t - before * before) ** 0.5 * noise, t
        estimates.append(flat(ode.evaluate(x.to(data), t).data.cpu().double()))
    found = torch.stack(estimates[::-1], dim=1)  # [B, N, D]
    return (torch.cdist(found, found) ** 2).mean(dim=0)


def bound_costs(differences: Tensor, levels: Tensor) -> Tensor:
    """The part of the bound of a step from level i to level j > i, by the trapezoidal rule in 1/t^2.

    Parameters
    ----------
    differences : those of :func:`squared_differences`, [N, N].
    levels : falling levels, float64 [N].

    Returns
    -------
    Costs, float64 [N, N]; zero on and below the diagonal.
    """
    widths = (1 / (2 * levels.square())).diff()
    cells = widths * (differences[:, :-1] + differences[:, 1:]) / 2  # [start, cell]
    inside = cells.triu()  # cells below the start alone
    total = torch.cat([torch.zeros(len(levels), 1, dtype=_F64, device="cpu"), inside.cumsum(dim=1)], dim=1)
    return total.triu(1)


def _spread(places: list[int]) -> list[int]:
    """Increasing places between fixed ends, each moved as little as possible from the left."""
    last, count = places[-1], len(places)
    found = [places[0]]
    for k in range(1, count - 1):
        found.append(min(max(places[k], found[-1] + 1), last - (count - 1 - k)))
    return [*found, last]
