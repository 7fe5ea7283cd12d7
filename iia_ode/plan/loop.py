"""The loop over a plan's evaluations with the model of an ODE."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import MismatchError, NonFiniteError
from ..forms import converted
from ..ode import ProbabilityFlowODE
from ..ode.mode import check_mode
from ..schedules.stored import brief
from ..transforms import readable
from .checks import check_start, factors_at
from .initial import root_mean_square, warn_of_size
from .run import Run, Runnable, start

__all__ = ["evaluator", "run_plan"]


def evaluator(ode: ProbabilityFlowODE) -> Callable[[Tensor, float, str], Tensor]:
    """The `evaluate` of :func:`run_code` for an ODE; the same bits as a :class:`Run` stores."""

    def evaluate(x: Tensor, t: float, form: str) -> Tensor:
        return converted(x, ode.output(x, t), factors_at(ode.schedule, t, ode.prediction, form))

    return evaluate


def run_plan(
    plan: Runnable,
    ode: ProbabilityFlowODE,
    x: Tensor,
    *,
    trajectory: bool,
    check_finite: bool,
    callback: Callable[[int, float, Tensor], None] | None,
    progress: bool,
) -> Tensor:
    """Run a plan to its end; see :meth:`iia_ode.Plan.run`."""
    check_start(ode, x)
    check_mode(ode)
    if ode.schedule is not plan.schedule and ode.schedule.config() != plan.schedule.config():
        own, other = (brief(schedule.config()) for schedule in (plan.schedule, ode.schedule))
        raise MismatchError(f"{plan.name} was traced for {own}, and the ODE has {other}.")
    states = [x.clone()] if trajectory else []

    def visit(run: Run) -> None:
        for k, state in run.reached:
            if trajectory:
                states.append(state)
            if callback is not None:
                callback(k, plan.grid[k], state)
        run.reached = ()

    run = start(plan, x, ode.prediction, ode.conditioning, keeps_seen=False)
    visit(run)
    bar = tqdm(total=plan.nfe, desc=plan.name) if progress else None
    try:
        while not run.done:
            run.give(ode.output(run.current, run.t))
            if bar is not None:
                bar.update()
            visit(run)
    finally:
        if bar is not None:
            bar.close()
    if check_finite and readable(run.current):
        own = root_mean_square(x)
        finite, size = torch.stack([_are_finite(run.current).to(own), own]).tolist()  # one read
        warn_of_size(plan.schedule, plan.grid[0], size, x.numel())
        if not finite:
            raise _culprit(plan, ode, x)
    return torch.stack(states) if trajectory else run.current


def _finite(values: Tensor) -> bool:
    return bool(_are_finite(values))


def _are_finite(values: Tensor) -> Tensor:
    # One pass over the values, in their own dtype: not every device has float64, and a sum of float32 overflows.
    return torch.isfinite(torch.linalg.vector_norm(values.detach(), math.inf))


@torch.no_grad()
def _culprit(plan: Runnable, ode: ProbabilityFlowODE, x: Tensor) -> NonFiniteError:
    """The error for a run whose final state is not finite: the plan is run again, and each output is checked."""
    run = start(plan, x, ode.prediction, ode.conditioning, keeps_seen=False)
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
