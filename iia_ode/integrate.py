"""The two calls most people need: `sample` (final state) and `odeint` (trajectory, torchdiffeq's signature)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._torchdiffeq import integrate, torchdiffeq_methods
from .errors import GridError, InputError, MismatchError, NonFiniteError, UnknownNameError, unknown_name
from .iia import PRESETS, FittedSolver
from .ode import ProbabilityFlowODE
from .plan import Plan, check_grid, check_start, trace
from .solvers import Solver, as_solver, get_solver, is_registered, solver_names

__all__ = ["odeint", "sample", "torchdiffeq_methods"]

_PREFIX = "torchdiffeq:"


def sample(
    ode: ProbabilityFlowODE,
    x: Tensor,
    grid: Tensor | None = None,
    solver: str | Solver | FittedSolver | Plan = "heun",
    *,
    callback: Callable[[int, float, Tensor], None] | None = None,
    progress: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Integrate from the initial state to the end of the grid, without building an autograd graph.

    Parameters
    ----------
    ode : the model with its schedule.
    x : initial state [B, ...] at ``grid[0]``, float32 or float64; from noise that is ``sigma_T * randn``.
    grid : float64 [N + 1] times, such as ``grids.karras(10)``; a fitted solver or a plan brings its own.
    solver : a registered name, a torchdiffeq method, a :class:`Solver`, a fitted solver or a plan.
    callback : called as ``callback(k, t, state)`` at every grid point after the first.
    progress : show a bar over the evaluations.
    check_finite : raise if the model returns NaN or infinity; costs one reduction per evaluation, and no
        synchronisation with the device inside the loop.

    Returns
    -------
    The state at ``grid[-1]``, in the shape, dtype and device of x.

    Raises
    ------
    InputError, GridError, UnknownNameError, MismatchError, NonFiniteError : all are :class:`iia_ode.IIAError`.
    """
    with torch.no_grad():
        plan = _as_plan(ode, x, grid, solver)
        if plan is None:
            states = _torchdiffeq(ode, x, grid, str(solver), check_finite=check_finite)
            if callback is not None:
                for k, t in enumerate(check_grid(ode.schedule, grid)[1:], start=1):
                    callback(k, t, states[k])
            return states[-1]
        return plan.run(ode, x, callback=callback, progress=progress, check_finite=check_finite)


def odeint(
    ode: ProbabilityFlowODE,
    x: Tensor,
    grid: Tensor | None = None,
    method: str | Solver | FittedSolver | Plan = "heun",
    *,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """The states at all grid points, [len(grid), B, ...]; ``torchdiffeq.odeint`` with this library's methods added.

    A name means the method registered here if there is one, else torchdiffeq's; ``"torchdiffeq:rk4"`` insists on the
    latter. Gradients flow as in torchdiffeq. `rtol`, `atol` and `options` are for torchdiffeq's methods.

    Raises
    ------
    InputError, GridError, UnknownNameError, MismatchError, NonFiniteError : all are :class:`iia_ode.IIAError`.
    """
    plan = _as_plan(ode, x, grid, method)
    if plan is not None:
        if options:
            raise InputError(f"options {sorted(options)} are for torchdiffeq's methods; {plan.name} takes none.")
        return plan.run(ode, x, trajectory=True)
    return _torchdiffeq(ode, x, grid, str(method), rtol, atol, options)


def _as_plan(ode: ProbabilityFlowODE, x: Tensor, grid: Tensor | None, solver: object) -> Plan | None:
    """The plan of what was asked for; None means a method of torchdiffeq."""
    check_start(ode, x)
    if isinstance(solver, FittedSolver):
        solver.check(ode, x)
        return _own_grid(solver.plan, grid)
    if isinstance(solver, Plan):
        return _own_grid(solver, grid)
    name = solver if isinstance(solver, str) else ""
    if name in PRESETS:
        raise InputError(
            f"{name!r} has to be fitted first: fit = iia_ode.preset({name!r}).fit(ode, grid, x), then pass solver=fit."
        )
    if isinstance(solver, str):
        theirs = torchdiffeq_methods()
        if name.startswith(_PREFIX) or (name in theirs and not is_registered(name)):
            if name.removeprefix(_PREFIX) not in theirs:
                raise unknown_name("torchdiffeq method", name.removeprefix(_PREFIX), theirs)
            return None
        try:
            solver = get_solver(name)
        except UnknownNameError:
            raise unknown_name("solver", name, [*solver_names(), *theirs, *PRESETS]) from None
    if isinstance(solver, Mapping):
        solver = as_solver(solver)
    if not isinstance(solver, Solver):
        raise InputError(f"solver must be a name, a Solver, a FittedSolver or a Plan, got {type(solver).__name__}.")
    if grid is None:
        raise GridError(f"solver {solver.label!r} needs a grid, such as grid=iia_ode.grids.karras(10).")
    return trace(solver, ode.schedule, grid)


def _own_grid(plan: Plan, grid: Tensor | None) -> Plan:
    if grid is not None and check_grid(plan.schedule, grid) != list(plan.grid):
        raise MismatchError(
            f"{plan.name} brings its own grid of {len(plan.grid)} times, and another one was given: omit it."
        )
    return plan


def _torchdiffeq(
    ode: ProbabilityFlowODE,
    x: Tensor,
    grid: Tensor | None,
    method: str,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    options: Mapping[str, Any] | None = None,
    check_finite: bool = True,
) -> Tensor:
    if grid is None:
        raise GridError(f"method {method!r} needs a grid, such as grid=iia_ode.grids.karras(10, to_data=False).")
    times = check_grid(ode.schedule, grid)
    if ode.is_data(times[-1]):
        raise GridError(
            f"the grid ends at the data (t = {times[-1]:g}), where dx/dt is 0/0 and torchdiffeq may evaluate it: end at a "
            "small sigma (grids take to_data=False), or use a solver of this library."
        )
    name, t = method.removeprefix(_PREFIX), torch.tensor(times, dtype=torch.float64, device="cpu")
    states = integrate(ode, x, t, name, rtol, atol, options)
    if check_finite and not bool(torch.isfinite(states).all()):
        raise NonFiniteError(f"the result of {name} is not finite: check the model over the grid's noise levels.")
    return states
