"""The loop over a plan's evaluations with the model of an ODE."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_whole
from ..errors import InputError, MismatchError, NonFiniteError
from ..forms import converted
from ..ode import ProbabilityFlowODE
from ..ode.calls import Loans, SpoiledError
from ..ode.mode import check_mode
from ..schedules.stored import brief
from ..transforms import differentiated, readable
from .callbacks import Callback, notifier
from .checks import check_constants, check_start, factors_at
from .initial import check_size, warn_of_size
from .prepared import Runnable
from .run import Run, start

__all__ = ["advance", "evaluator", "run_plan"]


def evaluator(ode: ProbabilityFlowODE) -> Callable[[Tensor, float, str], Tensor]:
    """The `evaluate` of :func:`run_code` for an ODE; the same bits as a :class:`Run` stores."""

    def evaluate(x: Tensor, t: float, form: str) -> Tensor:
        return converted(x, ode.borrowed(x, t), factors_at(ode.schedule, t, ode.prediction, form))

    return evaluate


def run_plan(
    plan: Runnable,
    ode: ProbabilityFlowODE,
    x: Tensor,
    *,
    trajectory: bool,
    check_finite: bool,
    callback: Callback | None,
    progress: bool,
) -> Tensor:
    """Run a plan to its end; see :meth:`iia_ode.Plan.run`."""
    check_start(ode, x)
    check_mode(ode)
    _check_schedule(plan, ode)
    check_constants(ode.schedule)
    states, notify = [x.clone()] if trajectory else [], notifier(callback)

    def begun() -> Run:
        return start(plan, x, ode.prediction, ode.conditioning, keeps_seen=notify.takes_data)

    run = begun()

    def visit(k: int, state: Tensor) -> None:
        if trajectory:
            states.append(state)
        if callback is not None:
            notify(k, plan.grid[k], state, lambda: None if run.seen is None else run.data)

    culprit, lends = begun if check_finite else None, not trajectory and callback is None
    try:
        _drive(run, ode, plan.steps, visit, progress, culprit, x, Loans() if lends else None)
    except SpoiledError:
        run = begun()
        _drive(run, ode, plan.steps, visit, progress, culprit, x)
    return torch.stack(states) if trajectory else run.current


def advance(
    ode: ProbabilityFlowODE,
    run: Run,
    until: int | None = None,
    *,
    callback: Callback | None = None,
    progress: bool = False,
    check_finite: bool = True,
) -> Run:
    """Continue a run up to a grid point, with the memory of the solver.

    The run stops at the first evaluation after the state at the grid point is known. ``run.save`` writes a stopped run to a
    file. A stopped and continued run gives the same bits as an uninterrupted run.

    Parameters
    ----------
    ode : the model, with the conditions of the samples.
    run : a run, from ``plan.start(x, ode.prediction)`` or from a file; not changed.
    until : index of the grid point; by default the end of the grid.
    callback, progress, check_finite : as for :meth:`iia_ode.Plan.run`.

    Returns
    -------
    The continued run. ``run.reached`` has the states at the grid points reached last; ``run.point`` is the index of the last
    known state.

    Raises
    ------
    InputError : no run, or the grid point lies behind the run or beyond the grid.
    MismatchError : the ODE has another schedule or prediction type than the run.
    NonFiniteError : the run is done, and its final state holds NaN or infinity.

    Warns
    -----
    StateSizeWarning : the run is at its start, and its state is smaller than the noise at ``grid[0]``.

    Examples
    --------
    >>> run = iia_ode.plan.advance(ode, plan.start(x, ode.prediction), until=6)
    >>> x_0 = iia.sample(ode, run)
    """
    if not isinstance(run, Run):
        raise InputError(f"expected a run, such as plan.start(x, ode.prediction), got {type(run).__name__}.")
    check_start(ode, run.current)
    check_mode(ode)
    _check_schedule(run.plan, ode)
    check_constants(ode.schedule)
    if ode.prediction != run.prediction:
        raise MismatchError(f"this run takes {run.prediction} prediction, and the ODE has {ode.prediction}.")
    last = run.plan.steps
    goal = (
        last if until is None else check_whole("until, the index of a grid point,", until, least=run.point, most=last)
    )
    notify = notifier(callback)
    found = copy.copy(run)
    found.keeps_seen = True

    def visit(k: int, state: Tensor) -> None:
        notify(k, found.plan.grid[k], state, lambda: None if found.seen is None else found.data)

    # A derivative of torch.func is asked for by the transform itself.
    with torch.set_grad_enabled(torch.is_grad_enabled() and differentiated()):
        x = run.values.get(0) if run.evaluation == 0 else None
        _drive(found, ode, goal, visit, progress, (lambda: copy.copy(run)) if check_finite else None, x)
    return found


def _check_schedule(plan: Runnable, ode: ProbabilityFlowODE) -> None:
    if ode.schedule is not plan.schedule and ode.schedule.config() != plan.schedule.config():
        own, other = (brief(schedule.config()) for schedule in (plan.schedule, ode.schedule))
        raise MismatchError(f"{plan.name} was traced for {own}, and the ODE has {other}.")


def _drive(
    run: Run,
    ode: ProbabilityFlowODE,
    goal: int,
    visit: Callable[[int, Tensor], None],
    progress: bool,
    first: Callable[[], Run] | None,
    x: Tensor | None = None,
    loans: Loans | None = None,
) -> None:
    """Evaluate the model until the run has reached grid point `goal`.

    `visit` is called with the index and the state of each grid point. `first` makes a new run, which finds the cause of a
    final state that is not finite; None switches the check off. The check also reads the size of the initial states x. With
    `loans`, the model gets the run's own states.
    """
    plan, point = run.plan, run.point
    reached: tuple[int, Tensor] | None
    if run.evaluation == 0:  # steps before the first evaluation
        for k, state in run.reached:
            visit(k, state)
    bar = tqdm(total=plan.nfe, initial=run.evaluation, desc=plan.name) if progress else None
    evaluate = partial(ode.borrowed, loans=loans)
    try:
        while not run.done and point < goal:
            run.step(evaluate)
            if bar is not None:
                bar.update()
            for reached in run.reached:  # no name for the state, which would keep it in memory
                point = reached[0]
                visit(*reached)
            reached = None
    finally:
        if bar is not None:
            bar.close()
    if first is None or not readable(run.current):
        return
    if not run.done:
        if x is not None:
            check_size(plan.schedule, plan.grid[0], x)
        return
    total, *norm = _read([run.current.sum(), *(() if x is None else (torch.linalg.vector_norm(x),))])
    if norm and x is not None:
        warn_of_size(plan.schedule, plan.grid[0], norm[0] / math.sqrt(x.numel()), x.numel())
    # A sum with NaN or infinity is not finite; the sum of finite numbers may overflow.
    if not math.isfinite(total) and not _finite(run.current):
        raise _culprit(first(), ode)


def _read(values: list[Tensor]) -> list[float]:
    """Tensors [] as numbers, by one read from a device; on the host, each by itself is three times faster."""
    if values[0].is_cpu:
        return [v.item() for v in values]
    numbers: list[float] = torch.stack([v.detach() for v in values]).tolist()
    return numbers


def _finite(values: Tensor) -> bool:
    # One pass over the values, in their own dtype: not every device has float64, and a sum of float32 overflows.
    low, high = torch.aminmax(values.detach())
    return math.isfinite(float(low)) and math.isfinite(float(high))


@torch.no_grad()
def _culprit(run: Run, ode: ProbabilityFlowODE) -> NonFiniteError:
    """The error for a run whose final state is not finite: the run is made again, and each output is checked."""
    plan = run.plan
    while not run.done:
        output, number, count = ode.output(run.current, run.t), run.evaluation + 1, plan.nfe
        if not _finite(output):
            return NonFiniteError(
                f"the model returned NaN or infinity at evaluation {number} of {count} (t = {run.t:.6g}) under {plan.name}. "
                "Check the model at that noise level, its dtype (float16 overflows at large sigma), and the initial state."
            )
        run.give(output)
    if _finite(run.current):
        return NonFiniteError(
            f"the result of {plan.name} was not finite, and was finite in a second run that looked for the reason: the model "
            "returns other outputs for the same inputs. Call model.eval(), or seed what it draws."
        )
    return NonFiniteError(
        f"{plan.name} overflowed {run.current.dtype}: every model output was finite, the result is not."
    )
