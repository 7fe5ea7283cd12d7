"""Local errors of the lines of a comparison: the error that each step makes by itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..metrics import rmse_with_error
from ..ode import ProbabilityFlowODE
from ..teacher import Teacher
from ..testing import local_errors
from .results import Comparison
from .tables import csv_of, written

__all__ = ["StepError", "StepErrors", "step_errors"]


@dataclass(frozen=True)
class StepError:
    """The local error of a step.

    Attributes
    ----------
    solver : name of the line.
    nfe : number of evaluations of the whole run.
    step : number of the step, from 0.
    t, s : times at the start and at the end of the step.
    level : noise level sigma/alpha at the start; infinite where alpha is 0.
    rmse : root mean square error per component after the step, from a start on the accurate trajectory, in units of the
        state.
    standard_error : standard error of `rmse` over samples; NaN for a single sample.
    fitted : whether the weights were fitted to a model.
    """

    solver: str
    nfe: int
    step: int
    t: float
    s: float
    level: float
    rmse: float
    standard_error: float
    fitted: bool = False


@dataclass(frozen=True)
class StepErrors:
    """Local errors of the lines of a comparison, made by :func:`step_errors`.

    Attributes
    ----------
    rows : a row for each line, each number of evaluations and each step.
    teacher_error : estimate of the error of the accurate trajectories at their end; smaller local errors are not resolved.
        None where it is not finite.
    """

    rows: tuple[StepError, ...]
    teacher_error: float | None

    def csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Format all rows as comma-separated values, with a header line.

        Parameters
        ----------
        path : file to write, atomically; by default none.

        Returns
        -------
        The text.

        Raises
        ------
        OSError : the file cannot be written.
        """
        return written(path, csv_of(StepError, self.rows))

    def table(self) -> str:
        """Format the errors as text: a line for each solver and number of evaluations, a column for each step.

        Returns
        -------
        The table.
        """
        lines: dict[tuple[str, int], list[str]] = {}
        for row in self.rows:
            lines.setdefault((row.solver, row.nfe), []).append(f"{row.rmse:9.2e}")
        width = max(len("solver"), *(len(s) for s, _ in lines))
        head = f"{'solver':<{width}} NFE " + " ".join(f"{f'step {k}':>9}" for k in range(max(map(len, lines.values()))))
        return "\n".join([head, *(f"{s:<{width}} {n:>3} {' '.join(errors)}" for (s, n), errors in lines.items())])


def step_errors(
    ode: ProbabilityFlowODE,
    x: Tensor,
    comparison: Comparison,
    nfes: int | Sequence[int] | None = None,
    *,
    teacher: Teacher | None = None,
) -> StepErrors:
    """Measure the error that each step of each line makes by itself: a step starts on the accurate trajectory.

    The sum of local errors is not the endpoint error: later steps amplify or damp earlier errors. The local errors show the
    steps with the largest share. :func:`iia_ode.testing.local_errors` has the errors per sample.

    Parameters
    ----------
    ode : the ODE of the comparison, with the conditions of `x`. For a setting, ``setting.draw`` makes ODE and states.
    x : initial states [B, ...] at the start of the grids, float32 or float64.
    comparison : result of :func:`compare`, whose plans are measured.
    nfes : numbers of evaluations; by default all.
    teacher : accurate trajectories from `x`; by default of at least 60 steps, and of four steps per evaluation.

    Returns
    -------
    The local errors, in the order of the rows of the comparison.

    Raises
    ------
    InputError : the comparison has no plans, or none with such a number of evaluations; or x is no batch of states of the ODE.
    GridError : a plan leaves the range of times of the teacher.
    MismatchError : the teacher belongs to another ODE or to other states.

    Examples
    --------
    >>> errors = step_errors(ode, x, result, 8)
    >>> print(errors.table())
    """
    wanted = None if nfes is None else {nfes} if isinstance(nfes, int) else set(nfes)
    plans = {key: plan for key, plan in comparison.plans.items() if wanted is None or key[1] in wanted}
    if not plans:
        counts = sorted({nfe for _, nfe in comparison.plans})
        raise InputError(
            f"the comparison has no plan of {nfes} evaluations; it has plans of {counts or 'no'} evaluations."
        )
    schedule, fitted = ode.schedule, {(r.solver, r.nfe): r.fitted for r in comparison.rows}
    if teacher is None:
        lowest = min(plans.values(), key=lambda plan: schedule.noise_to_signal(plan.grid[-2]))
        steps = max(60, *(4 * nfe for _, nfe in plans))
        teacher = Teacher.for_grid(ode, x, list(lowest.grid), steps=steps)
    rows = []
    for (solver, nfe), plan in plans.items():
        for k, own in enumerate(local_errors(ode, x, plan, teacher)):
            t, s = plan.grid[k : k + 2]
            measured = rmse_with_error(own, torch.zeros_like(own))
            rows.append(StepError(solver, nfe, k, t, s, schedule.noise_to_signal(t), *measured, fitted[solver, nfe]))
    return StepErrors(tuple(rows), teacher.record.error)
