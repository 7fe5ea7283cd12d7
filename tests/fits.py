"""Budgets, models and errors that the tests of one-call fits share."""

import torch
from support import F64
from torch import Tensor, nn

import iia_ode as iia
from iia_ode import Budget, FittedSolver, Teacher

QUICK = Budget(teacher_steps=50, trials=2)
"""Fits in closed form alone: a fraction of a second for one or two evaluations, for which few grids are tried."""

REFINED = Budget(teacher_steps=50, trials=2, starts=1, iterations=3, probes=2, held_out=0.5)
"""The same with one refinement."""


def start_of(found: FittedSolver, noise: Tensor) -> Tensor:
    """Initial states of a fitted solver."""
    return found.plan.schedule.sigma(found.plan.grid[0]) * noise


def exact_end(ode: iia.ProbabilityFlowODE, x: Tensor, t: float) -> Tensor:
    """Accurate final states of the states x at time t."""
    return Teacher.solve(ode, x, float(t), ode.schedule.t_data).final


def median_error(
    ode: iia.ProbabilityFlowODE,
    solver: FittedSolver | iia.Solver,
    x: Tensor,
    exact: Tensor,
    grid: Tensor | None = None,
) -> float:
    """Median over samples of the root mean square error of the final states."""
    return float((iia.sample(ode, x, grid, solver) - exact).flatten(1).square().mean(dim=1).sqrt().median())


class Labelled(nn.Module):
    """Data near the label, whatever the state. Records every call as (time, states, labels)."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[float, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.asked.append((float(t[0]), x.detach().clone(), label.clone()))
        return (label.to(F64)[:, None] + 0.1 * x) / (1 + t[:, None] ** 2)


class Small(nn.Module):
    """A network of four components. Records every time and the size of the largest batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4))
        self.largest = 0
        self.times: list[float] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.largest = max(self.largest, len(x))
        self.times.append(float(t.detach().min()))
        s = t[:, None]
        return (x + 0.3 * s * torch.tanh(self.layers(x / (1 + s)))) / (1 + s * s)
