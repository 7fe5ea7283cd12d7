"""Runs of a solver for comparison: eager runs on tensors, interleaved traces, and runs under another default dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..ode import ProbabilityFlowODE
from ..plan import Past, Plan, Tracer, Vector
from ..plan.tracer import take_step
from ..schedules import Schedule
from ..solvers import Solver

__all__ = ["default_dtype", "eager_run", "traced_in_turn"]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype inside the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def eager_run(solver: Solver, ode: ProbabilityFlowODE, x: Tensor, grid: Tensor) -> Tensor:
    """The states at all grid points by calling `step` on tensors, interval by interval."""
    times, states, memory = grid.tolist(), [x], ()
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        y, memory = take_step(solver, ode, states[-1], t, s, Past(memory, i, len(times) - 2 - i))
        states.append(y)
    return torch.stack(states)


def traced_in_turn(solver: Solver, schedule: Schedule, grids: tuple[Tensor, ...]) -> list[Plan]:
    """One plan for each grid, traced with one solver instance, alternating between the grids step by step."""
    times = [grid.tolist() for grid in grids]
    tracers = [Tracer(schedule) for _ in grids]
    states, memories = [Vector({0: 1.0}) for _ in grids], [() for _ in grids]
    for i in range(max(map(len, times)) - 1):
        for j, tracer in enumerate(tracers):
            if i < len(times[j]) - 1:
                past = Past(memories[j], i, len(times[j]) - 2 - i)
                y, memories[j] = take_step(solver, tracer, states[j], times[j][i], times[j][i + 1], past)
                states[j] = tracer.hold(y, step=i + 1)
    pairs = zip(times, tracers, strict=True)
    return [Plan(schedule, tuple(t), tuple(tracer.code), solver.label) for t, tracer in pairs]
