"""The loop over a plan's evaluations with the model of an ODE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import MismatchError, NonFiniteError
from ..forms import conversion, converted
from ..ode import ProbabilityFlowODE
from ..schedules.stored import brief
from .checks import check_start
from .initial import root_mean_square, warn_of_size
from .run import Run, Runnable, start

__all__ = ["evaluator", "run_plan"]


def evaluator(ode: ProbabilityFlowODE) -> Callable[[Tensor, float, str], Tensor]:
    """The `evaluate` of :func:`run_code` for an ODE; the same bits as a :class:`Run` stores."""

    def evaluate(x: Tensor, t: float, form: str) -> Tensor:
        return converted(x, ode.output(x, t), conversion(ode.schedule, t, ode.prediction, form))

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
    if ode.schedule is not plan.schedule and ode.schedule.config() != plan.schedule.config():
        own, other = (brief(schedule.config()) for schedule in (plan.schedule, ode.schedule))
        raise MismatchError(f"{plan.name} was traced for {own}, and the ODE has {other}.")
    states = [x]

    def visit(run: Run) -> None:
        for k, state in run.reached:
            if trajectory:
                states.append(state)
            if callback is not None:
                callback(k, plan.grid[k], state)
        run.reached = ()

    run = start(plan, x, ode.prediction, ode.conditioning, keeps_seen=False)
    visit(run)
    with tqdm(total=plan.nfe, desc=plan.name, disable=not progress) as bar:
        while not run.done:
            run.give(ode.output(run.state, run.t))
            bar.update()
            visit(run)
    if check_finite:
        own = root_mean_square(x)
        finite, size = torch.stack([_are_finite(run.state).to(own), own]).tolist()  # one read
        warn_of_size(plan.schedule, plan.grid[0], size, x.numel())
        if not finite:
            raise _culprit(plan, ode, x)
    return torch.stack(states) if trajectory else run.state


def _finite(values: Tensor) -> bool:
    return bool(_are_finite(values))


def _are_finite(values: Tensor) -> Tensor:
    # One pass over the values; no sum of float32 overflows in float64.
    return torch.isfinite(values.detach().sum(dtype=torch.float64))


@torch.no_grad()
def _culprit(plan: Runnable, ode: ProbabilityFlowODE, x: Tensor) -> NonFiniteError:
    """The error for a run whose final state is not finite: the plan is run again, and each output is checked."""
    run = start(plan, x, ode.prediction, ode.conditioning, keeps_seen=False)
    while not run.done:
        output, number, count = ode.output(run.state, run.t), run.evaluation + 1, plan.nfe
        if not _finite(output):
            return NonFiniteError(
                f"the model returned NaN or infinity at evaluation {number} of {count} (t = {run.t:.6g}) under {plan.name}. "
                "Check the model at that noise level, its dtype (float16 overflows at large sigma), and the initial state."
            )
        run.give(output)
    if _finite(run.state):
        return NonFiniteError(
            f"the result of {plan.name} was not finite, and was finite in a second run that looked for the reason: the model "
            "returns other outputs for the same inputs. Call model.eval(), or seed what it draws."
        )
    return NonFiniteError(
        f"{plan.name} overflowed {run.state.dtype}: every model output was finite, the result is not."
    )
