"""Butcher tableaus of plans: the steps of Runge-Kutta methods as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_whole
from ..errors import PlanError
from ..forms import conversion
from .instructions import Combine, Evaluate, Program
from .vectors import Vector, is_number

__all__ = ["Tableau", "butcher"]

_F64 = torch.float64


@dataclass(frozen=True, eq=False)
class Tableau:
    """One step of a Runge-Kutta method on the velocity dx/dt [Hairer, Norsett, Wanner 1993, section II.1].

    Stage i is k_i = f(x + h sum_j a_ij k_j, t + c_i h), and the step is x + h sum_i b_i k_i.

    Attributes
    ----------
    a : weights of the stages, float64 [S, S], zero on and above the diagonal.
    b : weights of the step, float64 [S].
    c : nodes of the stages, float64 [S].
    keep : factor of x in the step and in each stage, float64 [S + 1], the step last; all 1 for a Runge-Kutta method in t.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    keep: Tensor


def butcher(plan: Program, step: int = 0) -> Tableau:
    """The Butcher tableau of one step of a plan, on the velocity dx/dt.

    Exponential integrators have a tableau too, with weights that depend on the step, and with a factor of x other than 1.

    Parameters
    ----------
    plan : the plan.
    step : number of the step, from 0.

    Returns
    -------
    The tableau.

    Raises
    ------
    PlanError : the step reads vectors of earlier steps (a multistep method), or has weights that are no numbers.
    InputError : no such step.
    """
    step = check_whole("step", step, least=0, most=len(plan.grid) - 2)
    t, s = plan.grid[step : step + 2]
    ends = [0, *(k for k, ins in enumerate(plan.code, start=1) if isinstance(ins, Combine) and ins.step is not None)]
    first = ends[step]
    known = {first: Vector({0: 1.0})}
    for k, ins in enumerate(
        plan.code[:first], start=1
    ):  # an evaluation of the last step may serve as the first of this one
        if isinstance(ins, Combine) and ins.copies is not None and k == first:
            known[ins.copies] = known[first]
    states: list[Vector] = []
    times: list[float] = []
    for k, ins in enumerate(plan.code[: ends[step + 1]], start=1):
        if isinstance(ins, Evaluate) and (k > first or (ins.state in known and ins.t == t)):
            if ins.state not in known:
                raise _not_one_step(plan, step)
            states.append(known[ins.state])
            times.append(ins.t)
            p, q = conversion(plan.schedule, ins.t, "velocity", ins.form)
            known[k] = p * states[-1] + q * Vector({len(states): 1.0})
        elif isinstance(ins, Combine) and k > first:
            if ins.constant is not None or not all(is_number(w) for _, w in ins.terms):
                raise PlanError(f"step {step} of {plan.name} has weights that are no numbers, and no tableau.")
            total = Vector({})
            for j, weight in ins.terms:
                if j not in known:
                    raise _not_one_step(plan, step)
                total = total + weight * known[j]
            known[k] = total
    n = len(states)
    rows = torch.zeros(n + 1, n + 1, dtype=_F64, device="cpu")
    for i, row in enumerate((*states, known[ends[step + 1]])):
        for j, weight in row.weights.items():
            rows[i, j] = weight
    h = s - t
    nodes = torch.tensor([(u - t) / h for u in times], dtype=_F64, device="cpu")
    a, b = rows[:-1, 1:] / h + 0.0, rows[-1, 1:] / h + 0.0  # no negative zeros
    return Tableau(a, b, nodes + 0.0, rows[:, 0])


def _not_one_step(plan: Program, step: int) -> PlanError:
    return PlanError(
        f"step {step} of {plan.name} reads vectors of earlier steps: a multistep method has no Butcher tableau. "
        "plan.canonical().matrix('velocity') has the weights of all evaluations."
    )
