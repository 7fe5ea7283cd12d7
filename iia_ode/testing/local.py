"""Local errors of a plan or a fitted solver against accurate trajectories."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..iia import FittedSolver
from ..ode import ProbabilityFlowODE
from ..plan import Combine, Plan, check_start, evaluator, run_code
from ..plan.instructions import originals
from ..teacher import Teacher
from ..teacher.teacher import check_teacher

__all__ = ["local_errors"]


@torch.no_grad()
def local_errors(ode: ProbabilityFlowODE, x: Tensor, plan: Plan | FittedSolver, teacher: Teacher) -> Tensor:
    """The error that each step makes by itself, per sample: the step starts on the teacher's trajectory.

    The state at every grid point is replaced by the teacher's state, so that a multistep method looks back on evaluations
    along the teacher's trajectory too.

    Parameters
    ----------
    ode : the model.
    x : initial states [B, ...], float32 or float64, as given to the teacher.
    plan : a plan or a fitted solver, over the teacher's range of times.
    teacher : accurate trajectories from x, such as ``iia.Teacher.for_grid(ode, x, grid)``.

    Returns
    -------
    Root mean square over the components of a sample, of the difference from the teacher after each step, float64 [N, B] on
    the host; in units of the state.

    Raises
    ------
    InputError : `plan` is no plan, or x is no batch of states for this ODE.
    GridError : the plan leaves the teacher's range of times.
    MismatchError : the teacher belongs to another ODE, to other states, or starts at another time.
    """
    found = plan.plan if isinstance(plan, FittedSolver) else plan
    if not isinstance(found, Plan):
        raise InputError(f"plan must be a Plan or a FittedSolver, got {type(plan).__name__}; see Solver.plan.")
    check_start(ode, x)
    check_teacher(teacher, ode, x, found.grid[0])
    values, errors, same, ends = {0: x}, [], originals(found.code), {0}
    for k, ins in run_code(found.code, values, evaluator(ode)):
        if isinstance(ins, Combine) and ins.step is not None:
            exact = teacher.at(found.grid[ins.step]).to(x)
            errors.append((values[k] - exact).double().flatten(1).square().mean(1).sqrt().cpu())
            values[k] = exact
            if same[k] not in ends:  # later steps may read the vector that the state copies
                values[same[k]] = exact
            ends |= {k, same[k]}
    return torch.stack(errors)
