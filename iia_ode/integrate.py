"""`sample` returns the final state of the ODE; `odeint` returns the whole trajectory, with torchdiffeq's argument names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import _torchdiffeq
from .errors import GridError, InputError, MismatchError, NonFiniteError, unknown_name
from .forms import Evaluation
from .iia import PRESETS, FittedSolver
from .ode import ProbabilityFlowODE
from .ode.distributed import agree
from .ode.mode import check_mode
from .plan import Plan, Run, advance, check_grid, check_ode, check_size, check_start, run_rows, traced
from .plan.callbacks import Callback, Notifier, notifier
from .plan.checks import check_constants, factors_at
from .plan.prepared import Runnable
from .solvers import Solver, as_solver, is_registered, solver_names, unknown_solver
from .solvers.base import shared_solver
from .transforms import carries_derivative, differentiated, vectorized

__all__ = ["fixed_method", "odeint", "sample"]

_PREFIX = "torchdiffeq:"
_RTOL, _ATOL = 1e-7, 1e-9  # torchdiffeq's own defaults

Fixed: TypeAlias = Solver | FittedSolver | Plan
"""A method of this library: its steps are those of the grid."""


_SILENT = Notifier(None)


@dataclass(frozen=True)
class _Foreign:
    """A method of torchdiffeq."""

    name: str


def sample(
    ode: ProbabilityFlowODE,
    x: Tensor | Run,
    grid: Tensor | None = None,
    solver: str | Solver | FittedSolver | Plan = "heun",
    *,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Integrate from the initial state to the end of the grid, without building an autograd graph.

    Transforms of ``torch.func``, such as ``jacrev``, still receive derivatives. A grid that requires gradients is accepted,
    and receives no gradient.

    Parameters
    ----------
    ode : the model with its schedule.
    x : initial state [B, ...] at ``grid[0]``, float32 or float64. A state of pure noise is ``sigma_T * randn``. Or a stopped
        run (:class:`iia_ode.Run`) to continue: a run has its own grid and solver, and keeps the memory of the solver.
    grid : float64 [N + 1] times, such as ``grids.karras(10)``; omitted for a fitted solver or a plan, which have a grid. A
        :class:`Solver` also takes a grid per sample, [B, N + 1]: each sample then starts at its own level, and all samples
        share model calls with times [B].
    solver : a registered name, a method of torchdiffeq, a :class:`Solver`, a fitted solver or a plan.
    rtol, atol : relative and absolute tolerance of a method of torchdiffeq, by default 1e-7 and 1e-9.
    options : torchdiffeq's options of the method, such as ``{"first_step": 0.1}``.
    callback : called as ``callback(k, t, state)`` at every grid point after the first, once the state there is known; t has
        shape [B] for a grid per sample. A function with a parameter named ``data``, or with four parameters, is called as
        ``callback(k, t, state, data)`` with the estimate of x_0 by the last evaluation, [B, ...]; the estimate is None before
        the first evaluation.
    progress : show a bar over the model evaluations.
    check_finite : raise an error if the model returns NaN or infinity, and warn if x is too small for the noise level at
        ``grid[0]``. The device is read once, after the last evaluation.

    Returns
    -------
    The state at ``grid[-1]``, [B, ...], with the dtype and the device of x.

    Raises
    ------
    InputError : an argument has a wrong type, shape or dtype; or `rtol`, `atol` or `options` with a solver of fixed steps.
    GridError : the grid is missing or not usable, or the model is evaluated at the data, where its output does not determine
        the needed form (dx/dt for a method of torchdiffeq).
    UnknownNameError : no such solver.
    MismatchError : a fitted solver or a plan was made for another schedule, grid, prediction type or state shape.
    NonFiniteError : the model or the result is not finite.

    Warns
    -----
    StateSizeWarning : x is smaller than the noise at ``grid[0]``, such as a draw of ``randn`` at level 80.

    Examples
    --------
    >>> x = iia.sample(ode, x_T, iia.grids.karras(10), "dpmpp_2m")
    >>> x = iia.sample(ode, x_T, iia.grids.karras(10, to_data=False), "dopri5", rtol=1e-5, atol=1e-5)
    """
    check_ode(ode)
    if isinstance(x, Run):
        if grid is not None or solver != "heun":
            raise InputError("a run has its grid and its solver: omit both, iia_ode.sample(ode, run).")
        _refuse(x.plan, rtol=rtol, atol=atol, options=options)
        agree(ode, "sample", x.plan, x.position, x.values)
        return advance(ode, x, callback=callback, progress=progress, check_finite=check_finite).state
    method = _resolve(solver)
    # A derivative of torch.func is asked for by the transform itself.
    with torch.set_grad_enabled(torch.is_grad_enabled() and differentiated()):
        if isinstance(method, _Foreign):
            notify = notifier(callback)
            states = _by_torchdiffeq(ode, x, grid, method, rtol, atol, options, progress, check_finite, notify=notify)
            final: Tensor = states[-1]
            return final
        if isinstance(method, Solver) and isinstance(grid, Tensor) and grid.ndim == 2:
            _refuse(method, rtol=rtol, atol=atol, options=options)
            agree(ode, "sample", method.label, grid, x)
            return run_rows(ode, x, grid, method, callback=callback, progress=progress, check_finite=check_finite)
        plan = _as_plan(ode, x, grid, method)
        _refuse(plan, rtol=rtol, atol=atol, options=options)
        agree(ode, "sample", plan, x)
        return plan.run(ode, x, callback=callback, progress=progress, check_finite=check_finite)


@overload
def odeint(
    func: ProbabilityFlowODE,
    y0: Tensor,
    t: Tensor | None = None,
    *,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    method: str | Solver | FittedSolver | Plan = "heun",
    options: Mapping[str, Any] | None = None,
    event_fn: None = None,
) -> Tensor: ...


@overload
def odeint(
    func: ProbabilityFlowODE,
    y0: Tensor,
    t: Tensor | None = None,
    *,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    method: str | Solver | FittedSolver | Plan = "heun",
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]: ...


def odeint(
    func: ProbabilityFlowODE,
    y0: Tensor,
    t: Tensor | None = None,
    *,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    method: str | Solver | FittedSolver | Plan = "heun",
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Integrate and return the states at all grid points: ``torchdiffeq.odeint`` with this library's methods added.

    A name selects the solver of this library if there is one, otherwise the method of torchdiffeq. The name
    ``"torchdiffeq:rk4"`` always selects the method of torchdiffeq. Gradients flow to `y0`, to the model's parameters and to
    its conditions. With methods of torchdiffeq, gradients also flow to `t` and to the parameters of a schedule.

    Parameters
    ----------
    func : the ODE: the model with its schedule.
    y0 : initial state [B, ...] at ``t[0]``, float32 or float64.
    t : float64 [N + 1] times; omitted for a fitted solver or a plan, which have a grid. A :class:`Solver` also takes a grid
        per sample, [B, N + 1].
    rtol, atol : relative and absolute tolerance of a method of torchdiffeq, by default 1e-7 and 1e-9.
    method : a registered name, a method of torchdiffeq, a :class:`Solver`, a fitted solver or a plan.
    options : torchdiffeq's options of the method, such as ``{"step_size": 0.05}``.
    event_fn : called as ``event_fn(t, y)`` with a time [] in the dtype of the state [B, ...]; the integration stops at the
        first sign change of any entry of its result. Only the first and the last time of `t` have an effect. Methods of
        torchdiffeq only.

    Returns
    -------
    The states [N + 1, B, ...], with the dtype and the device of `y0`. With `event_fn` a pair, as from torchdiffeq: the time
    of the event, float64 [] on the host, and the states at ``t[0]`` and at the event, [2, B, ...].

    Raises
    ------
    InputError : an argument has a wrong type, shape or dtype; `rtol`, `atol`, `options` or `event_fn` with a solver of fixed
        steps; or a gradient by times or by a schedule through a solver of fixed steps.
    GridError : the grid is missing or not usable, the model is evaluated at the data, where its output does not determine the
        needed form, or the grid contains no event.
    UnknownNameError : no such method.
    MismatchError : a fitted solver or a plan was made for another schedule, grid, prediction type or state shape.
    NonFiniteError : the model or the result is not finite.

    Warns
    -----
    StateSizeWarning : `y0` is smaller than the noise at ``t[0]``, such as a draw of ``randn`` at level 80.
    """
    check_ode(func)
    found = _resolve(method)
    if isinstance(found, _Foreign):
        answer: Tensor | tuple[Tensor, Tensor] = _by_torchdiffeq(
            func, y0, t, found, rtol, atol, options, event_fn=event_fn
        )
        return answer
    if isinstance(found, Solver) and isinstance(t, Tensor) and t.ndim == 2:
        _refuse(found, rtol=rtol, atol=atol, options=options, event_fn=event_fn)
        agree(func, "odeint", found.label, t, y0)
        return run_rows(func, y0, t, found, trajectory=True)
    plan = _as_plan(func, y0, t, found)
    agree(func, "odeint", plan, y0)
    _refuse(plan, rtol=rtol, atol=atol, options=options, event_fn=event_fn)
    return plan.run(func, y0, trajectory=True)


# ---- from a name to a method -----------------------------------------------------------------------------------------


def _resolve(solver: object) -> Fixed | _Foreign:
    """The method that the argument stands for."""
    if isinstance(solver, Fixed):
        return solver
    if isinstance(solver, Mapping):
        return as_solver(solver)
    if not isinstance(solver, str):
        raise InputError(f"solver must be a name, a Solver, a FittedSolver or a Plan, got {type(solver).__name__}.")
    if solver in PRESETS:
        raise InputError(
            f"{solver!r} has to be fitted first: fit = iia_ode.preset({solver!r}).fit(ode, x, grid), then pass solver=fit."
        )
    if is_registered(solver):
        return shared_solver(solver)
    name, theirs = solver.removeprefix(_PREFIX), solver_names(torchdiffeq=True)
    if name in theirs:
        return _Foreign(name)
    if solver.startswith(_PREFIX):
        raise unknown_name("torchdiffeq method", name, theirs)
    raise unknown_solver(name, [*theirs, *PRESETS])


def fixed_method(solver: object) -> Fixed:
    """The method of this library that the argument stands for; InputError for methods of torchdiffeq and unfitted presets."""
    found = _resolve(solver)
    if isinstance(found, _Foreign):
        raise InputError(f"{found.name!r} is a method of torchdiffeq: give a solver of this library, such as 'heun'.")
    return found


# ---- methods of this library -----------------------------------------------------------------------------------------


def _as_plan(ode: ProbabilityFlowODE, x: Tensor, grid: Tensor | None, method: Fixed) -> Plan:
    """The plan of a method on the ODE's schedule and the grid."""
    if carries_derivative(grid):
        raise InputError(
            "the times of a plan are numbers, through which no gradient flows: pass grid.detach(), take "
            "method='torchdiffeq:rk4', or fit the times by iia_ode.iia.refine."
        )
    if isinstance(method, Solver):
        if grid is None:
            raise GridError(f"solver {method.label!r} needs a grid, such as grid=iia_ode.grids.karras(10).")
        if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
            raise InputError(
                f"torch.export reads no times of a grid: make the plan before, plan = iia_ode.get_solver({method.label!r})"
                ".plan(schedule, grid), and pass solver=plan without a grid."
            )
        check_constants(ode.schedule)
        return traced(method, ode.schedule, grid)
    if isinstance(method, FittedSolver):
        check_start(ode, x)  # the check of the fit reads the shape of x
        if not torch.compiler.is_compiling():  # a graph knows no values of the model's parameters
            method.check(ode, x)
    plan = method if isinstance(method, Plan) else method.plan
    if grid is not None and check_grid(plan.schedule, grid) != list(plan.grid):
        raise MismatchError(
            f"{plan.name} has its own grid of {len(plan.grid)} times, and another grid was given: omit it."
        )
    return plan


def _refuse(plan: Runnable | Solver, **given: object) -> None:
    """Raise InputError if an argument was given that only a method of torchdiffeq takes."""
    names = [name for name, value in given.items() if value is not None and value != {}]
    if "event_fn" in names:
        raise InputError(
            f"{plan.name} has the steps of its grid and finds no events: omit event_fn, or use method='dopri5'."
        )
    if "options" in names:
        raise InputError(
            f"options {given['options']!r} are for torchdiffeq's methods, and {plan.name} takes none: "
            "omit them, or make the solver with options of its own by iia_ode.get_solver(name, option=value)."
        )
    if names:
        raise InputError(
            f"{plan.name} has the steps of its grid, and {' and '.join(names)} would have no effect: omit "
            f"{'them' if len(names) > 1 else 'it'} and take a finer grid for a smaller error, or use 'dopri5'."
        )


# ---- methods of torchdiffeq ------------------------------------------------------------------------------------------


def _by_torchdiffeq(
    ode: ProbabilityFlowODE,
    x: Tensor,
    grid: Tensor | None,
    method: _Foreign,
    rtol: float | Tensor | None,
    atol: float | Tensor | None,
    options: Mapping[str, Any] | None,
    progress: bool = False,
    check_finite: bool = True,
    event_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    notify: Notifier = _SILENT,
) -> Any:
    """The states at the times of the grid; with `event_fn`, the time of the event and the states before and at it."""
    check_start(ode, x)
    check_mode(ode)
    if grid is None:
        raise GridError(f"method {method.name!r} needs a grid, such as grid=iia_ode.grids.karras(10, to_data=False).")
    times = check_grid(ode.schedule, grid)
    for end in (times[0], times[-1]):
        if ode.is_data(end):  # torchdiffeq may evaluate dx/dt at both ends
            factors_at(ode.schedule, end, ode.prediction, "velocity")
            if not ode.schedule.knows(end):
                raise GridError("the model knows no levels down to the data: end the grid at its lowest known level.")
    agree(ode, method.name, times, rtol, atol, options, x)
    tolerances = _RTOL if rtol is None else rtol, _ATOL if atol is None else atol
    t = torch.tensor(times, dtype=torch.float64, device="cpu")
    if isinstance(grid, Tensor) and carries_derivative(grid):
        t = grid.to(torch.float64)
    _check_transforms(method.name)
    flow = _Flow(ode, notify.takes_data)
    visit = None if notify.callback is None else lambda k, state: notify(k, times[k], state, flow.data)
    with flow.shown(method.name, progress):
        if event_fn is None:
            answer: Any = _torchdiffeq.integrate(flow, x.clone(), t, method.name, *tolerances, options, visit)
        else:
            answer = _torchdiffeq.find_event(flow, x.clone(), t, method.name, event_fn, *tolerances, options)
    states = answer if event_fn is None else answer[1]
    if check_finite:
        check_size(ode.schedule, times[0], x)
    if check_finite and not bool(torch.isfinite(states).all()):
        raise NonFiniteError(
            f"the result of {method.name} is not finite: check the model over the noise levels of the grid."
        )
    return answer


def _check_transforms(method: str) -> None:
    """Raise InputError inside a transform of torch.func that torchdiffeq does not support."""
    if vectorized() or (differentiated() and _torchdiffeq.is_adaptive(method)):
        raise InputError(
            f"torchdiffeq's {method} does not run inside this transform of torch.func: use a solver of this library, such as "
            "'heun', or the gradients of torch.autograd."
        )


class _Flow:
    """dx/dt of an ODE, which keeps the last evaluation if `keeps`, for the estimate of the data."""

    def __init__(self, ode: ProbabilityFlowODE, keeps: bool) -> None:
        self.ode, self.keeps = ode, keeps
        self.last: Evaluation[Tensor] | None = None
        self.count: Callable[[], object] = lambda: None

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.count()
        if not self.keeps:
            velocity: Tensor = self.ode(t, x)
            return velocity
        self.last = self.ode.evaluate(x, t)
        return self.last.velocity

    def data(self) -> Tensor | None:
        """Estimate of x_0 by the last evaluation, [B, ...]."""
        return None if self.last is None else self.last.data

    @contextmanager
    def shown(self, name: str, progress: bool) -> Iterator[None]:
        """Show a bar over the evaluations, whose number is not known beforehand."""
        with tqdm(desc=name, unit=" evaluations", disable=not progress) as bar:
            self.count = bar.update
            yield
